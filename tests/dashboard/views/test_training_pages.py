"""Pages of trainings: losses and held-out text of a job while it trains, and of an artifact."""

from __future__ import annotations

from collections.abc import Callable
from html import unescape
from types import SimpleNamespace

import pytest
from django.test import Client
from django.urls import reverse

from dashboard.lifecycle import JobState, Role
from dashboard.models import Job
from dashboard.selectors.jobs import job_steps
from dashboard.selectors.trainings import losses_so_far, training, training_so_far
from tests.factories import make_artifact, make_chunk, make_job, sharing_figures

ClientAs = Callable[[Role], Client]


def page(client: Client, route: str, *key: object) -> str:
    return " ".join(unescape(client.get(reverse(route, args=key)).content.decode()).split())


@pytest.fixture
def client(client_as: ClientAs) -> Client:
    return client_as(Role.ENGINEER)


@pytest.fixture
def running(world: SimpleNamespace) -> Job:
    return make_job(state=JobState.RUNNING, created_by=world.engineer, method="deltallm", variant=world.base)


@pytest.mark.parametrize("kind", ["deltallm.train", "int21.train"])
def test_a_running_training_shows_its_losses_after_each_part(running: Job, client: Client, kind: str) -> None:
    make_chunk(running, index=3, chunks=1, kind=kind)
    assert "Training so far: the loss goes from 0.500 to 0.0909 in 10 of 40 steps" in page(
        client, "job-detail", running.pk
    )
    make_chunk(running, index=4, chunks=2, kind=kind)
    shown = page(client, "job-detail", running.pk)
    assert "in 20 of 40 steps" in shown
    assert "On held-out text KL falls from 0.0250 to 0.0125 nats over 1,280 tokens" in shown
    assert 'id="data-curve"' not in shown, "it is no distillation"
    assert ("may rise though it learns" in shown) == kind.startswith("deltallm")
    assert [point["tokens"] for point in training_so_far(job_steps(running)).held_out] == [0, 640, 1280]
    assert losses_so_far(job_steps(running)) == []


def test_a_distillation_is_shown_by_the_part_that_knows_most(running: Job, client: Client) -> None:
    for index in range(2):
        step = make_chunk(running, index=index, chunks=1 + index, kind="quip_sharp.tune")
        step.data = {"curve": {"losses": step.data["losses"], "exam": [0.4, 0.3]}}
        step.save()
    shown = page(client, "job-detail", running.pk)
    assert "Distillation: the loss goes from 0.500 to 0.0476 in 20 steps" in shown
    assert 'id="data-training"' not in shown


def test_the_tuning_of_an_artifact_is_shown_as_its_job_showed_it(world: SimpleNamespace, client: Client) -> None:
    figures = {"tuning": {"blocks": {}, "end_to_end": {"losses": [0.5, 0.25], "exam": [0.4, 0.3]}}}
    made = make_artifact(world.base, alone=True, method="quip_sharp", name="tuned", figures=figures)
    shown = page(client, "artifact-detail", made.pk)
    assert "Distillation: the loss goes from 0.500 to 0.250 in 2 steps" in shown
    untuned = make_artifact(world.base, alone=True, method="quip_sharp", name="untuned", figures={"tuning": None})
    assert 'id="data-curve"' not in page(client, "artifact-detail", untuned.pk)


def test_a_packed_base_in_which_nothing_is_shared_is_not_where_training_begins() -> None:
    assert [point["phase"] for point in training(sharing_figures()).held_out] == ["start", "train", "train"]
    alone = {"training": sharing_figures()["training"]}
    assert [point["phase"] for point in training(alone).held_out] == ["base", "start", "train", "train"]


@pytest.mark.parametrize("lost", ["losses", "curve"])
def test_a_figure_that_was_no_number_leaves_the_others(running: Job, client: Client, lost: str) -> None:
    """The database keeps nothing in its place."""
    step = make_chunk(running, index=0, chunks=2)
    if lost == "losses":
        step.data["losses"][3] = None
    else:
        step.data["curve"][1]["kl"] = None
    step.save()
    assert "in 20 of 40 steps" in page(client, "job-detail", running.pk)
