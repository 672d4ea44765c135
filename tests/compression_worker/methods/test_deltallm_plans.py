"""What a job of DeltaLLM refuses, what it plans, ranks of groups by hand, and what is foretold of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression_worker.contracts import CompressionError, Json, StepSpec
from compression_worker.methods.deltallm.compress import load_model
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.estimate import estimate, planned
from compression_worker.methods.deltallm.groups import highest_rank
from compression_worker.methods.deltallm.layout import DELTAS_FILE
from compression_worker.preflight import Inputs, Model
from compression_worker.runner import Runner
from tests.compression_worker.methods.sharing import LEARNING, QUICK, Job, logits, six_layers
from tests.families import make_family_pair
from tests.tiny import make_tiny_pair

RANKS = {1: 12, 3: 3, 4: 3}


@pytest.fixture(scope="module", name="job")
def fixture_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return six_layers(tmp_path_factory.mktemp("deltallm"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": "1:9"}, "there is no block 9: the model has 6, from 0 to 5"),
        ({"groups": "1:2", "rank": 64}, "highest rank that saves anything is 42"),
        ({"groups": "1:2", "rank": 500}, "has 64 rows or columns only"),
        ({"groups": "1:2", "rank": 43}, "would not become smaller; the highest rank that saves anything is 42"),
        ({"groups": "1:2;3:4@43"}, "the rank of block 4, in the group of block 3, is 43, .* would not become smaller"),
        ({"groups": "1:2@500"}, "the rank of block 2, in the group of block 1, is 500, .* has 64 rows or columns only"),
        ({"followers": 5}, "followers is 5, and 4 blocks can follow at most"),
        ({"target_reduction": 0.9}, r"4 followers of rank 4 save \d+\.?\d* % of the parameters at most"),
        ({"protect_first": 3, "protect_last": 3}, "no layer can be shared: of 6 blocks the first 3 and the last 3"),
        ({"rounds": 1}, "DeltaLLM has no setting 'rounds'"),
    ],
)
def test_what_cannot_work_is_refused_by_the_plan(job: Job, settings: Json, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        job.planned(**settings)


def test_depth_2_has_nothing_to_share_unless_its_edges_may_be(tmp_path: Path) -> None:
    job = Job(tmp_path, make_tiny_pair(tmp_path)[0])
    with pytest.raises(CompressionError, match="of 2 blocks the first 2 and the last 2 are protected") as refused:
        job.planned(protect_first=2, protect_last=2)
    assert refused.value.code == "nothing_to_share"
    assert job.planned(protect_first=0, protect_last=0, followers=1).data["followers"] == 1


def test_mixtures_of_experts_share_attention_alone(tmp_path: Path) -> None:
    job = Job(tmp_path, make_family_pair(tmp_path, "mixtral")[0])
    with pytest.raises(CompressionError, match="set modules=attention") as refused:
        job.planned(groups="0:1", rank=2)
    assert refused.value.code == "experts"
    table = job.run(groups="0:1", rank=2, modules="attention").artifact.manifest["tensors"]
    shared = {name for name, entry in table.items() if entry["kind"] == "shared"}
    assert shared == {f"model.layers.1.self_attn.{side}_proj.weight" for side in "qkvo"}


def test_a_text_is_asked_for(job: Job) -> None:
    spec = StepSpec(kind="deltallm.plan", params={"config": QUICK}, inputs={"variant": job.inputs["variant"]})
    with pytest.raises(CompressionError, match="give a text set"):
        Runner(store=job.store, device="cpu").compute(spec, lambda event: None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_reduction": 0}, "target_reduction is 0"),
        ({"target_reduction": None}, "nothing says how much is shared"),
        ({"followers": 0}, "followers is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"modules": "experts"}, "modules is 'experts'"),
        ({"start": "random"}, "start is 'random'"),
        ({"delta_dtype": "int8"}, "delta_dtype is 'int8'"),
        ({"picks_per_round": 0}, "picks_per_round is 0"),
        ({"tokens": -1}, "tokens is -1"),
        ({"p0": 1.5}, "p0 is 1.5; it must be from 0 to 1"),
        ({"final_share": -0.1}, "final_share is -0.1"),
        ({"slope": 0}, "slope is 0"),
        ({"share_form": "sparse"}, "share_form is 'sparse'"),
        ({"share_form": "sign"}, "set followers or groups"),
        ({"share_form": "sign", "groups": "1:2@4"}, "share_form=sign has none: leave out what stands behind @"),
        ({"share_form": "sign", "followers": 1, "start": "zero"}, "have one start"),
        ({"base_method": "int21"}, "base_method is 'int21'; it may be one of none, gptq, quip_sharp"),
        ({"base_method": "gptq", "num_bits": 5}, "num_bits is 5"),
        ({"base_method": "quip_sharp", "group_size": 64}, "QuIP# has no such setting"),
        ({"group_size": 64}, "anchors are not quantized"),
        ({"train": "everything"}, "train is 'everything'"),
        ({"hidden_weight": -1}, "hidden_weight is -1"),
        ({"hidden_weight": 1.0, "base_method": "gptq"}, "set hidden_weight=0"),
        ({"train": "deltas_lora", "base_method": "gptq"}, "set train=deltas"),
        ({"train": "deltas_lora", "hidden_weight": 1.0}, "choose one of them"),
        ({"replacement": "sudden"}, "replacement is 'sudden'"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Json, words: str) -> None:
    with pytest.raises(CompressionError, match=words) as refused:
        DeltaLLMConfig(**settings)
    assert refused.value.code == "bad_setting"


@pytest.mark.parametrize("form", ["low_rank", "scaled"])
def test_a_target_is_met(job: Job, form: str) -> None:
    made = job.run(target_reduction=0.1, share_form=form)
    assert 0.1 <= made.sharing["parameters"]["reduction"] < 0.11
    assert made.sharing["rank"] > 4
    assert made.sharing["rank"] <= highest_rank([(128, 64)])


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": "1:2,3"},
        {"groups": "0:1@9;2:3,4@2", "rank": 64},
        {"followers": 3},
        {"followers": 2, "start": "svd_covariance"},
        {**LEARNING, "epochs": 2},
        {**LEARNING, "base_method": "gptq"},
        {**LEARNING, "groups": "0:1@9;2:3", "share_form": "scaled"},
        {**LEARNING, "share_form": "sign"},
        {**LEARNING, "share_form": "scaled"},
    ],
)
def test_the_estimate_foretells_steps_and_bytes(job: Job, settings: Json) -> None:
    made = job.run(**settings)
    manifest = job.checkpoint.manifest
    model = Model(**{name: manifest[name] for name in ("config", "parameters", "weight_bytes", "size_bytes")})
    foretold = estimate(DeltaLLMConfig(**QUICK | settings), Inputs(variant=model))
    kinds = [step.kind for step in job.planned(**settings).steps]
    counts = {load.kind: load.count for load in foretold.steps if not load.kind.endswith(".plan")}
    assert counts == {kind: kinds.count(kind) for kind in kinds}
    stored = {part["name"]: part["bytes"] for part in made.artifact.parts}
    said = {part["name"]: part["bytes"] for part in foretold.parts}
    assert said["deltas"] == stored["deltas"]
    for name in {"linears", "codes"} & stored.keys():
        assert said[name] == pytest.approx(stored[name], rel=0.02)
    assert foretold.result_bytes == pytest.approx(sum(stored.values()), rel=0.1)
    assert planned(DeltaLLMConfig(), model, model.shapes()) is None, "rank 64 of matrices that have 64 rows"


@pytest.mark.parametrize(
    "settings",
    [{}, {"share_form": "scaled"}, {"start": "svd_covariance"}, {"start": "zero"}, {"base_method": "gptq"}, LEARNING],
)
def test_groups_by_hand_may_have_a_rank_each(job: Job, settings: Json) -> None:
    made = job.run(**settings | {"groups": "0:1@12;2:3,4", "rank": 3})
    table = made.artifact.manifest["tensors"]
    for name, entry in table.items():
        if entry["kind"] == "shared":
            assert entry["rank"] == RANKS[int(name.split(".")[2])], name
    deltas = load_file(made.artifact.paths[DELTAS_FILE])
    assert deltas["model.layers.1.mlp.up_proj.weight#A"].shape == (12, 64)
    assert deltas["model.layers.4.mlp.up_proj.weight#B"].shape == (128, 3)
    scales = 9 if settings.get("share_form") == "scaled" else 0
    expected = 2 * (3 * (12 + 3 + 3) * (64 + 128) + scales)
    assert {part["name"]: part["bytes"] for part in made.artifact.parts}["deltas"] == expected
    assert (made.sharing["rank"], made.sharing["group_ranks"]) == (12, {"1": 12, "3": 3, "4": 3})
    if points := made.sharing.get("ranks"):
        assert [(point.get("lowest"), point["rank"]) for point in points] == [
            (None, 0),
            (0, 1),
            (0, 3),
            (1, 6),
            (3, 12),
        ]
        assert points[-1]["parameters"] == made.sharing["parameters"]["after"]
    assert made.output.data["name_hint"].endswith("3shared-r3-12" + ("-4bit" if "base_method" in settings else ""))
    shared, full = (load_model(None, made.artifact, "cpu", torch.float32, dense=dense) for dense in (False, True))
    torch.testing.assert_close(logits(shared), logits(full), rtol=1e-4, atol=1e-4)


def test_one_rank_of_all_groups_is_as_if_it_were_the_rank(job: Job) -> None:
    own, plain = job.run(groups="1:2,3@5", rank=64), job.run(groups="1:2,3", rank=5)
    assert own.output.blobs[DELTAS_FILE] == plain.output.blobs[DELTAS_FILE]
    assert (own.sharing["rank"], own.sharing["group_ranks"]) == (5, {"2": 5, "3": 5})
    assert own.output.data["name_hint"] == plain.output.data["name_hint"]
    assert "group_ranks" not in plain.sharing
