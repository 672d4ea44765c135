"""What every training against stored answers shares: the rate of each step, blocks computed twice, held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from compression_worker.architecture import blocks_of, build
from compression_worker.contracts import Json, StepContext
from compression_worker.distillation import scheduled
from compression_worker.making.table import six_digits
from compression_worker.quantization.divergence import Divergence
from compression_worker.quantization.teacher import HELD_OUT, TopLogits, read_logits, read_windows

RISE = 0.05
"""Share of the steps in which the learning rate rises."""
LARGEST_GRADIENT = 1.0


class Judged(Protocol):
    """A model that can be measured by its teacher's answers."""

    device: str

    def judged(self, windows: torch.Tensor, teacher: TopLogits | None, **weights: float) -> Divergence:
        """The loss of ``windows (B, T)``; ``teacher`` is what it answered there."""


class HeldOut:
    """Windows that nothing is trained on, and what the teacher answers there, at the training's temperature."""

    def __init__(self, context: StepContext, temperature: float = 1.0) -> None:
        self._windows = read_windows(context, HELD_OUT)
        self._teacher = read_logits(context, "held_out")
        self._temperature = temperature

    def measured(self, student: Judged, tokens: int, phase: str) -> Json:
        """Means over windows, and the divergence of each; ``tokens`` have been trained on."""
        kl, ce = [], []
        with torch.no_grad():
            for at in range(len(self._windows)):
                rows = slice(at, at + 1)
                known = self._teacher.at(rows, student.device)
                one = student.judged(self._windows[rows], known, temperature=self._temperature)
                kl.append(float(one.kl))
                ce.append(float(one.ce))
        return {
            "tokens": tokens,
            "phase": phase,
            "kl": six_digits(sum(kl) / len(kl)),
            "ce": six_digits(sum(ce) / len(ce)),
            "windows": [six_digits(one) for one in kl],
        }


def rate_at(learning_rate: float, step: int, total: int) -> float:
    """The learning rate of ``step`` (from 0) of ``total``: a short rise, then a cosine to zero."""
    rise = max(1, round(RISE * total))
    return scheduled(learning_rate, "cosine", step, total) * min(1.0, (step + 1) / rise)


def parts_of(start: int, count: int, most: int) -> Iterator[slice]:
    """``count`` rows from ``start`` on, ``most`` at a time."""
    for first in range(start, start + count, most):
        yield slice(first, min(first + most, start + count))


def checkpoint_blocks(model: Any, config: Json) -> None:
    """Have each transformer block keep its input alone, and run once more in the backward pass.

    ``config`` is the model's config.json, which says where its blocks are.
    """
    modules = dict(model.named_modules())
    for path, _ in blocks_of(build(config)):
        block = modules[path]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
