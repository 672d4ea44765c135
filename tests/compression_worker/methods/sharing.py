"""A small model whose layers may share, a text, and jobs of DeltaLLM on them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint, attach_folder
from compression_worker.contracts import Json, StepOutput, StepSpec
from compression_worker.making.inputs import architecture_of
from compression_worker.methods.deltallm.matrices import SharedMatrix, shareable
from compression_worker.methods.deltallm.student import Student
from compression_worker.quantization.low_rank import truncated
from compression_worker.runner import Runner, run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
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
QUANTIZED: Json = {"groups": "1:2,3", "num_bits": 4, "samples": 4, "length": 32}
TOKENS = torch.arange(40, 60).view(1, 20)


class Job:
    """A model and a text in a store, and plans that run there."""

    def __init__(self, folder: Path, model: Path, text: bytes = TEXTS) -> None:
        self.folder, self.model = folder, model
        self.store = Store(folder / "store", durable=False)
        self.inputs = {
            "variant": attach_folder(self.store, model),
            "calibration": self.store.write_bytes(parse_samples(text, TEXT).data),
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


def six_layers(folder: Path) -> Job:
    """A job on an untied model of :data:`LAYERS` blocks."""
    return Job(folder, make_tiny_pair(folder, tied=False, layers=LAYERS)[0])


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


def operations(model: Any) -> int:
    """Multiplications and additions of products with weights, for each of :data:`TOKENS`, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        logits(model)
    counts = counter.get_flop_counts()["Global"].items()
    return sum(flops for one, flops in counts if str(one) in ("aten.mm", "aten.addmm")) // TOKENS.numel()


def starts(student: Student, block: int, anchor: int, rank: int) -> dict[str, Any]:
    return {
        one.name: truncated(weight_of(student, one) - weight_of(student, other), rank)
        for one, other in student.shareable.pairs({block: anchor})
    }


def weight_of(student: Student, matrix: SharedMatrix) -> torch.Tensor:
    weight: torch.Tensor = student.linear(matrix).weight.detach()
    return weight.T if matrix.linear.transposed else weight
