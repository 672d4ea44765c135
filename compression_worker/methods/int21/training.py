"""The adapters learn: one chunk of optimizer steps as a step that takes up the state of the chunk before.

Error correction (LREC) lowers the divergence from stored answers of the full-precision model
(:mod:`compression_worker.quantization.divergence`); task tuning (EMEF) lowers the cross-entropy of the text on the same
adapters. Which of both the paper's hybrid loss is, and that memory holds neither a dense weight nor the teacher, is our
reading of it. A state is every factor and both of AdamW's moments in fp32: a run that was killed goes on, to equal
bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.artifact import Artifact
from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.making.allocation import given_back
from compression_worker.making.beneath import implementation, packed_base
from compression_worker.making.blobs import read_blob, write_blob
from compression_worker.making.table import six_digits
from compression_worker.methods.int21 import packed_base as base_method
from compression_worker.methods.int21.config import Int21Config
from compression_worker.quantization import lora
from compression_worker.quantization.divergence import Divergence, divergence
from compression_worker.quantization.learning import (
    HeldOut,
    checkpoint_blocks,
    optimizer_steps,
    read_training,
    round_parameters,
)
from compression_worker.quantization.ranks import in_processes, is_first, processes
from compression_worker.quantization.teacher import TopLogits, computing_dtype, read_logits

STATE_FILE, ADAPTER_FILE = "state.safetensors", "adapter.safetensors"
LREC, EMEF = "lrec", "emef"
FIRST, SECOND = "#first", "#second"


@dataclass
class Student:
    """The packed base with adapters that can learn; ``factors`` are the only tensors with a gradient."""

    model: Any
    paths: Sequence[str]
    device: str

    @classmethod
    def on(cls, base: Artifact, config: Int21Config, device: str) -> Student:
        """``base`` packed on ``device``, its adapters still as PEFT begins them."""
        model = implementation(base).load_packed(base, device, computing_dtype(device))
        sides = base_method.sides(base)
        lora.attach(model, sides, rank=config.rank, alpha=config.lora_alpha)
        if config.checkpointing:
            checkpoint_blocks(model, base.config)
        return cls(model, list(sides), device)

    @property
    def factors(self) -> dict[str, torch.nn.Parameter]:
        return lora.factors(self.model, self.paths)

    def judged(self, windows: torch.Tensor, teacher: TopLogits | None, **weights: float) -> Divergence:
        """The loss of ``windows (B, T)``; ``teacher`` is what it answered there."""
        windows = windows.to(self.device)
        return divergence(self.model(windows, use_cache=False).logits, teacher, windows, **weights)


@given_back()
def train_step(context: StepContext) -> StepOutput:
    """Optimizer steps ``first`` to ``last`` of a phase; the output carries the state and what was measured."""
    params = context.spec.params
    config, phase, first, last = Int21Config(**params["config"]), params["phase"], params["first"], params["last"]
    if (count := processes(context.device, config.batch_size)) > 1:
        return in_processes(context, count)
    base = packed_base(context)
    student = Student.on(base, config, context.device)
    held = HeldOut(context, config.temperature)
    before = context.input("previous") if "previous" in context.spec.inputs else None
    curve: list[Json] = list(before.data["curve"]) if before else [held.measured(student, 0, "base")]
    values = _beginning(context, base, config, before)
    lora.put(student.model, student.paths, values)
    if before is None and config.start != "zero":
        curve.append(held.measured(student, 0, "start"))
    optimizer = _optimizer(student, values, steps=first)
    started = time.monotonic()
    windows = read_training(context, config.batch_size)
    losses = _trained(context, student, optimizer, config, windows)
    if not is_first():
        return StepOutput()
    context.measure("seconds_per_training_step", (time.monotonic() - started) / (last - first))
    if params["final"]:
        _round(student, config)
    tokens = curve[-1]["tokens"] + windows.numel()
    curve.append(held.measured(student, tokens, phase))
    context.log(
        f"held-out KL {curve[-1]['kl']:.4g}, cross-entropy {curve[-1]['ce']:.4g} after {tokens:,} tokens", "info"
    )
    losses = (list(before.data["losses"]) if before else []) + [six_digits(loss) for loss in losses]
    blob = write_blob(context, _state(student, optimizer))
    return StepOutput(blobs={STATE_FILE: blob}, data={"curve": curve, "losses": losses})


def _trained(
    context: StepContext, student: Student, optimizer: torch.optim.AdamW, config: Int21Config, windows: torch.Tensor
) -> list[float]:
    teacher = read_logits(context, "teacher") if context.spec.params["phase"] == LREC else None

    def loss_of(rows: slice) -> torch.Tensor:
        known = teacher.at(rows, student.device) if teacher else None
        weights = {"temperature": config.temperature, "ce_weight": config.ce_weight}
        return student.judged(windows[rows], known, **weights).loss

    return optimizer_steps(
        context,
        optimizer,
        windows,
        loss_of,
        batch_size=config.batch_size,
        vocabulary=int(student.model.config.vocab_size),
        learning_rate=config.learning_rate,
    )


def _beginning(
    context: StepContext, base: Artifact, config: Int21Config, before: StepOutput | None
) -> dict[str, torch.Tensor]:
    """Factors, and moments where a phase goes on: of the chunk before, of the closed form, or PEFT's own."""
    if before:
        return read_blob(context, before.blobs[STATE_FILE])
    if "start" in context.spec.inputs:
        return read_blob(context, context.input("start").blobs[ADAPTER_FILE])
    return lora.fresh(base_method.sides(base), config.rank, context.spec.seed)


def _optimizer(student: Student, values: Mapping[str, torch.Tensor], *, steps: int) -> torch.optim.AdamW:
    """AdamW after ``steps`` steps, its moments out of ``values``; a phase that begins has none."""
    factors = student.factors
    optimizer = torch.optim.AdamW(factors.values(), lr=0.0, weight_decay=0.0, foreach=False)
    if steps:
        for name, parameter in factors.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps)),
                "exp_avg": values[name + FIRST].to(student.device),
                "exp_avg_sq": values[name + SECOND].to(student.device),
            }
    return optimizer


def _round(student: Student, config: Int21Config) -> None:
    round_parameters(student.factors.values(), config.adapter_dtype, "adapter_dtype", "a factor")


def _state(student: Student, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in student.factors.items():
        moments = optimizer.state[parameter]
        found[name] = parameter.detach()
        found[name + FIRST], found[name + SECOND] = moments["exp_avg"], moments["exp_avg_sq"]
    return found
