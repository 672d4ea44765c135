"""Layers that share weights: exact starts, one copy in memory, anchors in codes, and what is promised of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression_worker import artifact as artifacts
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import load_folder
from compression_worker.contracts import Json, StepContext, StepSpec
from compression_worker.methods.deltallm.compress import load_model, load_packed
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.layout import DELTAS_FILE, keys
from compression_worker.methods.deltallm.shared import Follower, SharedLinear, without_bias
from compression_worker.quantization.bases import BASES
from compression_worker.quantization.low_rank import truncated
from compression_worker.quantization.teacher import TRAINED, read_logits, read_windows
from compression_worker.runner import Runner, resolve_inputs, run_plan
from tests.benchmarks.bench_shared_memory import FORMS, child
from tests.compression_worker.methods.sharing import (
    LAYERS,
    LEARNING,
    QUANTIZED,
    QUICK,
    Job,
    Made,
    logits,
    operations,
    six_layers,
    starts,
)
from tests.families import make_family_pair
from tests.tiny import make_tiny_pair


@pytest.fixture(scope="module", name="job")
def fixture_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return six_layers(tmp_path_factory.mktemp("deltallm"))


@pytest.fixture(scope="module", name="made")
def fixture_made(job: Job) -> Made:
    return job.run(groups="1:2,3")


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


def test_a_process_that_writes_holds_less_by_what_is_shared(tmp_path: Path) -> None:
    job = Job(tmp_path, make_tiny_pair(tmp_path, tied=False, layers=LAYERS, hidden=1024)[0])
    made = job.run(groups="1:2,3,4", followers=None)
    folder = tmp_path / "artifact"
    artifacts.write_folder(folder, job.store, made.output.blobs)
    shared, dense = (child(folder, form, 8)["bytes"] for form in FORMS)
    assert dense > storage(load_model(None, made.artifact, "cpu", torch.float32, dense=True))
    assert shared <= dense * (1 - 0.9 * made.sharing["parameters"]["reduction"])


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
    assert said == {
        "before": operations(load_folder(made.job.model, dtype=torch.float32)),
        "after": operations(load_model(None, made.artifact, "cpu", torch.float32)),
    }
    assert said["after"] > said["before"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_stays_tied(tied: bool, tmp_path: Path) -> None:
    job = Job(tmp_path, make_tiny_pair(tmp_path, tied=tied, layers=4)[0])
    made = job.run(groups="1:2")
    model: Any = load_model(None, made.artifact)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) is tied
    counted = operations(load_model(None, made.artifact, "cpu", torch.float32))
    assert made.sharing["operations"]["after"] == counted


def test_a_sweep_of_the_rank_measures_what_a_job_of_that_rank_would_begin_with(job: Job) -> None:
    whole = job.run(groups="1:2,3", rank=16)
    points = {point["rank"]: point for point in whole.sharing["ranks"]}
    assert list(points) == [0, 1, 2, 4, 8, 16]
    assert points[16]["kl"] == whole.sharing["kl_before_training"]
    lower = job.run(groups="1:2,3", rank=4)
    assert points[4]["kl"] == pytest.approx(lower.sharing["kl_before_training"], rel=1e-3)
    assert points[4]["parameters"] == lower.sharing["parameters"]["after"]
    assert points[0]["parameters"] < points[4]["parameters"] < points[16]["parameters"]
    for settings in ({"start": "zero"}, {"share_form": "sign"}):
        assert "ranks" not in job.run(groups="1:2,3", **settings).sharing


def test_a_follower_shows_what_it_is_made_of(job: Job) -> None:
    student = job.student()
    student.put(3, 2, starts(student, 3, 2, 4))
    follower = student.followers["model.layers.3.mlp.up_proj.weight"]
    assert isinstance(follower, Follower)
    assert "rank=4" in repr(follower)


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
