"""Adapters on a packed base: exact gradients, nothing dense in memory, and a model that comes nearer to its teacher."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from compression_worker import artifact as artifacts
from compression_worker.adapters import CONFIG_FILE, WEIGHTS_FILE
from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec, canonical_json, sha256
from compression_worker.making.beneath import implementation
from compression_worker.methods.int21 import packed_base
from compression_worker.methods.int21.compress import load_model, load_packed
from compression_worker.methods.int21.config import Int21Config
from compression_worker.methods.int21.estimate import estimate, training_peaks
from compression_worker.methods.int21.memory import adapter_parameters
from compression_worker.methods.int21.overhead import overhead
from compression_worker.methods.int21.training import STATE_FILE, Student
from compression_worker.preflight import Inputs, Model
from compression_worker.quantization import lora
from compression_worker.quantization.bases import BASES
from compression_worker.quantization.learning import rate_at
from compression_worker.quantization.low_rank import closed_form
from compression_worker.quantization.teacher import TopLogits
from compression_worker.runner import Runner, resolve_inputs, run_plan
from tests.compression_worker.methods import sharing
from tests.families import make_family_pair
from tests.tiny import make_tiny_pair

QUICK: Json = {
    "tokens": 128,
    "window_tokens": 16,
    "batch_size": 2,
    "held_out": 2,
    "samples": 4,
    "length": 32,
    "rank": 4,
    "teacher_logits": 16,
    "learning_rate": 1e-3,
}
TOKENS = torch.arange(40, 60).view(1, 20)


class Job(sharing.Job):
    """Plans of INT2.1."""

    def spec(self, **settings: Any) -> StepSpec:
        return StepSpec(kind="int21.plan", params={"config": QUICK | settings}, inputs=self.inputs, seed=3)

    def run(self, **settings: Any) -> Made:
        events: list[Json] = []
        output = run_plan(self.store, self.spec(**settings), events.append, device="cpu")
        return Made(self, output, [event["text"] for event in events if event["type"] == "log"])


class Made(sharing.Made):
    """What came of it, and what it said meanwhile."""

    def __init__(self, job: Job, output: StepOutput, logs: list[str]) -> None:
        super().__init__(job, output)
        self.logs = logs

    def folder(self, out: Path) -> Path:
        artifacts.write_folder(out, self.job.store, self.output.blobs)
        return out


@pytest.fixture(scope="module", name="job")
def fixture_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("int21")
    return Job(folder, make_tiny_pair(folder, tied=False)[0])


@pytest.fixture(scope="module", name="made")
def fixture_made(job: Job) -> Made:
    return job.run()


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


def student_of(artifact: Artifact, **settings: Any) -> Student:
    return Student.on(packed_base.beneath(artifact), Int21Config(**QUICK | settings), "cpu")


EXACT = (1e-10, 1e-12)
"""Tolerances of a product in double; the lattice turns its inputs in float32 whatever they are."""


@pytest.mark.parametrize(
    ("base_method", "bits", "tolerances"),
    [*(("gptq", bits, EXACT) for bits in (2, 3, 4, 8)), *(("quip_sharp", bits, (1e-4, 1e-4)) for bits in (2, 3, 4))],
)
def test_gradients_are_those_of_a_dense_layer_in_double(
    job: Job, base_method: str, bits: int, tolerances: tuple[float, float]
) -> None:
    artifact = job.run(base_method=base_method, num_bits=bits).artifact
    student = student_of(artifact, base_method=base_method, num_bits=bits)
    path = "model.layers.1.mlp.down_proj"
    layer = dict(student.model.named_modules())[path]
    generator = torch.Generator().manual_seed(1)
    a, b = (factor for name, factor in student.factors.items() if f".{path}." in name)
    for factor in (a, b):
        factor.data = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
    x = torch.randn((5, layer.in_features), generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn((5, layer.out_features), generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x), (x, a, b), upstream)

    beneath = packed_base.beneath(artifact)
    with implementation(beneath).open_merged(None, beneath) as tensors:
        weight = tensors.tensor(f"{path}.weight", torch.float32).double()
    scale = layer.scaling[lora.ADAPTER]
    assert scale == 2.0
    theirs = torch.autograd.grad(x @ (weight + scale * b @ a).T, (x, a, b), upstream)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=tolerances[0], atol=tolerances[1] * float(other.abs().max()))


@pytest.mark.parametrize("base_method", BASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_as_large_as_a_weight_is_kept_for_the_backward_pass(
    job: Job, base_method: str, checkpointing: bool
) -> None:
    settings = {"base_method": base_method, "checkpointing": checkpointing}
    student = student_of(job.run(**settings).artifact, **settings)
    smallest = min(layer.in_features * layer.out_features for layer in student.model.modules() if is_adapted(layer))
    known = {tensor.data_ptr() for tensor in [*student.model.parameters(), *student.model.buffers()]}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    window = torch.arange(8).view(1, 8)  # so few tokens that no activation is as large as a weight
    teacher = TopLogits.of(torch.zeros(1, 7, 288), 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student.judged(window, teacher).loss.backward()
    assert kept
    assert max(kept) < 4 * smallest
    assert all(factor.grad is not None for factor in student.factors.values())
    assert all(tensor.grad is None for tensor in student.model.parameters() if not tensor.requires_grad)


def is_adapted(module: Any) -> bool:
    return isinstance(module, lora.PackedLora)


def test_memory_at_the_peak_is_foretold_within_a_tenth(tmp_path: Path) -> None:
    job = Job(tmp_path, make_tiny_pair(tmp_path, hidden=256, layers=4, vocab=2048)[0])
    for settings in (
        {"window_tokens": 128},
        {"window_tokens": 128, "checkpointing": False},
        {"window_tokens": 32, "rank": 32},
    ):
        check_peak(job, **{"tokens": 256, "held_out": 1, "batch_size": 2, "samples": 2} | settings)


def check_peak(job: Job, **settings: Any) -> None:
    artifact = job.run(**settings).artifact
    config = Int21Config(**QUICK | settings)
    foretold = artifact.manifest["figures"]["training"]["peak_bytes"]
    measured = peak_of_training(packed_base.beneath(artifact), config)
    assert measured == pytest.approx(foretold, rel=0.1), settings
    packed = sum(part["bytes"] for part in artifact.parts if part["name"] in ("codes", "scales"))
    model = Model(**checkpoint_sizes(job))
    again = training_peaks(config, model, packed, 4)
    assert again is not None
    assert again.packed == foretold
    assert again.packed < again.lora_fp32 < again.full_finetune


def checkpoint_sizes(job: Job) -> Json:
    manifest = json.loads(job.store.read_bytes(job.inputs["variant"]))
    return {name: manifest[name] for name in ("config", "parameters", "weight_bytes", "size_bytes")}


def peak_of_training(beneath: Artifact, config: Int21Config) -> int:
    """Bytes of tensors at the peak of the second training step: what stands before, and what the allocator is asked."""
    student = Student.on(beneath, config, "cpu")
    optimizer = torch.optim.AdamW(student.factors.values(), foreach=False)
    vocabulary = student.model.config.vocab_size
    windows = torch.randint(vocabulary, (config.batch_size, config.window_tokens))
    teacher = TopLogits.of(torch.zeros(config.batch_size, config.window_tokens - 1, vocabulary), 4).at(
        slice(None), "cpu"
    )

    def step() -> None:
        student.judged(windows, teacher).loss.backward()
        optimizer.step()

    step()
    standing = [*student.model.parameters(), *student.model.buffers(), *(f.grad for f in student.factors.values())]
    standing += [one for state in optimizer.state.values() for one in state.values()]
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in standing
        if tensor is not None
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in sorted(events, key=lambda one: one.start_ns()) if event.name() == "[memory]"]
    return sum(held.values()) + max(itertools.accumulate(changes))


@pytest.mark.parametrize("base_method", BASES)
def test_with_b_zero_it_answers_exactly_as_its_base(job: Job, base_method: str) -> None:
    artifact = job.run(base_method=base_method).artifact
    beneath = packed_base.beneath(artifact)
    alone = implementation(beneath).load_packed(beneath, "cpu", torch.float32)
    assert torch.equal(logits(student_of(artifact, base_method=base_method).model), logits(alone))


def test_training_leaves_the_base_as_it_was_bit_for_bit(job: Job, made: Made) -> None:
    plain = run_plan(
        job.store,
        StepSpec(
            kind="gptq.plan",
            params={"config": asdict(Int21Config(**QUICK).base_config())},
            inputs=job.inputs,
            seed=3,
        ),
        device="cpu",
    )
    ours = {
        name: digest for name, digest in made.output.blobs.items() if name in plain.blobs and name != "manifest.json"
    }
    assert ours == {name: digest for name, digest in plain.blobs.items() if name != "manifest.json"}
    assert made.output.blobs.keys() - plain.blobs.keys() == {CONFIG_FILE, WEIGHTS_FILE}
    student = student_of(made.artifact)
    before = {name: buffer.clone() for name, buffer in student.model.named_buffers()}
    optimizer = torch.optim.AdamW(student.factors.values(), lr=0.1)
    student.judged(TOKENS, None).loss.backward()
    optimizer.step()
    assert all(torch.equal(before[name], buffer) for name, buffer in student.model.named_buffers())
    assert not torch.equal(logits(student.model), logits(student_of(made.artifact).model))


def test_the_artifact_is_an_adapter_that_stock_peft_loads_on_the_base(made: Made, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = made.folder(tmp_path / "artifact")
    beneath = packed_base.beneath(made.artifact)
    dense = implementation(beneath).load_model(None, beneath, "cpu", torch.float32)
    stock = PeftModel.from_pretrained(dense, folder).eval()
    names = [name for name in dict(stock.named_modules()) if name.endswith("lora_A.default")]
    assert len(names) == 14, "every linear of both blocks, and no other"
    ours = load_model(None, Artifact.open_folder(folder), "cpu", torch.float32)
    torch.testing.assert_close(logits(stock), logits(ours), rtol=1e-4, atol=1e-5)
    with stock.disable_adapter():
        assert not torch.allclose(logits(stock), logits(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base_method", BASES)
@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_stock_peft_loads_it_on_other_families_too(family: str, base_method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = make_family_pair(tmp_path, family, dtype=torch.float32)[0]
    made = Job(tmp_path, model).run(base_method=base_method, num_bits=4)
    folder = made.folder(tmp_path / "artifact")
    beneath = packed_base.beneath(made.artifact)
    stock = PeftModel.from_pretrained(
        implementation(beneath).load_model(None, beneath, "cpu", torch.float32), folder
    ).eval()
    ours = load_model(None, made.artifact, "cpu", torch.float32)
    torch.testing.assert_close(logits(stock), logits(ours), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(load_packed(made.artifact, "cpu", torch.float32)), logits(ours), rtol=1e-4, atol=1e-4
    )


def test_an_adapter_for_another_base_is_refused(job: Job, made: Made, tmp_path: Path) -> None:
    folder, other = made.folder(tmp_path / "one"), job.run(num_bits=4).folder(tmp_path / "other")
    put(folder / WEIGHTS_FILE, (other / WEIGHTS_FILE).read_bytes())
    with pytest.raises(CompressionError, match="does not match its digest"):
        artifacts.load_model(None, Artifact.open_folder(folder))
    edit_manifest(folder, lambda value: value["files"].update({WEIGHTS_FILE: file_entry(folder / WEIGHTS_FILE)}))
    for load in (load_model_of, load_packed):
        with pytest.raises(CompressionError, match="trained on another packed base") as refused:
            load(Artifact.open_folder(folder))
        assert refused.value.code == "base_mismatch"


def test_a_base_that_was_exchanged_beneath_its_adapter_is_refused(made: Made, tmp_path: Path) -> None:
    folder = made.folder(tmp_path / "one")
    edit_manifest(folder, lambda value: next(iter(value["tensors"].values())).update({"sha256": "0" * 64}))
    with pytest.raises(CompressionError, match="trained on another packed base"):
        load_model_of(Artifact.open_folder(folder))


def load_model_of(artifact: Artifact) -> Any:
    return load_model(None, artifact, "cpu", torch.float32)


def file_entry(path: Path) -> Json:
    return {"sha256": sha256(path.read_bytes()), "size": path.stat().st_size}


def edit_manifest(folder: Path, change: Callable[[Json], object]) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    change(value)
    value.pop("self_sha256")
    put(folder / "manifest.json", canonical_json(value | {"self_sha256": sha256(canonical_json(value))}))


def put(path: Path, data: bytes) -> None:
    """Another file of that name: the old one may be a blob of the store by a second name."""
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("settings", [{}, {"objective": "both", "epochs": 2, "start": "closed_form"}])
def test_a_run_in_small_chunks_gives_the_bytes_of_one_in_one_go(job: Job, settings: Json) -> None:
    one, many = job.run(**settings), job.run(chunk_tokens=32, **settings)
    assert one.output.blobs[WEIGHTS_FILE] == many.output.blobs[WEIGHTS_FILE]
    assert one.training["losses"] == many.training["losses"]
    assert one.training["kl_after"] == many.training["kl_after"]
    assert len(many.training["curve"]) > len(one.training["curve"])


def test_a_chunk_that_was_lost_is_made_again_with_equal_bytes(job: Job) -> None:
    _, plan, _ = Runner(store=job.store, device="cpu").compute(job.spec(chunk_tokens=32), lambda event: None)
    digests: list[str] = []
    for step in plan.steps:
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, digests), seed=step.seed)
        found = {Runner(store=job.store, device="cpu").compute(spec, lambda event: None)[0] for _ in range(2)}
        assert len(found) == 1, step.name
        digests += found


@pytest.fixture(scope="module", name="demo")
def fixture_demo(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The small Llama that was really trained, on the text it was trained on."""
    text = Path("deploy/demo/data/shakespeare.txt").read_text().split("\n\n")[:1500]
    lines = b"".join(json.dumps({"text": one}).encode() + b"\n" for one in text)
    return Job(tmp_path_factory.mktemp("demo"), Path("deploy/demo/base"), lines)


LEARNING: Json = {
    **{"tokens": 4096, "window_tokens": 128, "batch_size": 2, "held_out": 6, "rank": 16, "learning_rate": 1e-3},
    **{"samples": 8, "length": 128, "teacher_logits": 128},
}


@pytest.mark.parametrize(
    ("base_method", "bits", "rate"),
    [("gptq", 2, 1e-3), ("gptq", 4, 2e-4), ("quip_sharp", 2, 1e-3)],
)
def test_error_correction_lowers_the_divergence_on_held_out_text(
    demo: Job, base_method: str, bits: int, rate: float
) -> None:
    settings = {"base_method": base_method, "num_bits": bits, "learning_rate": rate}
    training = demo.run(**LEARNING | settings).training
    assert training["kl_fell"]
    assert training["kl_after"] < (0.9 if bits == 2 else 0.99) * training["kl_before"]
    held = training["held_out_kl"]
    better = [before - after for before, after in zip(held["before"], held["after"], strict=True)]
    assert sum(one > 0 for one in better) >= 5, "of six windows"


def test_the_closed_form_starts_nearer_to_the_teacher_than_the_base(demo: Job) -> None:
    made = demo.run(start="closed_form", **LEARNING | {"tokens": 512})
    base_point, start_point = made.training["curve"][:2]
    assert (base_point["phase"], start_point["phase"]) == ("base", "start")
    assert start_point["kl"] < 0.9 * base_point["kl"]
    left = [line["left_by_start"] for line in made.artifact.manifest["figures"]["matrices"]]
    assert all(0 < one < 1 for one in left)


def test_task_tuning_lowers_the_cross_entropy_of_the_text(demo: Job) -> None:
    made = demo.run(objective="emef", **LEARNING | {"tokens": 4096})
    assert made.training["ce_after"] < made.training["ce_before"]
    assert not any("teacher on windows" in step.name for step in plan_of(demo, objective="emef"))


def plan_of(job: Job, **settings: Any) -> list[Any]:
    _, plan, _ = Runner(store=job.store, device="cpu").compute(job.spec(**settings), lambda event: None)
    return list(plan.steps)


def test_text_that_is_predicted_better_while_the_teacher_is_left_behind_is_said(job: Job) -> None:
    made = job.run(objective="emef", num_bits=8, tokens=512, learning_rate=1e-2)
    assert made.training["ce_fell"]
    assert not made.training["kl_fell"]
    assert any(
        "did not come nearer to its teacher although the text itself is predicted better" in one for one in made.logs
    )


def test_the_closed_form_is_the_best_low_rank_answer_to_a_weighted_error() -> None:
    generator = torch.Generator().manual_seed(2)
    error = torch.randn((12, 20), generator=generator)
    inputs = torch.randn((400, 20), generator=generator) * torch.linspace(0.1, 3, 20)
    hessian = inputs.T @ inputs / 400

    def cost(a: torch.Tensor, b: torch.Tensor) -> float:
        off = (error - 2.0 * b @ a).double()
        damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(20)
        return float((off @ damped * off).sum())

    a, b, left = closed_form(error, hessian, 5, 2.0)
    nothing = cost(torch.zeros(5, 20), torch.zeros(12, 5))
    assert cost(a, b) == pytest.approx(left * nothing, rel=1e-4)
    for _ in range(20):
        nudged = [one + 0.01 * one.abs().mean() * torch.randn(one.shape, generator=generator) for one in (a, b)]
        assert cost(*nudged) > cost(a, b)
    unweighted = torch.linalg.svd(error, full_matrices=False)
    plain = unweighted.U[:, :5] * unweighted.S[:5], unweighted.Vh[:5]
    assert cost(plain[1], plain[0] / 2) > cost(a, b)
    whole_a, whole_b, left = closed_form(error, hessian, 16, 2.0)
    torch.testing.assert_close(2.0 * whole_b @ whole_a, error, rtol=1e-4, atol=1e-4)
    assert left == pytest.approx(0, abs=1e-9)


def test_inputs_that_are_always_zero_have_a_closed_form_too() -> None:
    error = torch.ones(3, 4)
    hessian = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0]))
    a, b, _ = closed_form(error, hessian, 2, 1.0)
    assert bool(a.isfinite().all())
    assert bool(b.isfinite().all())
    a, b, left = closed_form(torch.zeros(3, 4), torch.zeros(4, 4), 2, 1.0)
    assert float(a.abs().sum() + b.abs().sum()) == left == 0.0


LLAMA_7B: Json = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008},
    **{"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
}


@pytest.mark.parametrize(
    ("rank", "millions", "bits", "ratios"),
    [
        (4, 9.99, 0.0247, (1.0123, 1.0082, 1.0062, 1.0031)),
        (8, 19.99, 0.0494, (1.0247, 1.0165, 1.0123, 1.0062)),
        (16, 39.98, 0.0988, (1.0494, 1.0329, 1.0247, 1.0123)),
        (32, 79.95, 0.1975, (1.0988, 1.0658, 1.0494, 1.0247)),
    ],
)
def test_sizes_of_llama_7b_follow_from_its_config_alone(
    rank: int, millions: float, bits: float, ratios: tuple[float, ...]
) -> None:
    shapes = llama_7b().shapes()
    assert shapes is not None
    parameters = adapter_parameters(shapes, rank)
    assert parameters == 2_498_560 * rank
    assert parameters / 1e6 == pytest.approx(millions, abs=0.01)
    for num_bits, ratio in zip((2, 3, 4, 8), ratios, strict=True):
        found = sizes_of(shapes, rank, num_bits)["linears"]
        assert found["ratio"] == pytest.approx(ratio, abs=5e-5)
        assert found["adapter_bits"] == pytest.approx(bits, abs=5e-5)


@pytest.mark.parametrize(("num_bits", "total"), [(2, 2.2394), (3, 3.2472), (4, 4.2550), (8, 8.2863)])
def test_effective_bits_count_scales_and_zeros_of_groups_of_128(num_bits: int, total: float) -> None:
    shapes = llama_7b().shapes()
    assert sizes_of(shapes, 16, num_bits)["linears"]["bits_with_scales"] == pytest.approx(total, abs=1e-4)


def test_of_the_whole_file_a_2_bit_base_grows_by_less() -> None:
    assert sizes_of(llama_7b().shapes(), 16, 2)["whole"]["ratio"] == pytest.approx(1.037, abs=5e-4)


def llama_7b() -> Model:
    return Model(config=LLAMA_7B, parameters=6_738_415_616, weight_bytes=13_476_831_232, size_bytes=13_478_000_000)


def sizes_of(shapes: Any, rank: int, num_bits: int) -> Json:
    others = shapes.embeddings + shapes.head + shapes.norms + shapes.other
    return overhead(
        codes=shapes.linears * num_bits // 8,
        scales=shapes.linears // 128 * (16 + num_bits) // 8,
        adapter=2 * adapter_parameters(shapes, rank),
        rest=2 * others,
        weights=shapes.linears,
        others=others,
        item_bytes=2,
    )


def test_the_published_memory_factor_needs_fp32_weights_beneath_it() -> None:
    """5.6 times, of the abstract: not reached against LoRA on fp16 weights, whatever the batch (our reading)."""
    found = training_peaks(Int21Config(num_bits=4, batch_size=1), llama_7b(), 3_440_000_000, 2)
    assert found is not None
    assert found.packed / 1e9 == pytest.approx(5.4, abs=0.55), "4.93 to 5.96 GB are published for INT2 and INT4"
    assert found.lora_fp16 / found.packed < 3.2
    assert found.lora_fp32 / found.packed > 4.5
    assert found.full_finetune / found.packed > 15


@pytest.mark.parametrize(
    "settings", [{}, {"num_bits": 4, "start": "closed_form", "objective": "both"}, {"base_method": "quip_sharp"}]
)
def test_the_estimate_foretells_steps_and_bytes(job: Job, settings: Json) -> None:
    made = job.run(**settings)
    foretold = estimate(Int21Config(**QUICK | settings), Inputs(variant=Model(**checkpoint_sizes(job))))
    planned = [step.kind for step in plan_of(job, **settings)]
    loads = {load.kind: load.count for load in foretold.steps}
    assert {kind: planned.count(kind) for kind in loads if kind.startswith(("int21", "teacher"))} == {
        kind: count for kind, count in loads.items() if kind.startswith(("int21", "teacher"))
    }
    size = sum(part["bytes"] for part in made.artifact.parts)
    assert foretold.result_bytes == pytest.approx(size, rel=0.1)
    adapters = {part["name"]: part["bytes"] for part in made.artifact.parts}["adapter"]
    assert adapters == next(part["bytes"] for part in foretold.parts if part["name"] == "adapter")


def test_figures_say_what_adapters_add_in_every_way_of_counting(made: Made) -> None:
    figures = made.artifact.manifest["figures"]
    stored = {part["name"]: part["bytes"] for part in made.artifact.parts}
    state = load_file(made.job.store.path(made.output.blobs[WEIGHTS_FILE]))
    assert stored["adapter"] == sum(tensor.numel() * 2 for tensor in state.values())
    linears = figures["overhead"]["linears"]
    assert linears["ratio"] == pytest.approx(1 + stored["adapter"] / stored["codes"], rel=1e-5)
    with_scales = stored["codes"] + stored["scales"]
    assert linears["ratio_with_scales"] == pytest.approx(1 + stored["adapter"] / with_scales, rel=1e-5)
    assert made.artifact.manifest["ledger"]["nominal_ratio"] == pytest.approx(linears["codes_ratio"])
    assert sum(line["bytes"] for line in figures["matrices"]) == with_scales + stored["adapter"]
    training = figures["training"]
    assert training["tokens"] == 128
    assert len(training["losses"]) == 4
    assert training["parameters"] == stored["adapter"] // 2
    assert training["teacher_logits"] == 16


def test_the_hessians_that_a_base_made_are_used_again_for_the_closed_form(job: Job) -> None:
    kinds = [step.kind for step in plan_of(job, start="closed_form")]
    assert kinds.count("calibration.hessians") == 2
    assert kinds.count("int21.start") == 1
    kinds = [step.kind for step in plan_of(job, base_method="quip_sharp", start="closed_form")]
    assert kinds.count("calibration.hessians") == 2


def test_the_rate_rises_for_a_moment_and_falls_to_zero() -> None:
    rates = [rate_at(1.0, step, 100) for step in range(100)]
    assert rates[0] < rates[4] > rates[50] > rates[99] > 0
    assert rates[4] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_method": "bitdelta"}, "base_method is 'bitdelta'; it may be one of gptq"),
        ({"num_bits": 5}, "num_bits is 5"),
        ({"rank": 0}, "rank is 0"),
        ({"start": "random"}, "start is 'random'"),
        ({"objective": "kl"}, "objective is 'kl'"),
        ({"ce_weight": 1}, "for 1 set objective=emef"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": 0.01}, "one token, no distribution"),
        ({"adapter_dtype": "int8"}, "adapter_dtype is 'int8'"),
        ({"held_out": 0}, "held_out is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Json, words: str) -> None:
    with pytest.raises(CompressionError, match=words) as refused:
        Int21Config(**settings)
    assert refused.value.code == "bad_setting"


def test_a_setting_that_the_base_does_not_have_is_refused() -> None:
    with pytest.raises(CompressionError, match="group_size is set, and QuIP# has no such setting"):
        Int21Config(base_method="quip_sharp", group_size=64)


def test_a_text_is_asked_for(job: Job) -> None:
    spec = replace(job.spec(), inputs={"variant": job.inputs["variant"]})
    with pytest.raises(CompressionError, match="give a text set, or set calibration=generations"):
        Runner(store=job.store, device="cpu").compute(spec, lambda event: None)


def test_without_a_text_the_model_writes_one(job: Job) -> None:
    spec = replace(job.spec(calibration="generations"), inputs={"variant": job.inputs["variant"]})
    output = run_plan(job.store, spec, device="cpu")
    assert output.data["figures"]["training"]["tokens"] == 128


def test_training_that_diverges_is_refused_with_what_helps(job: Job) -> None:
    """A state that has grown beyond all bounds, as a rate that is too high leaves it behind."""
    digests: list[str] = []
    for step in plan_of(job, chunk_tokens=32):
        inputs = resolve_inputs(step.inputs, digests)
        if "previous" in inputs:
            break
        spec = StepSpec(kind=step.kind, params=step.params, inputs=inputs, seed=step.seed)
        digests.append(Runner(store=job.store, device="cpu").compute(spec, lambda event: None)[0])
    before = StepOutput.from_bytes(job.store.read_bytes(inputs["previous"]))
    grown = {name: tensor * 1e30 for name, tensor in load_file(job.store.path(before.blobs[STATE_FILE])).items()}
    blob = job.store.write_bytes(save(grown))
    inputs["previous"] = job.store.write_bytes(StepOutput(blobs={STATE_FILE: blob}, data=before.data).to_bytes())
    spec = StepSpec(kind=step.kind, params=step.params, inputs=inputs, seed=step.seed)
    with pytest.raises(CompressionError, match="lower learning_rate") as refused:
        Runner(store=job.store, device="cpu").compute(spec, lambda event: None)
    assert refused.value.code == "diverged"


def test_a_factor_that_fp16_cannot_hold_is_refused(made: Made, tmp_path: Path) -> None:
    from compression_worker.methods.int21.training import _round

    student = student_of(made.artifact)
    next(iter(student.factors.values())).data.fill_(1e6)
    with pytest.raises(CompressionError, match="set adapter_dtype=bfloat16"):
        _round(student, Int21Config(**QUICK))
    _round(student, Int21Config(**QUICK | {"adapter_dtype": "bfloat16"}))
