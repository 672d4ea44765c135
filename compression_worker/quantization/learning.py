"""What every training against stored answers shares: its steps and their rate, blocks computed twice, held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from compression_worker.architecture import blocks_of, build
from compression_worker.contracts import CompressionError, Json, StepContext
from compression_worker.distillation import scheduled
from compression_worker.making.table import six_digits
from compression_worker.quantization.divergence import Divergence
from compression_worker.quantization.passes import at_once
from compression_worker.quantization.ranks import joined
from compression_worker.quantization.teacher import HELD_OUT, TRAINED, TopLogits, read_logits, read_windows

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


def read_training(context: StepContext, batch_size: int) -> torch.Tensor:
    """The windows ``(W, T)`` of the optimizer steps that the step of the job stands for."""
    params = context.spec.params
    start, count = params["window"], (params["last"] - params["first"]) * batch_size
    return read_windows(context, TRAINED, slice(start, start + count))


def optimizer_steps(
    context: StepContext,
    optimizer: torch.optim.Optimizer,
    windows: torch.Tensor,
    loss_of: Callable[[slice], torch.Tensor],
    *,
    batch_size: int,
    vocabulary: int,
    learning_rate: float,
    begin: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """The loss of each optimizer step; a few windows go through the model at a time, and their gradients add up.

    ``loss_of`` rows of ``windows (W, T)`` is their mean; ``begin`` is told the number of each step before. Where this
    process is one of several that share the step (:mod:`compression_worker.quantization.ranks`), it takes its part of
    the windows, and losses and gradients are those of all together before they are clipped. Raises
    :class:`CompressionError` (``diverged``) where a loss or a gradient is not finite.
    """
    params = context.spec.params
    first, last = params["first"], params["last"]
    together = at_once(batch_size, windows.shape[1], vocabulary)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    with joined(context.device) as share:
        for step in range(first, last):
            begin(step)
            rows = share.rows((step - first) * batch_size, batch_size)
            loss = share.summed(_gradients(loss_of, rows, together, batch_size), trained)
            norm = torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
            if not math.isfinite(loss) or not bool(norm.isfinite()):
                raise CompressionError(
                    "diverged", f"the loss of training step {step + 1} is not finite: lower learning_rate"
                )
            optimizer.param_groups[0]["lr"] = rate_at(learning_rate, step, params["total"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            context.progress(step - first + 1, last - first, "training steps")
    return losses


def _gradients(loss_of: Callable[[slice], torch.Tensor], rows: slice, together: int, batch_size: int) -> float:
    """Add to the gradients what windows ``rows`` of a batch give; their part of its mean loss."""
    loss = 0.0
    for some in parts_of(rows.start, rows.stop - rows.start, together):
        part = loss_of(some) * ((some.stop - some.start) / batch_size)
        if part.requires_grad:  # not where nothing that learns took part
            part.backward()
        loss += float(part.detach())
    return loss


def round_parameters(parameters: Iterable[torch.nn.Parameter], dtype: str, setting: str, what: str) -> None:
    """Parameters as they will be stored, so that what is measured last is what is shipped.

    Raises :class:`CompressionError` (``not_finite``) where one does not fit ``dtype``, which ``setting`` chose.
    """
    stored = getattr(torch, dtype)
    with torch.no_grad():
        for parameter in parameters:
            if float(parameter.abs().max()) > torch.finfo(stored).max:
                raise CompressionError("not_finite", f"{what} does not fit {dtype}: set {setting}=bfloat16")
            parameter.copy_(parameter.to(stored))


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
