"""Blocks that are left out: as many as a target has room for, the idle ones first, and nothing of them is computed."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression_worker import artifact as artifacts
from compression_worker.checkpoints import load_folder
from compression_worker.contracts import CompressionError, Json
from compression_worker.methods.deltallm.compress import load_model
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.estimate import estimate
from compression_worker.methods.deltallm.groups import (
    Depth,
    Round,
    budget,
    cheapest,
    given,
    highest_rank,
    own_rank,
    saving,
)
from compression_worker.methods.deltallm.layout import DELTAS_FILE
from compression_worker.methods.deltallm.shared import SharedLinear
from compression_worker.preflight import Inputs, Model
from compression_worker.runner import Runner
from tests.compression_worker.methods.sharing import QUICK, Job, Made, logits, operations, six_layers
from tests.tiny import make_tiny_pair

SIDES = [(1536, 576), (1536, 576), (576, 1536)]
PARAMETERS = 134_515_008
DEPTH = Depth(blocks=30, alike=tuple(range(30)), protect_first=2, protect_last=2)
IDLE = 3
DROPPED: Json = {"share_form": "scaled", "start": "svd_covariance", "replacement": "none", "dropping": "measured"}
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", name="job")
def fixture_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A model of six blocks, of which the MLP of one adds next to nothing."""
    folder = tmp_path_factory.mktemp("dropping")
    model = make_tiny_pair(folder, tied=False, layers=6)[0]
    weights = load_file(model / "model.safetensors")
    weights[f"model.layers.{IDLE}.mlp.down_proj.weight"] *= 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return Job(folder, model)


@pytest.fixture(scope="module", name="made")
def fixture_made(job: Job) -> Made:
    return job.run(target_reduction=0.12, tokens=256, batch_size=2, train="deltas_lora", **DROPPED)


@pytest.mark.parametrize("target", [0.05, 0.06, 0.12, 0.24])
def test_what_is_left_out_falls_short_of_the_target_and_differences_meet_it(target: float) -> None:
    found = budget(
        SIDES, PARAMETERS, DEPTH, target=target, followers=None, rank=10**6, beside=3, leaves_out=True
    )  # the rank is not asked for
    whole, wanted = saving(SIDES, 0) - 3, target * PARAMETERS
    sharing = found.followers - found.left_out
    assert found.left_out == math.floor(wanted / whole)
    assert sharing == 1
    saved = found.left_out * whole + sharing * (saving(SIDES, found.rank) - 3)
    assert wanted <= saved <= wanted + sharing * (saving(SIDES, 0) - saving(SIDES, 1))
    assert found.factors(SIDES) == sharing * (saving(SIDES, 0) - saving(SIDES, found.rank))


def test_where_no_difference_fits_one_block_more_is_left_out() -> None:
    whole = saving(SIDES, 0) - 3
    for target, left_out, followers in (
        (2 * whole / PARAMETERS, 2, 2),
        ((2 * whole - 10) / PARAMETERS, 2, 2),
        ((2 * whole - 100_000) / PARAMETERS, 1, 2),
    ):
        found = budget(SIDES, PARAMETERS, DEPTH, target=target, followers=None, rank=4, beside=3, leaves_out=True)
        assert (found.left_out, found.followers) == (left_out, followers)
        assert (found.rank > 0) is (followers > left_out)


def test_small_matrices_keep_the_highest_rank_that_saves_anything() -> None:
    whole = [*SIDES, (576, 576), (192, 576), (192, 576), (576, 576)]
    found = budget(whole, PARAMETERS, DEPTH, target=0.06, followers=None, rank=4, beside=7, leaves_out=True)
    assert (found.followers, found.left_out) == (3, 2)
    assert found.rank > highest_rank(whole) == 143
    saved = 2 * (saving(whole, 0) - 7) + saving(whole, found.rank) - 7
    assert 0.06 * PARAMETERS <= saved < 0.0601 * PARAMETERS
    assert [own_rank(192, 576, rank) for rank in (1, 143, 144, 400)] == [1, 143, 143, 143]


def test_a_target_that_blocks_cannot_meet_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"the 26 blocks that may be left out have 51\.3 % of the") as refused:
        budget(SIDES, PARAMETERS, DEPTH, target=0.6, followers=None, rank=4, leaves_out=True)
    assert refused.value.code == "target_out_of_reach"


def test_blocks_are_left_out_before_others_share() -> None:
    found = budget(SIDES, PARAMETERS, DEPTH, target=0.12, followers=None, rank=4, leaves_out=True)
    assert (found.followers, found.left_out) == (7, 6)
    assert found.rounds(4) == [Round(4, 7, True), Round(2, 3, True), Round(1, 1)]
    by_hand = given({3: 0, 4: 0, 6: 5}, {3: 0, 4: 0, 6: 8}, DEPTH, SIDES, 64)
    assert (by_hand.followers, by_hand.left_out, by_hand.rank) == (3, 2, 8)
    assert by_hand.factors(SIDES) == 8 * sum(n + k for n, k in SIDES)
    assert cheapest({2: 0.3, 3: 0.1, 4: 0.1, 5: 0.2}, 3) == [3, 4, 5]
    assert DEPTH.idle({5: 4}) == {block: 0 for block in range(2, 28) if block != 5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dropping": "all"}, "dropping is 'all'; it may be one of none, measured"),
        ({"dropping": "measured"}, "dropping=measured leaves blocks out, and share_form is 'low_rank': set share_form"),
        ({"groups": "0:2@0"}, "rank 0 behind @ leaves blocks out, and share_form is 'low_rank'"),
        ({"dropping": "measured", "share_form": "scaled", "followers": 2}, "and neither followers nor groups"),
        ({"dropping": "measured", "share_form": "scaled", "groups": "0:2"}, "with @0 behind their group"),
        (
            {"dropping": "measured", "share_form": "scaled", "target_reduction": None, "followers": 1},
            "set target_reduction",
        ),
    ],
)
def test_settings_that_leave_nothing_out_are_refused(settings: Json, words: str) -> None:
    with pytest.raises(CompressionError, match=words) as refused:
        DeltaLLMConfig(**settings)
    assert refused.value.code == "bad_setting"


def test_the_idle_block_is_left_out_and_the_target_is_met(made: Made) -> None:
    sharing = made.sharing
    assert sharing["left_out"] == [IDLE]
    assert len([one for some in sharing["groups"].values() for one in some]) == 2
    assert 0.12 <= sharing["parameters"]["reduction"] < 0.125
    first, second = sharing["rounds"]
    assert first["chosen"] == [IDLE]
    assert {anchor for anchor, _ in first["kl"].values()} == {None}
    assert min(first["kl"].values(), key=lambda one: one[1]) == first["kl"][str(IDLE)]
    assert None not in {anchor for anchor, _ in second["kl"].values()}
    assert str(IDLE) not in second["kl"], "what is left out does not share as well"


def test_nothing_of_it_is_stored_or_multiplied(made: Made) -> None:
    table = made.artifact.manifest["tensors"]
    gone = [table[f"model.layers.{IDLE}.mlp.{name}.weight"] for name in MLP]
    assert {entry["rank"] for entry in gone} == {0}
    stored = load_file(made.job.store.verified_path(made.artifact.manifest["files"][DELTAS_FILE]["sha256"]))
    held = {key: one for key, one in stored.items() if key.startswith(f"model.layers.{IDLE}.")}
    assert sum(one.numel() for one in held.values()) == len(MLP)
    assert not any(bool(one.any()) for one in held.values())
    left = sum(math.prod(entry["shape"]) for entry in table.values() if entry["kind"] != "shared")
    assert made.sharing["parameters"]["after"] == left + sum(one.numel() for one in stored.values())
    said = made.sharing["operations"]
    # The scales of anchors are multiplications that the counter does not see.
    scales = sum(entry["shape"][0] for entry in table.values() if entry["kind"] == "shared" and entry["rank"])
    assert said == {
        "before": operations(load_folder(made.job.model, dtype=torch.float32)),
        "after": operations(load_model(None, made.artifact, "cpu", torch.float32)) + scales,
    }
    assert said["after"] < said["before"]
    assert all(one.partition("#")[0] not in made.sharing["scales"] for one in held)


def test_every_form_of_it_answers_alike(made: Made, tmp_path: Path) -> None:
    shared = logits(load_model(None, made.artifact, "cpu", torch.float32))
    torch.testing.assert_close(
        shared, logits(load_model(None, made.artifact, "cpu", torch.float32, dense=True)), rtol=1e-4, atol=1e-5
    )
    artifacts.restore(None, made.artifact, tmp_path / "model", lambda done, total, unit: None)
    plain: Any = load_folder(tmp_path / "model", dtype=torch.float32)
    assert not bool(plain.model.layers[IDLE].mlp.down_proj.weight.any())
    torch.testing.assert_close(logits(plain), shared, rtol=0.02, atol=0.02)
    artifacts.write_folder(tmp_path / "artifact", made.job.store, made.output.blobs)
    code = f"""
import compression_worker, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "artifact")!r}, dtype=torch.float32)
torch.save(model(torch.arange(40, 60).view(1, 20), use_cache=False).logits.detach(), {str(tmp_path / "logits")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits"), shared, rtol=1e-5, atol=1e-5)


def test_the_others_learn_and_what_is_left_out_does_not(made: Made) -> None:
    assert made.training["tokens"] == 256
    tuned = [one["name"] for one in made.artifact.manifest["figures"]["matrices"] if one["coding"] == "whole, tuned"]
    first = [name for name in tuned if name.startswith("model.layers.0.mlp")]
    assert len(first) == len(MLP), "the block that is written as their anchor lends nothing, and learns"
    codings = {one["name"]: one for one in made.artifact.manifest["figures"]["matrices"]}
    assert {codings[f"model.layers.{IDLE}.mlp.{name}.weight"]["coding"] for name in MLP} == {"left out"}
    assert {codings[f"model.layers.{IDLE}.mlp.{name}.weight"]["relative_error"] for name in MLP} == {1.0}


def test_its_anchor_is_not_asked() -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an anchor was computed for nothing")

    anchor = torch.nn.Linear(6, 4)
    anchor.register_forward_pre_hook(refuse)
    nothing = (torch.zeros(0, 6), torch.zeros(4, 0), torch.zeros(1))
    bias = torch.arange(4.0)
    assert torch.equal(SharedLinear(anchor, nothing, bias)(torch.ones(2, 3, 6)), bias.expand(2, 3, 4))


def test_whole_blocks_by_hand_and_nothing_that_learns(tmp_path: Path) -> None:
    job = six_layers(tmp_path)
    settings: Json = {"groups": "0:2,4@0", "share_form": "scaled", "modules": "mlp_attention", "tokens": 256}
    events: list[Json] = []
    plan = Runner(store=job.store, device="cpu").compute(job.spec(**settings), events.append)[1]
    assert "train" not in {step.group for step in plan.steps}
    assert "set train=deltas_lora" in " ".join(str(event) for event in events if event.get("level") == "warning")
    made = job.run(**settings)
    assert made.output.data["name_hint"] == "deltallm-2out"
    assert made.sharing["left_out"] == [2, 4]
    assert "ranks" not in made.sharing
    plain: Any = load_folder(job.model, dtype=torch.float32)
    plain.model.layers = torch.nn.ModuleList(plain.model.layers[block] for block in (0, 1, 3, 5))
    torch.testing.assert_close(
        logits(load_model(None, made.artifact, "cpu", torch.float32)), logits(plain), rtol=1e-4, atol=1e-5
    )


def test_what_is_foretold_is_what_is_made(made: Made, job: Job) -> None:
    manifest = job.checkpoint.manifest
    model = Model(
        config=manifest["config"],
        parameters=manifest["parameters"],
        weight_bytes=manifest["weight_bytes"],
        size_bytes=sum(one["size"] for one in manifest["files"].values()),
    )
    config = DeltaLLMConfig(**{**QUICK, **DROPPED, "target_reduction": 0.12, "tokens": 256, "batch_size": 2})
    found = estimate(config, Inputs(variant=model))
    assert found.exact
    parts = {part["name"]: part["bytes"] for part in found.parts}
    said = {part["name"]: part["bytes"] for part in made.artifact.summary()["parts"]}
    assert parts["deltas"] == said["deltas"]
    assert parts["linears"] == pytest.approx(said["linears"], rel=0.02), "headers of files count as weights there"
