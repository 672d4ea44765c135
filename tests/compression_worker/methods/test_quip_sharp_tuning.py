"""Fine-tuning of QuIP#: exact gradients, a teacher in few numbers, blocks and models that come nearer to their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression_worker.architecture import Linear, describe
from compression_worker.artifact import Artifact, load_compressed_model
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput, StepSpec
from compression_worker.making.inputs import architecture_of
from compression_worker.methods.quip_sharp.config import QuipSharpConfig
from compression_worker.methods.quip_sharp.merge import LatticeTensors
from compression_worker.methods.quip_sharp.stacks import Stack
from compression_worker.methods.quip_sharp.student import Student
from compression_worker.methods.quip_sharp.teacher import answers_of
from compression_worker.methods.quip_sharp.tuning import BEST, STATE, Training, planned_tuning
from compression_worker.quantization.calibration import read_tokens
from compression_worker.runner import Runner, resolve_inputs, run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from tests.families import make_family_pair

TEXTS = b"".join(json.dumps({"text": f"Sentence {n}: the fox jumps {n} times."}).encode() + b"\n" for n in range(90))
QUICK = {"samples": 6, "length": 32, "passes": 0, "block_epochs": 2, "batch_size": 1, "tuning_epochs": 2}
GENTLE = {"learning_rate": 1e-4, "sign_learning_rate": 1e-3, "block_epochs": 4}
FAST = {"learning_rate": 5e-4, "sign_learning_rate": 3e-3}
TOKENS = torch.arange(40, 60).view(1, 20)


class Bench:
    """A store that holds a tiny model."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        _, self.folder = make_family_pair(folder, family)
        self.store = Store(folder / "store", durable=False)
        self.inputs = {
            "variant": attach_folder(self.store, self.folder),
            "calibration": self.store.write_bytes(parse_samples(TEXTS, TEXT).data),
        }
        self.steps: dict[str, str] = {}

    def compress(self, config: Json) -> StepOutput:
        plan = StepSpec(kind="quip_sharp.plan", params={"config": QUICK | config}, inputs=self.inputs, seed=2)
        return run_plan(self.store, plan, device="cpu")

    def digests(self, config: Json) -> list[tuple[PlannedStep, str]]:
        """Every step of a job and its output's digest."""
        runner = Runner(store=self.store, device="cpu")
        plan = StepSpec(kind="quip_sharp.plan", params={"config": QUICK | config}, inputs=self.inputs, seed=2)
        _, output, _ = runner.compute(plan, lambda event: None)
        found: list[tuple[PlannedStep, str]] = []
        for step in output.steps:
            inputs = resolve_inputs(step.inputs, [digest for _, digest in found])
            spec = StepSpec(kind=step.kind, params=step.params, inputs=inputs, seed=step.seed)
            found.append((step, runner.compute(spec, lambda event: None)[0]))
        return found

    def output(self, digest: str) -> StepOutput:
        return StepOutput.from_bytes(self.store.read_bytes(digest))

    def model(self, output: StepOutput) -> Any:
        return load_compressed_model(self.store, None, output.data["artifact"], dtype=torch.float32)

    def divergence(self, output: StepOutput) -> float:
        whole = load_model(Checkpoint.open(self.store, self.inputs["variant"]), dtype=torch.float32)
        with torch.no_grad():
            ours, theirs = (one(TOKENS).logits.log_softmax(-1) for one in (self.model(output), whole))
        return float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean())


@pytest.fixture(name="bench")
def fixture_bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def student_of(bench: Bench, output: StepOutput) -> tuple[Any, Student]:
    """The full-precision model with every stack of the artifact put in."""
    checkpoint = Checkpoint.open(bench.store, bench.inputs["variant"])
    architecture = architecture_of(checkpoint)
    linears = {linear.name: linear for linear in architecture.linears()}
    model = load_model(checkpoint, dtype=torch.float32).requires_grad_(False)
    student = Student(model, architecture, tuple(linears.values()))
    with LatticeTensors(Artifact.open_store(bench.store, output.data["artifact"])) as made:
        for name in made.stacks():
            stored = made.stack(name)
            stack = Stack(tuple(linears[one] for one in stored.names), stored.rotation.stream)
            student.put(stack, stored.turned(), stored.scales, stored.signs)
    return model, student


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi"])
def test_a_student_answers_as_the_artifact_does_and_its_signs_have_exact_gradients(tmp_path: Path, family: str) -> None:
    bench = Bench(tmp_path, family)
    output = bench.compress({})
    model, student = student_of(bench, output)
    logits = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits, bench.model(output)(TOKENS).logits, rtol=1e-4, atol=1e-4)
    signs = student.signs()
    direction = {
        name: torch.randn(one.shape, generator=torch.Generator().manual_seed(5)) for name, one in signs.items()
    }

    def loss() -> torch.Tensor:
        logits: torch.Tensor = model(TOKENS, use_cache=False).logits
        return logits.double().square().mean()

    gradients = torch.autograd.grad(loss(), list(signs.values()))
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction.values(), strict=True))
    ends = []
    for step in (3e-4, -3e-4):
        for name, one in signs.items():
            one.data += step * direction[name]
        ends.append(float(loss().detach()))
        for name, one in signs.items():
            one.data -= step * direction[name]
    assert slope == pytest.approx((ends[0] - ends[1]) / 6e-4, rel=0.02)


def test_a_teacher_in_few_numbers_is_the_whole_one_where_nothing_is_left_out() -> None:
    teacher = torch.randn((2, 5, 33), generator=torch.Generator().manual_seed(1)) * 3
    student = torch.randn((2, 5, 33), generator=torch.Generator().manual_seed(2)).requires_grad_()
    full = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
    )
    whole = full.sum(-1).mean()
    found = answers_of(teacher, 32).divergence(student)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], torch.autograd.grad(whole, student)[0])
    with torch.no_grad():
        fewer = [float(answers_of(teacher, count).divergence(student)) for count in (1, 4, 16, 32)]
        assert fewer == sorted(fewer)
        assert fewer[-1] == pytest.approx(float(whole), rel=1e-5)
        assert float(answers_of(teacher, 4).divergence(teacher)) == pytest.approx(0, abs=1e-6)


def test_a_teacher_who_is_sure_gives_no_infinity() -> None:
    teacher = torch.zeros(1, 1, 8)
    teacher[..., 3] = 500.0
    student = torch.zeros(1, 1, 8, requires_grad=True)
    loss = answers_of(teacher, 2).divergence(student)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()
    assert answers_of(teacher, 2).divergence(teacher.clone()).abs() < 1e-6


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_blocks_make_up_for_their_rounding(tmp_path: Path, family: str) -> None:
    bench = Bench(tmp_path, family)
    output = bench.compress({"tuning": "block", **GENTLE, "samples": 12})
    curves = output.data["figures"]["tuning"]["blocks"]
    assert sorted(curves) == ["0", "1"]
    found = [losses for block in curves.values() for losses in block]
    assert all(len(losses) <= 1 + GENTLE["block_epochs"] for losses in found)
    assert sum(min(losses) < losses[0] for losses in found) > len(found) / 2
    manifest = Artifact.open_store(bench.store, output.data["artifact"]).manifest
    trained = [entry for entry in manifest["tensors"].values() if "rotation" in entry]
    assert all(entry["trained"] for entry in trained)


def test_what_a_block_learns_is_what_the_artifact_holds(bench: Bench) -> None:
    """The output of the tuned block, computed from the artifact, is nearer to the full one than the rounded block's."""
    whole = load_model(Checkpoint.open(bench.store, bench.inputs["variant"]), dtype=torch.float32)
    outputs = {"none": bench.compress({}), "block": bench.compress({"tuning": "block", **GENTLE})}
    with torch.no_grad():
        hidden = whole.get_input_embeddings()(TOKENS)
        position = whole.model.rotary_emb(hidden, torch.arange(20)[None])

        def first_block(model: Any) -> torch.Tensor:
            found: torch.Tensor = model.model.layers[0](hidden, position_embeddings=position)
            return found

        wanted = first_block(whole)
        errors = {
            tuning: float((first_block(bench.model(output)) - wanted).square().mean())
            for tuning, output in outputs.items()
        }
    assert errors["block"] < errors["none"]


@pytest.mark.parametrize(("tuning", "share"), [("end_to_end", 1.0), ("both", 0.9)])
def test_a_tuned_model_answers_more_like_the_whole_one(bench: Bench, tuning: str, share: float) -> None:
    plain = bench.compress({})
    tuned = bench.compress(GENTLE | {"tuning": tuning, "tuning_epochs": 4, **FAST})
    # Signs and norms alone carry what a few sentences of a random model teach only a little way to other text.
    assert bench.divergence(tuned) < share * bench.divergence(plain)
    curve = tuned.data["figures"]["tuning"]["end_to_end"]
    assert len(curve["exam"]) == 5
    assert len(curve["losses"]) == 4 * 4
    assert min(curve["exam"]) < curve["exam"][0]


def test_the_artifact_holds_real_signs_in_half_precision_and_norms_in_single(bench: Bench, tmp_path: Path) -> None:
    output = bench.compress({"tuning": "end_to_end", **FAST})
    artifact = Artifact.open_store(bench.store, output.data["artifact"])
    codes = load_file(artifact.paths["codes-00000.safetensors"])
    stack = "model.layers.0.self_attn.q_proj.weight"
    assert codes[f"{stack}#signs_in"].dtype == torch.float16
    assert codes[f"{stack}#signs_in"].shape == (64,)
    assert codes[f"{stack}#signs_out"].shape == (128,)
    assert 0 < (codes[f"{stack}#signs_in"].abs() - 1).abs().max() < 0.2
    norms = load_file(artifact.paths["tuned.safetensors"])
    raw = load_file(artifact.paths["raw.safetensors"])
    assert {one.dtype for one in norms.values()} == {torch.float32}
    assert not norms.keys() & raw.keys()
    own = load_file(bench.folder / "model.safetensors")
    assert {*norms, *raw, *(name for name in own if name.endswith("_proj.weight"))} == own.keys()
    parts = {part["name"]: part["bytes"] for part in output.data["ledger"]}
    assert parts["norms"] == sum(one.nbytes for one in norms.values())
    assert sum(parts.values()) == output.data["artifact_bytes"]
    vectors = sum(one.nbytes for name, one in codes.items() if "#signs" in name)
    assert parts["scales"] == 2 * vectors + 4 * 14


def test_a_head_of_its_own_is_trained_on_request_and_a_tied_one_never(tmp_path: Path) -> None:
    settings = {"tuning": "end_to_end", "train_head": True, "tuning_epochs": 2, **FAST}
    apart, tied = Bench(tmp_path / "apart", "llama-untied"), Bench(tmp_path / "tied", "llama")
    output = apart.compress(settings)
    artifact = Artifact.open_store(apart.store, output.data["artifact"])
    assert artifact.manifest["tensors"]["lm_head.weight"]["part"] == "head"
    assert load_file(artifact.paths["tuned.safetensors"])["lm_head.weight"].dtype == torch.float16
    own = load_file(apart.folder / "model.safetensors")["lm_head.weight"]
    assert not torch.equal(apart.model(output).lm_head.weight, own.float())
    table = Artifact.open_store(tied.store, tied.compress(settings).data["artifact"]).manifest["tensors"]
    assert table["model.embed_tokens.weight"]["kind"] == "raw"


def test_the_steps_of_an_epoch_go_on_where_the_ones_before_stopped(bench: Bench) -> None:
    """Two steps of the job make the very bytes that one process makes which never stops."""
    found = bench.digests({"tuning": "end_to_end", **FAST})
    tunes = [(step, bench.output(digest)) for step, digest in found if step.kind == "quip_sharp.tune"]
    assert [step.params["epoch"] for step, _ in tunes] == [0, 1]
    digests = [digest for _, digest in found]
    step = tunes[0][0]
    spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, digests), seed=step.seed)

    def nothing(*given: object) -> None:
        return None

    context = StepContext(store=bench.store, spec=spec, progress=nothing, log=nothing, measure=nothing)
    training = Training(context, QuipSharpConfig(**step.params["config"]))
    tokens = read_tokens(context, "text")
    training.examined(tokens, range(4, 6))
    training.keep()
    for epoch, (_, output) in enumerate(tunes):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(2 * 1_000_003 + epoch)).tolist()
        losses = [training.learn(tokens, window) for window in order]
        training.keep()
        assert losses == pytest.approx(output.data["curve"]["losses"][-4:], rel=1e-5)
        assert training.blobs()[STATE] == output.blobs[STATE]
    assert training.blobs()[BEST] == tunes[-1][1].blobs[BEST]
    next(iter(training._rates.values()))[0].data.fill_(torch.inf)
    with pytest.raises(CompressionError, match="lower the learning rates") as refused:
        training.learn(tokens, 0)
    assert refused.value.code == "diverged"


def test_a_plan_shares_an_epoch_out_over_steps() -> None:
    config = QuipSharpConfig(tuning="end_to_end", samples=150, tuning_epochs=2)
    steps = planned_tuning(config, {"variant": "v", "text": "@0", "layers-0": "@9"}, 10, 0)
    assert [step.kind for step in steps] == ["quip_sharp.teacher", *["quip_sharp.tune"] * 8]
    assert [(step.params["first"], step.params["last"]) for step in steps[1:5]] == [
        (0, 32),
        (32, 64),
        (64, 96),
        (96, 100),
    ]
    assert [step.params["ends"] for step in steps[1:5]] == [False, False, False, True]
    assert "previous" not in steps[1].inputs
    assert [step.inputs["previous"] for step in steps[2:4]] == ["@11", "@12"]


def test_experts_that_are_not_coded_yet_stay_parameters_of_their_own(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "mixtral")
    checkpoint = Checkpoint.open(bench.store, bench.inputs["variant"])
    architecture = architecture_of(checkpoint)
    model = load_model(checkpoint, dtype=torch.float32).requires_grad_(False)
    before = model(TOKENS).logits
    student = Student(model, architecture, tuple(architecture.linears()))
    assert torch.equal(model(TOKENS).logits, before)
    one: Linear = next(linear for linear in architecture.linears() if "experts.2.w1" in linear.name)
    own = load_file(bench.folder / "model.safetensors")[one.name]
    assert torch.equal(student.weight(one), own.float())
    assert describe(checkpoint.manifest["config"]).stacked()
