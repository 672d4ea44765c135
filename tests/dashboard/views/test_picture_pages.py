"""Pictures where people meet them: the bytes, the matrices, quality against bytes; and no query per row behind them."""

from __future__ import annotations

from collections.abc import Callable
from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from dashboard.lifecycle import JobState, Role, StepState
from dashboard.models import Step
from dashboard.selectors.jobs import job_steps, matrices_so_far
from tests.dashboard.views.pages import inline_code
from tests.factories import deploy, make_artifact, make_evaluation, make_job, standalone_figures

ClientAs = Callable[[Role], Client]


def words(response: Any) -> str:
    return " ".join(unescape(response.content.decode()).split())


@pytest.fixture
def client(client_as: ClientAs) -> Client:
    return client_as(Role.ENGINEER)


def test_a_finished_job_shows_the_bytes_and_matrices_of_what_it_made(world: SimpleNamespace, client: Client) -> None:
    page = words(client.get(reverse("job-detail", args=[world.job.pk])))
    assert "5.20× smaller: 5.20 MB become 1.00 MB" in page
    assert 'id="data-ledger"' in page
    assert 'id="data-heatmap"' in page
    assert "model.layers.3.mlp.down_proj" in page  # of the artifact's figures; the steps told of two layers only


def test_a_training_shows_what_it_came_to_on_held_out_text(world: SimpleNamespace, client: Client) -> None:
    job = make_job(created_by=world.engineer, variant=world.base, method="int21")
    artifact = make_artifact(
        world.base, job, alone=True, method="int21", figures=standalone_figures(), name="corrected"
    )
    for address in (reverse("artifact-detail", args=[artifact.pk]), reverse("job-detail", args=[job.pk])):
        page = words(client.get(address))
        assert "On held-out text KL falls from 0.800 to 0.250 nats over 8,192 tokens" in page
        assert 'id="data-heldout"' in page
    assert 'id="data-heldout"' not in words(client.get(reverse("artifact-detail", args=[world.artifact.pk])))


def test_a_running_job_shows_the_matrices_of_its_finished_layers(world: SimpleNamespace, client: Client) -> None:
    page = words(client.get(reverse("job-detail", args=[world.running.pk])))
    assert 'id="data-ledger"' not in page
    assert 'id="data-heatmap"' in page
    assert "model.layers.1.self_attn.q_proj" in page
    assert "model.layers.2.self_attn.q_proj" not in page


def test_a_step_may_tell_of_its_matrices_as_an_artifact_does(world: SimpleNamespace) -> None:
    job = make_job(state=JobState.RUNNING, created_by=world.engineer, method="sketch")
    told = [{"name": "model.layers.0.mlp.up_proj", "relative_error": 0.25, "coding": "row"}]
    for index, state in enumerate((StepState.DONE, StepState.RUNNING)):
        Step.objects.create(
            job=job, index=index, name=f"layer {index}", group="layer", kind="sketch.layer", state=state,
            data={"matrices": told}, attempt=1, owner="w",
        )  # fmt: skip
    (one,) = matrices_so_far(job_steps(job))
    assert (one.name, one.error, one.coding) == ("model.layers.0.mlp.up_proj", 0.25, "row")


LINEAR = {"outputs": 2, "inputs": 8}


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"linear": LINEAR, "sum_abs": 8.0, "sum_squares": 5.0}, 0.4472),  # 1 - 64 / (16 * 5) = 0.2
        ({"linear": LINEAR, "coding": {"scale": "row"}, "error": 0.45, "sum_squares": 5.0}, 0.3),
        ({"linear": LINEAR, "sum_abs": 0.0, "sum_squares": 0.0}, 0.0),
        ({"linear": LINEAR}, None),
    ],
)
def test_errors_of_a_running_job_follow_from_the_sums_of_its_steps(line: dict[str, Any], error: float | None) -> None:
    step = Step(group="layer", state=StepState.DONE, data={"linears": {"model.layers.0.a": line}})
    (one,) = matrices_so_far([step])
    assert one.error == (None if error is None else pytest.approx(error, abs=1e-4))


def test_an_artifact_shows_how_its_matrices_are_stored_where_that_differs(
    world: SimpleNamespace, client: Client
) -> None:
    figures = {
        "matrices": [
            {"name": f"model.layers.{n}.mlp.<b>", "relative_error": 0.5, "coding": ("row", "2 masks")[n % 2]}
            for n in range(4)
        ]
    }
    artifact = make_artifact(world.variant, name="dialled", figures=figures)
    html = client.get(reverse("artifact-detail", args=[artifact.pk])).content.decode()
    assert "How each matrix is stored" in html
    assert 'id="data-coding"' in html
    assert "mlp.<b>" not in html
    assert inline_code(html) == []
    plain = words(client.get(reverse("artifact-detail", args=[world.artifact.pk])))
    assert "How each matrix is stored" not in plain


def test_an_artifact_of_a_method_without_figures_has_no_empty_pictures(world: SimpleNamespace, client: Client) -> None:
    artifact = make_artifact(world.variant, name="bare", figures={}, ledger=[])
    page = words(client.get(reverse("artifact-detail", args=[artifact.pk])))
    assert 'id="data-heatmap"' not in page
    assert 'id="data-ledger"' not in page


def test_a_release_shows_the_bytes_of_what_it_serves_and_none_at_full_precision(
    world: SimpleNamespace, client: Client
) -> None:
    address = reverse("environment-detail", args=["production"])
    assert 'id="data-ledger"' in words(client.get(address))
    assert 'id="data-ledger"' in words(client.get(address, headers={"HX-Request": "true"}))
    deploy(world.production, world.variant, rollback=True)
    assert 'id="data-ledger"' not in words(client.get(address))


def test_a_variant_shows_quality_against_bytes_and_each_mark_leads_on(world: SimpleNamespace, client: Client) -> None:
    page = words(client.get(reverse("checkpoint-detail", args=[world.variant.name])))
    for name in ("kl_divergence", "choice_accuracy", "perplexity"):
        assert f'id="data-{name}"' in page
    assert page.count(f'<a href="{reverse("artifact-detail", args=[world.artifact.pk])}" aria-label=') >= 3
    assert "full precision" in page


def test_a_variant_without_evaluations_has_no_comparison(world: SimpleNamespace, client: Client) -> None:
    page = words(client.get(reverse("checkpoint-detail", args=[world.base.name])))
    assert "Quality against bytes" not in page


@pytest.mark.parametrize("route", ["checkpoint-detail", "job-detail", "artifact-detail"])
def test_pages_with_pictures_take_as_many_queries_for_many_artifacts_as_for_few(
    world: SimpleNamespace, client: Client, route: str
) -> None:
    keys = {"checkpoint-detail": world.variant.name, "job-detail": world.job.pk, "artifact-detail": world.artifact.pk}
    address = reverse(route, args=[keys[route]])
    client.get(address)
    with CaptureQueriesContext(connection) as few:
        client.get(address)
    for number in range(4):
        made = make_artifact(world.variant, name=f"more-{number}")
        make_evaluation(made, text_set=world.text, choice_set=world.choice)
    with CaptureQueriesContext(connection) as many:
        client.get(address)
    assert len(many) == len(few), [query["sql"][:150] for query in many.captured_queries]
