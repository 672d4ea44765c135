"""Differences learn: modules replaced one by one, kills, adapters, hidden states, signs, scaled anchors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression_worker import catalog
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput, StepSpec
from compression_worker.making.inputs import architecture_of
from compression_worker.methods.deltallm.compress import load_model
from compression_worker.methods.deltallm.config import FORMS, DeltaLLMConfig
from compression_worker.methods.deltallm.differences import dense, difference, signs_of
from compression_worker.methods.deltallm.factors import likeness
from compression_worker.methods.deltallm.layout import DELTAS_FILE, is_known, keys
from compression_worker.methods.deltallm.matrices import shareable
from compression_worker.methods.deltallm.replacement import drawn, probability
from compression_worker.methods.deltallm.student import Student
from compression_worker.methods.deltallm.training import loss_of, replace_modules, round_factors
from compression_worker.quantization.learning import HeldOut
from compression_worker.quantization.teacher import TopLogits
from compression_worker.runner import Runner, resolve_inputs
from tests.compression_worker.methods.sharing import LEARNING, TOKENS, Job, Made, logits, six_layers, starts
from tests.families import make_family_pair


@pytest.fixture(scope="module", name="job")
def fixture_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return six_layers(tmp_path_factory.mktemp("deltallm"))


@pytest.fixture(scope="module", name="made")
def fixture_made(job: Job) -> Made:
    return job.run(groups="1:2,3")


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
    steps = job.planned(**settings).steps
    held_out = [step.kind for step in steps].index("teacher.logits")
    for step in steps[: held_out + 1]:
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, digests), seed=step.seed)
        digests.append(runner.compute(spec, lambda event: None)[0])
    context = StepContext(
        store=job.store,
        spec=StepSpec(kind="deltallm.train", inputs={"text": digests[held_out - 1], "held_out": digests[held_out]}),
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
    made = dense(pieces, torch.zeros((6, 40)))
    assert set(made.abs().flatten().tolist()) == {float(pieces[1])}
    assert torch.equal(made.sign(), torch.where(delta >= 0, 1.0, -1.0))
    for factor in (0.9, 1.1):
        assert (delta - factor * made).square().sum() > (delta - made).square().sum()
    x = torch.randn((2, 3, 40), generator=generator)
    y = torch.randn((2, 3, 6), generator=generator)
    torch.testing.assert_close(difference(pieces)(x, y), y + x @ made.T)


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


def test_the_multiple_of_an_anchor_is_the_nearest_one() -> None:
    generator = torch.Generator().manual_seed(1)
    own, anchor, x = (torch.randn(shape, generator=generator) for shape in ((6, 10), (6, 10), (10, 30)))
    for hessian, metric in ((None, torch.eye(10)), (x @ x.T, x)):
        c = likeness(own, anchor, hessian)
        left = [((own - (float(c) + off) * anchor) @ metric).square().sum() for off in (0.0, -0.1, 0.1)]
        assert left[0] < min(left[1:])
        assert float(likeness(0.75 * anchor, anchor, hessian)) == pytest.approx(0.75)
    assert likeness(own, torch.zeros(6, 10), None) == torch.zeros(1)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("gpt2", {"start": "svd_covariance", "learning_rate": 1e-3}),
        ("llama", {"start": "zero"}),
        ("llama", {"base_method": "gptq", "num_bits": 8}),
    ],
)
def test_anchors_may_be_scaled_and_scales_learn(family: str, more: Json, tmp_path: Path) -> None:
    job = Job(tmp_path, make_family_pair(tmp_path, family)[0])
    settings = {**LEARNING, "groups": "0:1", "share_form": "scaled", "learning_rate": 3e-3, **more}
    made, begun = job.run(**settings), job.run(**settings | {"tokens": 0})
    shared = {name: line for name, line in made.artifact.manifest["tensors"].items() if line["kind"] == "shared"}
    stored, first = (load_file(one.artifact.paths[DELTAS_FILE]) for one in (made, begun))
    assert stored.keys() == {key for name in shared for key in keys(name, "scaled")}
    parts = {part["name"]: part["bytes"] for part in made.artifact.parts}
    assert parts["deltas"] == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert made.sharing["scales"] == {name: pytest.approx(float(stored[f"{name}#c"]), rel=1e-5) for name in shared}
    for name in shared:
        assert all(not torch.equal(stored[key], first[key]) for key in keys(name, "scaled"))
        if more.get("start") == "zero":
            assert float(first[f"{name}#c"]) == 1
    assert made.training["kl_after"] < made.training["kl_before"]
    assert shipped(job, made, settings) == pytest.approx(made.training["kl_after"], rel=1e-4)
    model, whole = (load_model(None, made.artifact, "cpu", torch.float32, dense=one) for one in (False, True))
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-4)
    again = job.run(**settings, chunk_tokens=64)
    assert again.output.blobs[DELTAS_FILE] == made.output.blobs[DELTAS_FILE]


def test_an_artifact_says_by_its_version_whether_anchors_are_scaled(tmp_path: Path) -> None:
    job = Job(tmp_path, make_family_pair(tmp_path, "llama")[0])
    said = {form: job.run(groups="0:1", share_form=form).artifact.manifest["layout"] for form in FORMS}
    assert {form: one["version"] for form, one in said.items()} == {"low_rank": 1, "scaled": 2, "sign": 1}
    assert all(map(is_known, said.values()))
    assert not is_known({**said["scaled"], "version": 1})
    assert not is_known({**said["scaled"], "version": 3})
