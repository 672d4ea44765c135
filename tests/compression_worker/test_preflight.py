"""What is promised before a job runs, held against what a real plan asks for and what real steps take."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compression_worker import catalog
from compression_worker.checkpoints import attach_folder, read_manifest
from compression_worker.contracts import Json, PlannedStep, StepSpec, canonical_json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.estimate import estimate as evaluation_estimate
from compression_worker.methods.bitdelta.compress import plan_step
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.methods.bitdelta.estimate import calmer, cheaper, estimate
from compression_worker.methods.bitdelta.layout import predict
from compression_worker.preflight import (
    ADDRESS_SPACE_BYTES,
    PROCESS_BYTES,
    Estimate,
    Inputs,
    Model,
    import_estimate,
)
from compression_worker.runner import resolve_inputs
from compression_worker.store import Store
from tests.tiny import SENTENCES, make_tiny_pair, tiny_config

SIDE = 2_000_700
FACTOR = 1.3
"""How far a predicted peak of memory may be from the measured one, either way."""
FAMILIES: dict[str, Json] = {
    "llama, tied": tiny_config(),
    "llama, a head of its own": tiny_config(tied=False, hidden=128, layers=4),
    "llama of 135 M": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
    },
    "qwen2 with biases": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3 with norms of its heads": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


def model_of(config: Json) -> Model:
    from compression_worker.architecture import describe

    parameters = sum(math.prod(shape) for shape in describe(config).shapes.values())
    return Model(config=config, parameters=parameters, weight_bytes=2 * parameters, size_bytes=2 * parameters + SIDE)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_from_the_configuration_alone_are_within_one_percent(family: str) -> None:
    config = BitDeltaConfig()
    real = predict(FAMILIES[family], config, side_files={"tokenizer.json": SIDE - 700, "config.json": 700})
    found = estimate(config, Inputs(variant=model_of(FAMILIES[family])))
    total = sum(part["bytes"] for part in real)
    assert found.exact
    assert found.result_bytes == pytest.approx(total, rel=0.01)
    codes = {part["name"]: part["bytes"] for part in found.parts}["codes"]
    assert codes == next(part["bytes"] for part in real if part["name"] == "codes")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"hidden_size": "wide"},
        tiny_config() | {"num_local_experts": 8},
        tiny_config(layers=400),
    ],
    ids=["none", "nonsense", "a mixture of experts", "more linears than parameters"],
)
def test_shapes_that_are_not_known_give_an_upper_bound_that_says_so(config: Json) -> None:
    model = Model(config=config, parameters=92_480, weight_bytes=184_960, size_bytes=190_000)
    found = estimate(BitDeltaConfig(), Inputs(variant=model))
    assert not found.exact
    assert found.result_bytes >= model.size_bytes


def test_an_estimate_survives_a_json_column() -> None:
    found = estimate(BitDeltaConfig(), Inputs(variant=model_of(tiny_config())))
    assert Estimate.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_smaller_batch_is_tried_before_shorter_samples_and_no_distillation_comes_last() -> None:
    tried = list(cheaper(BitDeltaConfig(batch_size=4, sequence_length=64)))
    assert [one.batch_size for one in tried[:2]] == [2, 1]
    assert (tried[2].batch_size, tried[2].sequence_length) == (4, 32)
    assert tried[-1].distill_steps == 0
    assert list(cheaper(BitDeltaConfig(distill_steps=0))) == []
    assert [one.learning_rate for one in calmer(BitDeltaConfig(learning_rate=3e-4))] == [1e-4, 3e-4]


def test_every_declared_need_is_of_a_kind_of_step_and_its_work_can_be_loaded() -> None:
    assert catalog.NEEDS.keys() <= catalog.STEPS.keys()
    assert all(callable(catalog.load(need.work)) for need in catalog.NEEDS.values() if need.work)
    assert {kind for kind, need in catalog.NEEDS.items() if need.device} == {
        "bitdelta.choose",
        "bitdelta.distill",
        "bitdelta.sense",
        "calibration.hessians",
        "calibration.tokens",
        "deltadq.search",
        "deltallm.choose",
        "deltallm.train",
        "evaluation.target",
        "gptq.layers",
        "int21.start",
        "int21.train",
        "quip_sharp.layers",
        "quip_sharp.teacher",
        "quip_sharp.tune",
        "quip_sharp.tune_layers",
        "release.rehearse",
        "teacher.logits",
    }


def test_forecasts_need_no_torch() -> None:
    code = (
        "import sys; from compression_worker import catalog, machine, preflight; "
        "[m.forecaster() for m in catalog.METHODS.values()]; "
        "[catalog.load(n.work) for n in catalog.NEEDS.values() if n.work]; print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@dataclass
class World:
    store: Store
    base: str
    variant: str
    text: str

    @property
    def manifest(self) -> Json:
        return read_manifest(self.store, self.variant)

    @property
    def inputs(self) -> Inputs:
        manifest = self.manifest
        keys = ("config", "parameters", "weight_bytes", "size_bytes")
        model = Model(**{key: manifest[key] for key in keys})
        return Inputs(variant=model, base=model, artifact_bytes=1, text_bytes=self.store.size(self.text), questions=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A pair of 24 million parameters: large enough for its memory to stand out from the libraries'."""
    folder = tmp_path_factory.mktemp("preflight")
    store = Store(folder / "store", durable=False)
    base, variant = (attach_folder(store, path) for path in make_tiny_pair(folder, hidden=768, layers=4, vocab=4096))
    lines = (canonical_json({"text": " ".join(SENTENCES) * 8}) for _ in range(60))
    return World(store, base, variant, store.write_bytes(b"\n".join(lines)))


class Child:
    """A computing process of its own, so that its memory is nobody else's."""

    def __init__(self, store: Store) -> None:
        command = [sys.executable, "-m", "compression_worker", "step", "--store", str(store.root), "--device", "cpu"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, spec: StepSpec) -> Json:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"spec": spec.to_json(), "cached": ""}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            answer: Json = json.loads(line)
            if answer["type"] not in ("progress", "log"):
                assert answer["type"] == "result", answer
                return answer
        raise AssertionError("the child ended")

    def end(self) -> None:
        self.process.communicate()


@pytest.fixture
def child(world: World) -> Iterator[Child]:
    present = Child(world.store)
    yield present
    present.end()


def evaluate_base(world: World, child: Child) -> float:
    """Measure the base in a child: its peak of memory."""
    params = {"target": "base", "config": {"window_tokens": 256, "max_windows": 16, "max_choices": 1, "prompts": "",
              "max_new_tokens": 2}}  # fmt: skip
    inputs = {"base": world.base, "variant": world.variant, "text": world.text}
    answer = child.run(StepSpec(kind="evaluation.target", params=params, inputs=inputs))
    return float(answer["measured"]["peak_memory_bytes"])


def plan(world: World, config: BitDeltaConfig) -> tuple[PlannedStep, ...]:
    from dataclasses import asdict

    from compression_worker.contracts import StepContext

    inputs = {"base": world.base, "variant": world.variant, "calibration": world.text}
    spec = StepSpec(kind="bitdelta.plan", params={"config": asdict(config)}, inputs=inputs)
    quiet: Any = lambda *_: None  # noqa: E731
    return plan_step(StepContext(store=world.store, spec=spec, progress=quiet, log=quiet, measure=quiet)).steps


def test_the_forecast_counts_the_steps_and_the_work_that_the_plan_asks_for(world: World) -> None:
    config = BitDeltaConfig(distill_steps=60)
    found, planned = estimate(config, world.inputs), plan(world, config)
    for load in found.steps:
        if load.kind == "bitdelta.plan":
            continue
        steps = [step for step in planned if step.kind == load.kind]
        work = catalog.load(catalog.need(load.kind).work)
        assert load.count == len(steps), load.kind
        assert load.units == pytest.approx(sum(work(step.params, found.sizes) for step in steps)), load.kind
    assert {load.kind for load in found.steps} == {"bitdelta.plan", *(step.kind for step in planned)}


def test_predicted_memory_and_bytes_are_those_of_a_real_job(world: World, child: Child) -> None:
    config = BitDeltaConfig(distill_steps=2, batch_size=4, sequence_length=128)
    found = estimate(config, world.inputs)
    evaluate_base(world, child)  # children stay warm: from here on this one holds what loading a model takes
    peaks: dict[str, float] = {}
    outputs: list[str] = []
    answer: Json = {}
    for step in plan(world, config):
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, outputs))
        answer = child.run(spec)
        outputs.append(answer["output"])
        peaks[step.kind] = max(peaks.get(step.kind, 0.0), answer["measured"]["peak_memory_bytes"])
    for kind in ("bitdelta.layer", "bitdelta.distill"):
        promised = next(load.memory_bytes for load in found.steps if load.kind == kind)
        assert 1 / FACTOR < promised / peaks[kind] < FACTOR, (kind, promised, peaks[kind])
    assert peaks["bitdelta.distill"] > 1.3 * peaks["bitdelta.layer"], "a peak is the step's own"
    assert found.result_bytes == pytest.approx(answer["data"]["artifact_bytes"], rel=0.01)


def test_what_a_child_holds_without_a_model_is_what_the_constants_say(tmp_path: Path) -> None:
    store = Store(tmp_path / "store", durable=False)
    base, variant = (attach_folder(store, path) for path in make_tiny_pair(tmp_path))
    text = store.write_bytes(b"\n".join(canonical_json({"text": " ".join(SENTENCES) * 8}) for _ in range(20)))
    child = Child(store)
    peak = evaluate_base(World(store, base, variant, text), child)
    mapped = mapped_bytes(child.process.pid)
    child.end()
    assert 0.85 < peak / PROCESS_BYTES < 1.1, peak
    # Each thread maps some 70 MB that it does not use, so that machines differ; two were measured.
    assert mapped - peak < ADDRESS_SPACE_BYTES * max(1.1, (os.cpu_count() or 1) / 2), (mapped, peak)


def mapped_bytes(pid: int) -> int:
    """The most address space that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmPeak:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmPeak")


def test_predicted_memory_of_an_evaluation_is_that_of_a_real_one(world: World, child: Child) -> None:
    config = EvaluationConfig(max_windows=16, max_new_tokens=2)
    load = next(one for one in evaluation_estimate(config, world.inputs).steps if one.kind == "evaluation.target")
    peak = evaluate_base(world, child)
    assert 1 / FACTOR < load.memory_bytes / peak < FACTOR, (load.memory_bytes, peak)
    alone = evaluation_estimate(config, Inputs(variant=world.inputs.variant, text_bytes=100_000)).steps[1]
    assert alone.memory_bytes < load.memory_bytes


def test_the_forecast_of_an_evaluation_counts_its_targets(world: World) -> None:
    def targets(inputs: Inputs) -> int:
        return evaluation_estimate(EvaluationConfig(), inputs).steps[1].count

    model = world.inputs.variant
    assert targets(Inputs(variant=model, questions=3, question_bytes=300)) == 1
    assert targets(Inputs(variant=model, base=model, questions=3, question_bytes=300)) == 2
    assert targets(world.inputs) == 3


def test_an_import_asks_for_twice_its_bytes() -> None:
    found = import_estimate(1_000, 800)
    assert (found.result_bytes, found.needed_bytes) == (1_000, 2_000)
