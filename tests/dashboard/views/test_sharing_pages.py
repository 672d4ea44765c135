"""Pages of blocks that share: of the artifact, of its job while it chooses, of its variant."""

from __future__ import annotations

from collections.abc import Callable
from html import unescape
from types import SimpleNamespace

import pytest
from django.test import Client
from django.urls import reverse

from dashboard.lifecycle import JobState, Role, StepState
from dashboard.models import Artifact, Job
from dashboard.selectors.jobs import job_steps
from dashboard.selectors.sharing import rounds_so_far, savings, sharing_of, sharing_so_far, sharing_words
from tests.dashboard.views.pages import inline_code
from tests.factories import make_artifact, make_choice, make_evaluation, make_job, sharing_figures

ClientAs = Callable[[Role], Client]
CONFIG = {"groups": "", "protect_first": 1, "protect_last": 1, "base_method": "none", "num_bits": 4}


def page(client: Client, route: str, *key: object) -> str:
    return " ".join(unescape(client.get(reverse(route, args=key)).content.decode()).split())


@pytest.fixture
def client(client_as: ClientAs) -> Client:
    return client_as(Role.ENGINEER)


@pytest.fixture
def shared(world: SimpleNamespace) -> Artifact:
    return make_artifact(
        world.base, alone=True, method="deltallm", name=f"{world.base.name}-deltallm-3shared-r4", config=CONFIG,
        figures=sharing_figures(),
    )  # fmt: skip


@pytest.fixture
def running(world: SimpleNamespace) -> Job:
    return make_job(state=JobState.RUNNING, created_by=world.engineer, method="deltallm", variant=world.base)


SAVED = (
    "Sharing saves parameters, bytes and memory: 266,048 parameters are left of 332,864 (20.1 % fewer), which is "
    "90.0 kB less in the store, and each anchor's weights lie in memory once."
)
NOT_SAVED = (
    "It saves neither arithmetic nor time: products with weights take 640,512 operations for each token, where they "
    "took 626,688 (2.2 % more)."
)


def test_an_artifact_shows_who_shares_what_it_saves_and_what_it_does_not(shared: Artifact, client: Client) -> None:
    html = client.get(reverse("artifact-detail", args=[shared.pk])).content.decode()
    assert inline_code(html) == []
    shown = " ".join(unescape(html).split())
    assert SAVED in shown
    assert NOT_SAVED in shown
    assert "3 of 8 blocks use another's weights; 20.1 % fewer parameters" in shown
    assert 'id="data-sharing"' in shown
    assert 'id="data-candidates"' in shown
    assert "3 followers, rank 4" in shown
    assert "On held-out text KL falls from 0.0250 to 0.0190 nats over 256 tokens" in shown


def test_what_the_rank_buys_is_drawn_where_it_was_measured(shared: Artifact, client: Client) -> None:
    for route, key in (("artifact-detail", shared.pk), ("job-detail", shared.job_id)):
        assert "What the rank buys" not in page(client, route, key)
    points = [{"rank": rank, "parameters": 260_000 + 1_500 * rank, "kl": 0.5 / (1 + rank)} for rank in (0, 2, 4)]
    shared.figures["sharing"]["ranks"] = points
    shared.save()
    for route, key in (("artifact-detail", shared.pk), ("job-detail", shared.job_id)):
        assert "Before training KL falls from 0.500 nats at rank 0 to 0.100 at rank 4" in page(client, route, key)


def test_its_job_shows_the_same(shared: Artifact, client: Client) -> None:
    shown = page(client, "job-detail", shared.job_id)
    assert SAVED in shown
    assert NOT_SAVED in shown
    assert 'id="data-sharing"' in shown


def test_others_share_nothing(world: SimpleNamespace, client: Client) -> None:
    shown = page(client, "artifact-detail", world.artifact.pk)
    assert "another's weights" not in shown
    assert "neither arithmetic nor time" not in shown
    assert sharing_of(world.artifact) is None
    assert sharing_words(world.artifact) == ""


def test_a_running_job_shows_its_blocks_as_they_are_chosen(running: Job, client: Client) -> None:
    assert 'id="data-sharing"' not in page(client, "job-detail", running.pk)
    make_choice(running, index=0, rounds=1)
    begun = page(client, "job-detail", running.pk)
    assert "2 of 8 blocks use another's weights; 1 more is still to be chosen" in begun
    assert 'id="data-candidates"' in begun
    make_choice(running, index=1, rounds=2, final=True)
    chosen = page(client, "job-detail", running.pk)
    assert "3 of 8 blocks use another's weights" in chosen
    assert "to be chosen" not in chosen
    sharing = sharing_so_far(job_steps(running))
    assert sharing is not None
    assert (sharing.groups, sharing.protected, sharing.still) == ({3: 2, 4: 2, 6: 5}, {0, 7}, 0)
    assert [sorted(one.chosen) for one in rounds_so_far(job_steps(running))] == [[3, 6], [4]]


def test_a_round_that_is_not_finished_tells_nothing(running: Job) -> None:
    step = make_choice(running, index=0, rounds=1)
    step.state = StepState.RUNNING
    step.save()
    assert sharing_so_far(job_steps(running)) is None
    assert rounds_so_far(job_steps(running)) == []


def test_groups_by_hand_protect_nothing_and_were_not_measured(running: Job, client: Client) -> None:
    step = make_choice(running, index=0, rounds=2, final=True)
    step.params |= {"by_hand": {"3": 2}, "count": 0, "still": 3}
    step.data |= {"rounds": []}
    step.save()
    sharing = sharing_so_far(job_steps(running))
    assert sharing is not None
    assert (sharing.protected, sharing.still) == (frozenset(), 0)
    assert 'id="data-candidates"' not in page(client, "job-detail", running.pk)
    artifact = make_artifact(
        running.variant, alone=True, figures=sharing_figures(), config=CONFIG | {"groups": "2:3,4;5:6"}
    )
    found = sharing_of(artifact)
    assert found is not None
    assert (found.blocks, found.protected) == (8, frozenset())


def test_what_is_saved_is_what_the_anchors_weights_would_weigh_again(shared: Artifact) -> None:
    """Three followers with one shared matrix each: 32,000 bytes like the anchor's, less 2,000 of a difference."""
    assert "90.0 kB less" in savings(shared)[0]
    for line in shared.figures["matrices"]:
        del line["bytes"]
    assert savings(shared)[0] == "Sharing saves parameters: 266,048 are left of 332,864 (20.1 % fewer)."


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "3 followers, rank 4"),
        ({"base_method": "none", "num_bits": 4}, "3 followers, rank 4"),
        ({"base_method": "gptq", "num_bits": 4}, "3 followers, rank 4, 4-bit anchors"),
    ],
)
def test_artifacts_of_one_method_are_told_apart_in_words(config: dict[str, object], words: str) -> None:
    assert sharing_words(Artifact(figures=sharing_figures(), config=config)) == words


def test_signs_have_no_rank() -> None:
    figures = sharing_figures()
    figures["sharing"] |= {"form": "sign", "rank": 0}
    assert sharing_words(Artifact(figures=figures, config={})) == "3 followers, signs"


def test_ranks_of_groups_are_named_from_the_lowest_to_the_highest(shared: Artifact, client: Client) -> None:
    told = shared.figures["sharing"]
    told |= {"rank": 64, "group_ranks": {"3": 64, "4": 64, "6": 32}}
    assert sharing_words(shared) == "3 followers, rank 32 to 64"
    told["ranks"] = [{"rank": 0, "parameters": 260_000, "kl": 0.5}]
    told["ranks"].append({"rank": 64, "lowest": 32, "parameters": 266_048, "kl": 0.1})
    shared.save()
    shown = page(client, "artifact-detail", shared.pk)
    assert "3 followers, rank 32 to 64" in shown
    assert "KL falls from 0.500 nats at rank 0 to 0.100 at rank 32 to 64" in shown
    told["group_ranks"] = dict.fromkeys(told["group_ranks"], 64)
    assert sharing_words(shared) == "3 followers, rank 64"


def test_what_is_left_out_is_told_apart_and_its_time_is_saved(shared: Artifact, client: Client) -> None:
    told = shared.figures["sharing"]
    told |= {"groups": {"0": [1], "2": [3, 4], "5": [6]}, "left_out": [1]}
    told["operations"] = {"before": 626_688, "after": 540_512}
    shared.figures["matrices"] = [
        line | {"coding": "left out", "bytes": 2} if line["name"] == "model.layers.1.mlp.up_proj.weight" else line
        for line in shared.figures["matrices"]
    ]
    shared.save()
    assert sharing_words(shared) == "3 followers, rank 4, 1 block left out"
    found = sharing_of(shared)
    assert found is not None
    assert (found.groups, found.left_out) == ({3: 2, 4: 2, 6: 5}, {1})
    shown = page(client, "artifact-detail", shared.pk)
    assert "3 of 8 blocks use another's weights; 1 is left out; 20.1 % fewer parameters" in shown
    assert (
        "products with weights take 540,512 operations for each token, where they took 626,688 (13.8 % fewer)" in shown
    )
    assert "neither arithmetic nor time" not in shown
    assert "which is 122 kB less in the store" in shown, "what was left out would have weighed 32,000 bytes more"
    told["groups"], told["left_out"], told["rank"] = {"0": [1, 3]}, [1, 3], 0
    assert sharing_words(shared) == "2 blocks left out"


def test_a_running_job_shows_what_it_leaves_out(running: Job) -> None:
    step = make_choice(running, index=0, rounds=1)
    step.data |= {"groups": {"4": 0, "6": 0}, "left_out": [4, 6]}
    step.data["rounds"] = [{"kl": {"4": [None, 0.01], "5": [None, 0.2], "6": [None, 0.02]}, "chosen": [4, 6]}]
    step.save()
    sharing = sharing_so_far(job_steps(running))
    assert sharing is not None
    assert (sharing.groups, sharing.left_out) == ({}, {4, 6})
    assert {one.anchor for round_ in rounds_so_far(job_steps(running)) for one in round_.found.values()} == {None}


def test_what_anchors_still_give_is_said(shared: Artifact) -> None:
    assert len(savings(shared)) == 2
    shared.figures["sharing"]["scales"] = {"a": -0.02, "b": 0.31, "c": 0.004}
    assert "at 0.020 or less, the most at 0.31" in savings(shared)[2]
    assert sharing_words(shared).startswith("3 followers, rank 4, scaled anchors")


def test_the_ranks_of_a_sweep_are_named_in_the_comparison_and_in_the_table(
    world: SimpleNamespace, client: Client
) -> None:
    for rank, size in ((4, 900_000), (8, 950_000)):
        figures = sharing_figures()
        figures["sharing"]["rank"] = rank
        made = make_artifact(
            world.base, alone=True, method="deltallm", name=f"{world.base.name}-deltallm-3shared-r{rank}", config=CONFIG,
            figures=figures, artifact_bytes=size,
        )  # fmt: skip
        make_evaluation(made, text_set=world.text, choice_set=world.choice)
    shown = page(client, "checkpoint-detail", world.base.name)
    for rank in (4, 8):
        assert f"DeltaLLM · 3 followers, rank {rank}" in shown
        assert f'<span class="small quiet">3 followers, rank {rank}</span>' in shown
