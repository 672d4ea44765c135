"""Layers that share weights: who follows whom, exact starts, one copy in memory, and what is promised of it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from compression_worker import artifact as artifacts
from compression_worker import catalog
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint, attach_folder, load_folder
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput, StepSpec
from compression_worker.making.inputs import architecture_of
from compression_worker.methods.deltallm.compress import load_model, load_packed
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.differences import dense, difference, signs_of
from compression_worker.methods.deltallm.estimate import estimate, planned
from compression_worker.methods.deltallm.groups import (
    Depth,
    budget,
    highest_rank,
    parse_groups,
    picked,
    rounds,
    saving,
)
from compression_worker.methods.deltallm.layout import DELTAS_FILE, keys
from compression_worker.methods.deltallm.matrices import SharedMatrix, shareable
from compression_worker.methods.deltallm.replacement import drawn, probability
from compression_worker.methods.deltallm.shared import Follower, SharedLinear, without_bias
from compression_worker.methods.deltallm.student import Student
from compression_worker.methods.deltallm.training import loss_of, replace_modules, round_factors
from compression_worker.preflight import Inputs, Model
from compression_worker.quantization.bases import BASES
from compression_worker.quantization.learning import HeldOut
from compression_worker.quantization.low_rank import truncated
from compression_worker.quantization.teacher import TRAINED, TopLogits, read_logits, read_windows
from compression_worker.runner import Runner, resolve_inputs, run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from tests.families import make_family_pair
from tests.tiny import make_tiny_pair

SENTENCES = [f"Sentence {n}: the quick brown fox jumps over the lazy dog." for n in range(60)]
TEXTS = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in SENTENCES)
LAYERS = 6
QUICK: Json = {
    **{"protect_first": 1, "protect_last": 1, "rank": 4, "window_tokens": 16, "measure_windows": 2, "held_out": 2},
    **{"samples": 4, "length": 16, "teacher_logits": 16, "tokens": 0},
}
LEARNING: Json = {"groups": "1:2,3", "tokens": 256, "batch_size": 2, "p0": 0.2, "final_share": 0.25}
"""Eight optimizer steps."""
TOKENS = torch.arange(40, 60).view(1, 20)


class Job:
    """A model and a text in a store, and plans that run there."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.store = Store(folder / "store", durable=False)
        self.inputs = {
            "variant": attach_folder(self.store, model),
            "calibration": self.store.write_bytes(parse_samples(TEXTS, TEXT).data),
        }

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(self.store, self.inputs["variant"])

    def spec(self, **settings: Any) -> StepSpec:
        return StepSpec(kind="deltallm.plan", params={"config": QUICK | settings}, inputs=self.inputs, seed=3)

    def planned(self, **settings: Any) -> StepOutput:
        return Runner(store=self.store, device="cpu").compute(self.spec(**settings), lambda event: None)[1]

    def run(self, **settings: Any) -> Made:
        return Made(self, run_plan(self.store, self.spec(**settings), device="cpu"))

    def student(self, kinds: tuple[str, ...] = ("mlp",)) -> Student:
        layers = shareable(self.checkpoint.manifest["config"], architecture_of(self.checkpoint), kinds)
        return Student.of(self.checkpoint, None, layers, "cpu")


class Made:
    """What came of it."""

    def __init__(self, job: Job, output: StepOutput) -> None:
        self.job, self.output = job, output

    @cached_property
    def artifact(self) -> Artifact:
        return Artifact.open_store(self.job.store, self.output.data["artifact"])

    @property
    def training(self) -> Json:
        found: Json = self.artifact.manifest["figures"]["training"]
        return found

    @property
    def sharing(self) -> Json:
        found: Json = self.artifact.manifest["figures"]["sharing"]
        return found


@pytest.fixture(scope="module", name="job")
def fixture_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("deltallm")
    return Job(folder, make_tiny_pair(folder, tied=False, layers=LAYERS)[0])


@pytest.fixture(scope="module", name="made")
def fixture_made(job: Job) -> Made:
    return job.run(groups="1:2,3")


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


def test_groups_are_read_as_they_are_written() -> None:
    assert parse_groups(" 4:5, 6; 10:11") == {5: 4, 6: 4, 11: 10}
    assert parse_groups("") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4", "is no group; write anchor:follower"),
        ("4:five", "is no group"),
        ("5:4", "an anchor comes before its followers"),
        ("4:4", "block 4 cannot follow block 4"),
        ("-1:4", "block 4 cannot follow block -1"),
        ("1:3;2:3", "block 3 follows twice"),
        ("1:2;2:3", "block 2 is an anchor and a follower"),
    ],
)
def test_groups_that_contradict_each_other_are_refused(text: str, words: str) -> None:
    with pytest.raises(CompressionError, match=words) as refused:
        parse_groups(text)
    assert refused.value.code == "bad_setting"


def test_edges_never_follow_and_may_be_anchors() -> None:
    depth = Depth(blocks=8, alike=tuple(range(8)), protect_first=2, protect_last=2)
    assert depth.candidates == (2, 3, 4, 5)
    assert depth.allowed({}, 1) == {2: 1, 3: 2, 4: 3, 5: 4}
    assert depth.allowed({4: 3}, 1) == {2: 1, 5: 3}, "3 is an anchor; the nearest one of 5 that shares nothing is 3"
    assert depth.allowed({}, 4) == {2: 1}, "all four follow block 1, and the first choice cannot be another"
    assert Depth(blocks=4, alike=(0, 1, 2, 3), protect_first=0, protect_last=0).candidates == (1, 2, 3)


def test_choices_of_one_round_do_not_exclude_each_other() -> None:
    depth = Depth(blocks=8, alike=tuple(range(8)), protect_first=1, protect_last=1)
    cost = {1: 0.5, 2: 0.2, 3: 0.1, 4: 0.4, 5: 0.3, 6: 0.6}
    assert picked(cost, depth, {}, 1, 3) == [3]
    assert picked(cost, depth, {}, 2, 3) == [3, 5], "2 is the anchor of 3"
    assert picked(cost, depth, {}, 3, 3) == [3, 5, 1], "4 is the anchor of 5, and was measured on 3, which follows"
    still, chosen = 6, dict[int, int]()
    while still:
        for block in picked(cost, depth, chosen, 2, still):
            chosen[block] = depth.allowed(chosen, still)[block]
            still -= 1
    assert sorted(chosen) == [1, 2, 3, 4, 5, 6], "every candidate follows where that is asked for"
    assert set(chosen.values()) == {0}


PHI = [(8192, 3072), (8192, 3072), (3072, 8192)]
PARAMETERS = 3_821_079_552


@pytest.mark.parametrize(
    ("rank", "delta", "saved", "for_12", "for_24"),
    [
        (32, 1.08, 74.4, 6.2, 12.3),
        (64, 2.16, 73.3, 6.3, 12.5),
        (100, 3.38, 72.1, 6.4, 12.7),
        (128, 4.33, 71.2, 6.4, 12.9),
        (256, 8.65, 66.8, 6.9, 13.7),
    ],
)
def test_the_arithmetic_of_phi_follows_from_shapes(
    rank: int, delta: float, saved: float, for_12: float, for_24: float
) -> None:
    assert saving(PHI, 0) / 1e6 == pytest.approx(75.5, abs=0.05)
    assert (saving(PHI, 0) - saving(PHI, rank)) / 1e6 == pytest.approx(delta, abs=0.005)
    assert saving(PHI, rank) / 1e6 == pytest.approx(saved, abs=0.05)
    assert 0.12 * PARAMETERS / saving(PHI, rank) == pytest.approx(for_12, abs=0.06)
    assert 0.24 * PARAMETERS / saving(PHI, rank) == pytest.approx(for_24, abs=0.06)
    depth = Depth(blocks=32, alike=tuple(range(32)), protect_first=2, protect_last=2)
    for target, count in ((0.12, 7), (0.24, 13 if rank < 256 else 14)):
        found = budget(PHI, PARAMETERS, depth, target=target, followers=None, rank=rank)
        assert found.followers == count
        assert found.rank >= rank
        assert found.followers * saving(PHI, found.rank) >= target * PARAMETERS
        assert found.followers * saving(PHI, found.rank + 1) < target * PARAMETERS


def test_the_estimate_reads_phi_from_its_config() -> None:
    config = {
        **{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "tie_word_embeddings": False},
    }
    model = Model(config=config, parameters=PARAMETERS, weight_bytes=2 * PARAMETERS, size_bytes=2 * PARAMETERS)
    found = estimate(DeltaLLMConfig(), Inputs(variant=model))
    assert found.exact
    assert found.result_bytes == pytest.approx(0.88 * model.weight_bytes, rel=0.002)


def test_a_matrix_becomes_the_product_that_is_nearest_to_it() -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in ((12, 20), (20, 12), (15, 15)):
        matrix = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(matrix.double())
        for rank in (1, 5, 11):
            a, b = truncated(matrix, rank)
            error = float((matrix.double() - b.double() @ a.double()).square().sum())
            assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-5)
            torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-4, atol=1e-5)
        a, b = truncated(matrix, 16)
        torch.testing.assert_close(b @ a, matrix, rtol=1e-4, atol=1e-5)
    a, b = truncated(torch.zeros(4, 6), 2)
    assert float((b @ a).abs().sum()) == 0


def test_a_large_matrix_is_decomposed_at_random_by_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    decaying = torch.randn((60, 40), generator=generator) * 0.8 ** torch.arange(40)
    exact = truncated(decaying, 6)
    monkeypatch.setattr("compression_worker.quantization.low_rank.EXACT_SIDE", 16)
    before = torch.random.get_rng_state()
    a, b = truncated(decaying, 6, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's random numbers are touched"
    torch.testing.assert_close(b @ a, exact[1] @ exact[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(truncated(decaying, 6, seed=5)[0], a)


def starts(student: Student, block: int, anchor: int, rank: int) -> dict[str, Any]:
    return {
        one.name: truncated(weight_of(student, one) - weight_of(student, other), rank)
        for one, other in student.shareable.pairs({block: anchor})
    }


def weight_of(student: Student, matrix: SharedMatrix) -> torch.Tensor:
    weight: torch.Tensor = student.linear(matrix).weight.detach()
    return weight.T if matrix.linear.transposed else weight


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_at_full_rank_the_model_is_what_it_was(family: str, tmp_path: Path) -> None:
    student = Job(tmp_path, make_family_pair(tmp_path, family)[0]).student(("mlp", "attention"))
    teacher = logits(student.model)
    student.put(1, 0, starts(student, 1, 0, 96))
    assert {kind for _, kind in student.switches} == {"mlp", "attention"}
    torch.testing.assert_close(logits(student.model), teacher, rtol=1e-4, atol=1e-4)


def test_a_module_that_goes_its_old_way_is_the_teacher_to_the_bit_and_the_new_way_needs_no_old_weight(job: Job) -> None:
    student = job.student()
    teacher = logits(student.model)
    student.put(3, 2, starts(student, 3, 2, 4))
    assert not torch.equal(logits(student.model), teacher)
    student.share([])
    assert torch.equal(logits(student.model), teacher)
    student.share([3])
    shared = logits(student.model)
    for follower in student.followers.values():
        follower.original.weight.data.fill_(float("nan"))
    assert torch.equal(logits(student.model), shared)
    student.share([])
    assert logits(student.model).isnan().any()


def test_every_candidate_is_measured_as_if_the_whole_model_ran(job: Job) -> None:
    made = job.run(groups="", followers=2, picks_per_round=1)
    first, second = made.sharing["rounds"]
    assert {int(block): anchor for block, (anchor, _) in first["kl"].items()} == {1: 0, 2: 1, 3: 2, 4: 3}
    assert first["chosen"] == [int(min(first["kl"], key=lambda block: first["kl"][block][1]))]
    chosen = first["chosen"][0]
    assert chosen not in map(int, second["kl"])
    assert first["kl"][str(chosen)][0] not in map(int, second["kl"])
    student, known, windows = job.student(), *stored_answers(job)
    for block, (anchor, kl) in first["kl"].items():
        student.put(int(block), anchor, halved(starts(student, int(block), anchor, 4)))
        student.share([int(block)])
        with torch.no_grad():
            found = [float(student.judged(windows[at : at + 1], known(at)).kl) for at in range(2)]
        assert sum(found) / 2 == pytest.approx(kl, rel=1e-5)


def halved(factors: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(one.half() for one in pair) for name, pair in factors.items()}


def stored_answers(job: Job) -> tuple[Callable[[int], Any], torch.Tensor]:
    """What the teacher answered on the windows that candidates are measured by, and those windows."""
    runner, digests = Runner(store=job.store, device="cpu"), list[str]()
    for step in job.planned(groups="", followers=2, picks_per_round=1).steps[:3]:
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, digests), seed=step.seed)
        digests.append(runner.compute(spec, lambda event: None)[0])
    context = StepContext(
        store=job.store,
        spec=StepSpec(kind="deltallm.choose", inputs={"text": digests[0], "teacher": digests[2]}),
        progress=lambda done, total, unit: None,
        log=lambda text, level: None,
        measure=lambda name, value: None,
    )
    teacher = read_logits(context, "teacher")
    return lambda at: teacher.at(slice(at, at + 1), "cpu"), read_windows(context, TRAINED)


def test_a_group_is_chosen_by_hand_and_its_cost_is_measured(made: Made) -> None:
    assert made.sharing["groups"] == {"1": [2, 3]}
    assert made.sharing["rounds"] == []
    assert made.sharing["kl_before_training"] > 0
    table = made.artifact.manifest["tensors"]
    shared = {name: entry["anchor"] for name, entry in table.items() if entry["kind"] == "shared"}
    assert len(shared) == 6
    assert shared["model.layers.3.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"


def test_what_is_stored_is_the_checkpoint_less_what_is_shared(made: Made) -> None:
    source = load_file(made.job.model / "model.safetensors")
    raw = load_file(made.artifact.paths["raw.safetensors"])
    shared = {name for name, entry in made.artifact.manifest["tensors"].items() if entry["kind"] == "shared"}
    assert raw.keys() == source.keys() - shared
    assert all(torch.equal(tensor, source[name]) for name, tensor in raw.items()), "anchors too, to the bit"
    deltas = load_file(made.artifact.paths[DELTAS_FILE])
    assert deltas.keys() == {key for name in shared for key in keys(name, "low_rank")}
    count = sum(tensor.numel() for tensor in (*raw.values(), *deltas.values()))
    before = sum(tensor.numel() for tensor in source.values())
    assert made.sharing["parameters"] == {
        "before": before,
        "after": count,
        "reduction": pytest.approx(1 - count / before, rel=1e-5),
    }


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_memory_holds_each_anchor_once(made: Made, dtype: torch.dtype | None) -> None:
    model = load_model(None, made.artifact, "cpu", dtype)
    dense = load_model(None, made.artifact, "cpu", dtype, dense=True)
    reduction = made.sharing["parameters"]["reduction"]
    assert storage(model) <= storage(dense) * (1 - 0.99 * reduction)
    if dtype is None:
        assert storage(model) == pytest.approx(storage(dense) * (1 - reduction), rel=0.01)
    torch.testing.assert_close(logits(model).float(), logits(dense).float(), rtol=0.05, atol=0.05)
    layer: Any = model.get_submodule("model.layers.3.mlp.up_proj")
    assert isinstance(layer, SharedLinear)
    assert layer.anchor is model.get_submodule("model.layers.1.mlp.up_proj")
    assert not any("layers.3.mlp" in name and name.endswith("weight") for name in model.state_dict())
    moved = model.to(torch.float64)
    assert moved.get_submodule("model.layers.3.mlp.up_proj").anchor.weight.dtype == torch.float64
    assert logits(moved).isfinite().all()


def storage(model: Any) -> int:
    """Bytes of distinct memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def test_restored_it_is_a_plain_model_that_answers_alike(made: Made, tmp_path: Path) -> None:
    artifacts.restore(None, made.artifact, tmp_path / "model", lambda done, total, unit: None)
    plain = load_folder(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(
        logits(plain), logits(load_model(None, made.artifact, "cpu", torch.float32)), rtol=0.02, atol=0.02
    )


def test_sharing_saves_no_arithmetic_and_says_so(made: Made) -> None:
    said = made.sharing["operations"]
    counted = {}
    for name, model in (
        ("before", load_folder(made.job.model, dtype=torch.float32)),
        ("after", load_model(None, made.artifact, "cpu", torch.float32)),
    ):
        with FlopCounterMode(display=False) as counter:
            logits(model)
        per_operation = counter.get_flop_counts()["Global"]
        counted[name] = sum(flops for one, flops in per_operation.items() if str(one) in ("aten.mm", "aten.addmm"))
    assert said == {name: flops // TOKENS.numel() for name, flops in counted.items()}
    assert said["after"] > said["before"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_tied(tied: bool, tmp_path: Path) -> None:
    job = Job(tmp_path, make_tiny_pair(tmp_path, tied=tied, layers=4)[0])
    made = job.run(groups="1:2")
    model: Any = load_model(None, made.artifact)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    with FlopCounterMode(display=False) as counter:
        logits(load_model(None, made.artifact, "cpu", torch.float32))
    flops = counter.get_flop_counts()["Global"]
    products = sum(count for one, count in flops.items() if str(one) in ("aten.mm", "aten.addmm"))
    assert made.sharing["operations"]["after"] == products // TOKENS.numel()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": "1:9"}, "there is no block 9: the model has 6, from 0 to 5"),
        ({"groups": "1:2", "rank": 64}, "highest rank that saves anything is 42"),
        ({"groups": "1:2", "rank": 500}, "has 64 rows or columns only"),
        ({"groups": "1:2", "rank": 43}, "would not become smaller; the highest rank that saves anything is 42"),
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


def test_a_target_is_met(job: Job) -> None:
    made = job.run(target_reduction=0.1)
    assert 0.1 <= made.sharing["parameters"]["reduction"] < 0.11
    assert made.sharing["rank"] > 4
    assert made.sharing["rank"] <= highest_rank([(128, 64)])


@pytest.mark.parametrize(
    "settings",
    [
        {"groups": "1:2,3"},
        {"followers": 3},
        {"followers": 2, "start": "svd_covariance"},
        {**LEARNING, "epochs": 2},
        {**LEARNING, "base_method": "gptq"},
        {**LEARNING, "share_form": "sign"},
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


def test_rounds_come_to_all_followers() -> None:
    assert rounds(7, 2) == [2, 2, 2, 1]
    assert rounds(2, 5) == [2]


def test_a_follower_shows_what_it_is_made_of(job: Job) -> None:
    student = job.student()
    student.put(3, 2, starts(student, 3, 2, 4))
    follower = student.followers["model.layers.3.mlp.up_proj.weight"]
    assert isinstance(follower, Follower)
    assert "rank=4" in repr(follower)


def test_probabilities_rise_in_a_line_and_end_in_a_phase_of_certainty() -> None:
    config = DeltaLLMConfig(p0=0.2, final_share=0.25)
    found = [probability(config, step, 8) for step in range(8)]
    assert found == pytest.approx([0.2 + 0.8 * step / 6 for step in range(6)] + [1.0, 1.0])
    steep = DeltaLLMConfig(p0=0.2, slope=0.5, final_share=0.25)
    assert [probability(steep, step, 8) for step in range(4)] == pytest.approx([0.2, 0.7, 1.0, 1.0])
    assert {probability(DeltaLLMConfig(replacement="none"), step, 8) for step in range(8)} == {1.0}


def test_draws_depend_on_seed_step_and_place_alone() -> None:
    places = [
        (seed, step, block, kind) for seed in range(5) for step in range(100) for block in (3, 4) for kind in "ma"
    ]
    draws = [drawn(*place, 0.3) for place in places]
    assert draws == [drawn(*place, 0.3) for place in places]
    assert sum(draws) / len(draws) == pytest.approx(0.3, abs=0.04)
    assert all(drawn(*place, 1.0) for place in places)
    assert not any(drawn(*place, 0.0) for place in places)
    more = [drawn(*place, 0.6) for place in places]
    assert all(later for earlier, later in zip(draws, more, strict=True) if earlier), "no module goes back as p rises"


def test_modules_are_replaced_one_by_one(job: Job) -> None:
    student = job.student(("mlp", "attention"))
    for block in (2, 3):
        student.put(block, 1, starts(student, block, 1, 4))
    config = DeltaLLMConfig(modules="mlp_attention", p0=0.5, final_share=0.5)
    seen = set()
    for step in range(20):
        replace_modules(student, config, 3, step, 40)
        seen.add(tuple(switch.new for switch in student.switches.values()))
    assert len(seen) > 4, "MLP and attention of either block draw by themselves"
    replace_modules(student, config, 3, 20, 40)
    assert all(switch.new for switch in student.switches.values())


def test_gradients_reach_the_factors_of_modules_that_go_the_new_way_alone(job: Job) -> None:
    student = job.student()
    for block in (2, 3):
        student.put(block, 1, starts(student, block, 1, 4))
    for parameter in student.factors.values():
        parameter.requires_grad_(True)
    student.share([3])
    student.judged(TOKENS, None).loss.backward()
    reached = {name for name, parameter in student.model.named_parameters() if parameter.grad is not None}
    assert reached == {
        f"model.layers.3.mlp.{side}_proj.shared.difference.{factor}"
        for side in ("gate", "up", "down")
        for factor in "AB"
    }
    student.share([])
    assert not student.judged(TOKENS, None).loss.requires_grad


@pytest.mark.parametrize("settings", [{}, {"epochs": 2, "modules": "mlp_attention"}, {"replacement": "none"}])
def test_a_run_in_small_chunks_gives_the_bytes_of_one_in_one_go(job: Job, settings: Json) -> None:
    one, many = job.run(**LEARNING | settings), job.run(chunk_tokens=32, **LEARNING | settings)
    assert one.output.blobs[DELTAS_FILE] == many.output.blobs[DELTAS_FILE]
    assert one.training["losses"] == many.training["losses"]
    assert one.training["kl_after"] == many.training["kl_after"]
    assert len(many.training["curve"]) > len(one.training["curve"]) == 1 + settings.get("epochs", 1)


class Killed(Exception):
    pass


def test_a_job_that_is_killed_at_twenty_places_ends_with_the_same_bytes(job: Job) -> None:
    settings = {**LEARNING, "groups": "", "followers": 2, "picks_per_round": 1, "chunk_tokens": 64}
    whole = job.run(**settings)
    generator = random.Random(11)
    digests: list[str] = []
    deaths = 0
    steps = job.planned(**settings).steps
    training = [at for at, step in enumerate(steps) if step.kind == "deltallm.train"]
    doomed = generator.choices(range(1, len(steps)), k=8) + generator.choices(training, k=12)
    for at, step in enumerate(steps):
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, digests), seed=step.seed)
        for _ in range(doomed.count(at)):
            with pytest.raises(Killed):
                speaking(job, spec, generator.randrange(speaking(job, spec, None)))
            deaths += 1
        digests.append(Runner(store=job.store, device="cpu").compute(spec, lambda event: None)[0])
    assert deaths == 20
    output = StepOutput.from_bytes(job.store.read_bytes(digests[-1]))
    assert output.blobs == whole.output.blobs


def speaking(job: Job, spec: StepSpec, dies_at: int | None) -> int:
    """Compute a step; how often it spoke of progress. It dies when it speaks for the time ``dies_at``, from 0."""
    spoken = 0

    def speak(done: int, total: int, unit: str) -> None:
        nonlocal spoken
        if spoken == dies_at:
            raise Killed
        spoken += 1

    def nothing(*words: object) -> None:
        pass

    catalog.step_function(spec.kind)(
        StepContext(store=job.store, spec=spec, progress=speak, log=nothing, measure=nothing)
    )
    return spoken


def test_training_brings_the_model_nearer_to_what_it_was(job: Job) -> None:
    made = job.run(**LEARNING | {"tokens": 1024, "learning_rate": 3e-3})
    training = made.training
    assert training["tokens"] == 1024
    assert len(training["losses"]) == len(training["probabilities"]) == 32
    assert training["probabilities"][0] == 0.2
    assert training["kl_fell"]
    assert training["kl_after"] < 0.95 * training["kl_before"] == made.sharing["kl_before_training"] * 0.95
    source, raw = load_file(job.model / "model.safetensors"), load_file(made.artifact.paths["raw.safetensors"])
    assert all(torch.equal(tensor, source[name]) for name, tensor in raw.items()), "nothing but the factors has learned"


def test_what_is_measured_last_is_what_is_shipped(job: Job) -> None:
    made = job.run(**LEARNING)
    assert shipped(job, made, LEARNING) == pytest.approx(made.training["kl_after"], rel=1e-5)


def shipped(job: Job, made: Made, settings: Json) -> float:
    """The divergence of the artifact's own model on held-out text."""
    model: Any = load_model(None, made.artifact, "cpu", torch.float32)
    runner, digests = Runner(store=job.store, device="cpu"), list[str]()
    for step in job.planned(**settings).steps[:2]:
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, digests), seed=step.seed)
        digests.append(runner.compute(spec, lambda event: None)[0])
    context = StepContext(
        store=job.store,
        spec=StepSpec(kind="deltallm.train", inputs={"text": digests[0], "held_out": digests[1]}),
        progress=lambda done, total, unit: None,
        log=lambda text, level: None,
        measure=lambda name, value: None,
    )
    layers = shareable(job.checkpoint.manifest["config"], architecture_of(job.checkpoint), ("mlp",))
    kl: float = HeldOut(context).measured(Student(model, layers, "cpu"), 0, "shipped")["kl"]
    return kl


def test_a_plain_distillation_lets_the_old_weights_go(job: Job) -> None:
    student = job.student()
    student.put(3, 2, starts(student, 3, 2, 4))
    shared = logits(student.model)
    student.forget()
    assert torch.equal(logits(student.model), shared)
    with pytest.raises(IndexError):
        _ = student.followers["model.layers.3.mlp.up_proj.weight"].original


def test_a_factor_that_fp16_cannot_hold_is_refused(job: Job) -> None:
    student = job.student()
    student.put(3, 2, starts(student, 3, 2, 4))
    next(iter(student.factors.values())).data.fill_(1e6)
    with pytest.raises(CompressionError, match="set delta_dtype=bfloat16"):
        round_factors(student, DeltaLLMConfig())
    round_factors(student, DeltaLLMConfig(delta_dtype="bfloat16"))


QUANTIZED: Json = {"groups": "1:2,3", "num_bits": 4, "samples": 4, "length": 32}


@pytest.mark.parametrize(("base_method", "modules"), [*((name, "mlp") for name in BASES), ("gptq", "mlp_attention")])
def test_anchors_in_codes_are_the_base_s_own_and_followers_have_none(job: Job, base_method: str, modules: str) -> None:
    made = job.run(**QUANTIZED, base_method=base_method, modules=modules)
    config = DeltaLLMConfig(**QUICK | QUANTIZED, base_method=base_method).base_config()
    spec = StepSpec(kind=f"{base_method}.plan", params={"config": asdict(config)}, inputs=job.inputs, seed=3)
    alone = Artifact.open_store(job.store, run_plan(job.store, spec, device="cpu").data["artifact"])
    table = made.artifact.manifest["tensors"]
    shared = {name for name, entry in table.items() if entry["kind"] == "shared"}
    assert len(shared) == (6 if modules == "mlp" else 14)
    assert {n: one for n, one in table.items() if n not in shared} == {
        n: one for n, one in alone.manifest["tensors"].items() if n not in shared
    }
    ours, theirs = codes_of(made.artifact), codes_of(alone)
    begins = tuple(start for name in shared for start in (name.removesuffix("weight"), f"{name}#"))
    assert ours.keys() == {name for name in theirs if not name.startswith(begins)}
    assert len(ours) < len(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    sizes = {name: entry["size"] for name, entry in made.artifact.manifest["files"].items()}
    assert sum(part["bytes"] for part in made.artifact.parts) == sum(sizes.values()) + made.artifact.manifest_bytes
    assert made.artifact.problems() == []

    full = load_model(None, made.artifact, "cpu", torch.float32)
    dense = load_model(None, made.artifact, "cpu", torch.float32, dense=True)
    torch.testing.assert_close(logits(dense), logits(full), rtol=1e-4, atol=1e-4)
    packed: Any = load_packed(made.artifact, "cpu", torch.float32)
    torch.testing.assert_close(logits(packed), logits(full), rtol=1e-4, atol=1e-4)
    layer = packed.get_submodule("model.layers.3.mlp.up_proj")
    assert isinstance(layer, SharedLinear)
    assert layer.anchor is packed.get_submodule("model.layers.1.mlp.up_proj")
    assert storage(packed) < storage(full) * 0.7


def codes_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file, path in artifact.paths.items():
        if file.startswith("codes-"):
            found |= load_file(path)
    return found


def test_a_difference_mends_what_quantization_lost_of_the_anchor(job: Job) -> None:
    """At nearly full rank a follower is nearer to its own weight than its own codes were."""
    made = job.run(**QUANTIZED | {"num_bits": 2}, base_method="gptq", rank=40)
    matrices = {line["name"]: line for line in made.artifact.manifest["figures"]["matrices"]}
    follower, anchor = (matrices[f"model.layers.{block}.mlp.up_proj.weight"] for block in (2, 1))
    assert follower["coding"] == "rank 40 on 'model.layers.1.mlp.up_proj.weight'"
    assert follower["relative_error"] < anchor["relative_error"]
    assert [point["phase"] for point in made.training["curve"]] == ["base", "start"]


def test_a_quantized_model_that_shares_learns(job: Job) -> None:
    settings = {**QUANTIZED, **LEARNING, "base_method": "gptq", "tokens": 512, "learning_rate": 3e-3}
    made = job.run(**settings)
    assert [point["phase"] for point in made.training["curve"]] == ["base", "start", "train"]
    assert made.training["kl_after"] < made.training["kl_before"]
    again = job.run(**settings, chunk_tokens=64)
    assert again.output.blobs[DELTAS_FILE] == made.output.blobs[DELTAS_FILE]


def test_hessians_of_a_base_are_used_again(job: Job) -> None:
    kinds = [step.kind for step in job.planned(**QUANTIZED, base_method="quip_sharp", start="svd_covariance").steps]
    assert "quip_sharp.assemble" in kinds
    assert "calibration.hessians" in kinds
    assert kinds.count("calibration.tokens") == 1


def test_a_bias_of_an_anchor_is_not_its_followers(job: Job) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((3, 8), generator=generator)
    plain = torch.nn.Linear(8, 6)
    torch.testing.assert_close(without_bias(plain, x), x @ plain.weight.T)

    class Packed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", plain.weight.detach().clone())
            self.bias = torch.nn.Parameter(torch.ones(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.codes.T
            return y if self.bias is None else y + self.bias

    packed = Packed()
    torch.testing.assert_close(without_bias(packed, x), x @ plain.weight.T)
    assert packed.bias is not None
    torch.testing.assert_close(packed(x), x @ plain.weight.T + 1)


@pytest.mark.parametrize("settings", [{"groups": "1:2,3"}, {**QUANTIZED, "base_method": "quip_sharp"}])
def test_transformers_loads_the_folder_with_shared_weights(job: Job, settings: Json, tmp_path: Path) -> None:
    made = job.run(**settings)
    artifacts.write_folder(tmp_path / "artifact", job.store, made.output.blobs)
    code = f"""
import compression_worker, torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained({str(tmp_path / "artifact")!r}, dtype=torch.float32, output_loading_info=True)
assert not any(report[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
layer = model.get_submodule("model.layers.3.mlp.up_proj")
assert layer.anchor is model.get_submodule("model.layers.1.mlp.up_proj")
torch.save(model(torch.arange(40, 60).view(1, 20), use_cache=False).logits.detach(), {str(tmp_path / "logits")!r})
model.generate(torch.arange(40, 44).view(1, 4), max_new_tokens=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = logits(load_model(None, made.artifact, "cpu", torch.float32))
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=1e-5, atol=1e-5)
    (tmp_path / "artifact" / DELTAS_FILE).write_bytes(b"damaged")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"'{DELTAS_FILE}' has 7 bytes" in done.stderr


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_merged_into_what_is_not_shared(family: str, tmp_path: Path) -> None:
    folder = make_family_pair(tmp_path, family, dtype=torch.float32)[0]
    job = Job(tmp_path, folder)
    settings = {**LEARNING, "groups": "0:1", "rank": 2, "train": "deltas_lora", "lora_rank": 2, "learning_rate": 3e-3}
    made = job.run(**settings, delta_dtype="float32")
    source, raw = load_file(folder / "model.safetensors"), load_file(made.artifact.paths["raw.safetensors"])
    changed = {name for name, tensor in raw.items() if not torch.equal(tensor, source[name])}
    attention = "self_attn" if family == "llama" else "attn.c"
    assert changed == {name for name in raw if attention in name and name.endswith("weight")}, "no anchor, no norm"
    assert made.training["kl_after"] < made.training["kl_before"]
    matrices = {line["name"]: line for line in made.artifact.manifest["figures"]["matrices"]}
    assert {name for name, line in matrices.items() if line["coding"] == "whole, tuned"} == changed
    assert all(0 < matrices[name]["relative_error"] < 1 for name in changed)
    assert shipped(job, made, settings) == pytest.approx(made.training["kl_after"], rel=1e-3)
    again = job.run(**settings, delta_dtype="float32", chunk_tokens=64)
    assert again.output.blobs["raw.safetensors"] == made.output.blobs["raw.safetensors"]


def test_hidden_states_come_near_to_those_of_the_old_way(job: Job) -> None:
    student, config = job.student(), DeltaLLMConfig(hidden_weight=10.0)
    for block in (2, 3):
        student.put(block, 1, starts(student, block, 1, 4))
    known = TopLogits.of(logits(student.model)[:, :-1], 16)
    plain = DeltaLLMConfig()
    ways = [(0.0, []), (1.0, [3]), (2.0, [2, 3])]
    more = []
    for _, blocks in ways:
        student.share(blocks)
        more.append(float(loss_of(student, TOKENS, known, config) - loss_of(student, TOKENS, known, plain)))
        assert [switch.new for switch in student.switches.values()] == [block in blocks for block in (2, 3)]
    assert more[0] == 0
    assert 0 < more[1] < more[2]
    with torch.no_grad():
        student.share([])
        _, old = student.hidden(TOKENS)
        student.share([3])
        _, new = student.hidden(TOKENS)
    assert more[1] == pytest.approx(10 * float((new[3] - old[3]).square().mean()) / 2, rel=1e-3)
    assert job.run(**LEARNING, hidden_weight=1.0).training["losses"] != job.run(**LEARNING).training["losses"]


def test_a_difference_of_signs_is_the_best_multiple_of_them() -> None:
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn((6, 40), generator=generator)
    pieces = signs_of(delta)
    made = dense(pieces, 40)
    assert set(made.abs().flatten().tolist()) == {float(pieces[1])}
    assert torch.equal(made.sign(), torch.where(delta >= 0, 1.0, -1.0))
    for factor in (0.9, 1.1):
        assert (delta - factor * made).square().sum() > (delta - made).square().sum()
    x = torch.randn((2, 3, 40), generator=generator)
    torch.testing.assert_close(difference(pieces)(x), x @ made.T)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_differences_may_be_signs_whose_scales_learn(family: str, tmp_path: Path) -> None:
    job = Job(tmp_path, make_family_pair(tmp_path, family)[0])
    settings = {**LEARNING, "groups": "0:1", "share_form": "sign", "learning_rate": 3e-3}
    made = job.run(**settings)
    table = made.artifact.manifest["tensors"]
    shared = {name: entry for name, entry in table.items() if entry["kind"] == "shared"}
    stored = load_file(made.artifact.paths[DELTAS_FILE])
    assert stored.keys() == {key for name in shared for key in keys(name, "sign")}
    parts = {part["name"]: part["bytes"] for part in made.artifact.parts}
    assert parts["deltas"] == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    begun = job.run(**settings | {"tokens": 0})
    first = load_file(begun.artifact.paths[DELTAS_FILE])
    for name in shared:
        signs, scale = keys(name, "sign")
        assert torch.equal(stored[signs], first[signs])
        assert not torch.equal(stored[scale], first[scale])
    assert made.training["kl_after"] < made.training["kl_before"]
    assert shipped(job, made, settings) == pytest.approx(made.training["kl_after"], rel=1e-4)
    model, whole = (load_model(None, made.artifact, "cpu", torch.float32, dense=one) for one in (False, True))
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-4)
    assert made.sharing["operations"]["after"] > made.sharing["operations"]["before"]
    again = job.run(**settings, chunk_tokens=64)
    assert again.output.blobs[DELTAS_FILE] == made.output.blobs[DELTAS_FILE]
