"""Match a student's logits to a teacher's: token windows in a seeded order, the masked loss, and Adam on one vector.

The state between steps is three vectors, so that a run may stop after any step and go on elsewhere with equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from compression_worker.contracts import CompressionError

BETAS = (0.9, 0.999)
EPSILON = 1e-8
SPARE_WINDOWS = 8


@dataclass(frozen=True)
class Batch:
    """``tokens (B, T)`` int64, right-padded; ``real (B, T)`` bool says which are text."""

    tokens: torch.Tensor
    real: torch.Tensor

    def to(self, device: str) -> Batch:
        """The same on another device."""
        return Batch(self.tokens.to(device), self.real.to(device))


class Windows:
    """Windows of at most ``length`` tokens cut from texts; which window comes when depends on the seed alone.

    Texts are taken in a seeded order until there are eight times as many windows as needed, or no text is left; those
    are shuffled. When the texts are few, the windows come round again, shuffled anew.
    """

    def __init__(
        self, texts: Sequence[str], encode: Callable[[str], list[int]], *, length: int, needed: int, seed: int
    ) -> None:
        self._seed = seed
        self._windows: list[list[int]] = []
        for index in _permutation(len(texts), seed, 0):
            tokens = encode(texts[index])
            cut = (tokens[start : start + length] for start in range(0, len(tokens), length))
            self._windows += [window for window in cut if len(window) > 1]
            if len(self._windows) >= SPARE_WINDOWS * needed:
                break
        if not self._windows:
            raise CompressionError("no_text", "the calibration text holds no two tokens in a row: give more text")

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, step: int, size: int) -> Batch:
        """The batch of training step ``step``, counted from 0."""
        rows = [self._window(step * size + row) for row in range(size)]
        return padded(rows)

    def _window(self, position: int) -> list[int]:
        turn, index = divmod(position, len(self._windows))
        return self._windows[_permutation(len(self._windows), self._seed, turn + 1)[index]]


def padded(rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of tokens as one batch, padded on the right with token 0."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.int64)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        real[index, : len(row)] = True
    return Batch(tokens, real)


def logit_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean over real positions and the vocabulary of the squared difference; padding does not count.

    Padding stands on the right of causal attention, so it does not reach the real positions either.
    """
    if not bool(real.all()):
        student_logits, teacher_logits = student_logits[real], teacher_logits[real]
    return torch.nn.functional.mse_loss(student_logits, teacher_logits)


@dataclass
class Adam:
    """Adam (no weight decay) on one fp32 vector, with everything it remembers in the open."""

    values: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor

    @classmethod
    def start(cls, values: torch.Tensor) -> Adam:
        return cls(values.clone(), torch.zeros_like(values), torch.zeros_like(values))

    def step(self, gradient: torch.Tensor, *, number: int, learning_rate: float) -> None:
        """``number`` counts from 1, over the whole run."""
        beta1, beta2 = BETAS
        self.first_moment.lerp_(gradient, 1 - beta1)
        self.second_moment.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean = self.first_moment / (1 - beta1**number)
        spread = (self.second_moment / (1 - beta2**number)).sqrt_().add_(EPSILON)
        self.values.addcdiv_(mean, spread, value=-learning_rate)


def scheduled(learning_rate: float, schedule: str, step: int, total: int) -> float:
    """The learning rate of ``step`` (from 0): ``cosine`` falls to zero over ``total`` steps, ``constant`` stays."""
    return learning_rate if schedule == "constant" else learning_rate * 0.5 * (1 + math.cos(math.pi * step / total))


def distill(
    adam: Adam,
    batches: Iterator[Batch],
    loss_of: Callable[[torch.Tensor, Batch], torch.Tensor],
    *,
    first: int,
    learning_rates: Sequence[float],
    watch: Callable[[int], None],
) -> list[float]:
    """One training step for each of ``learning_rates``; changes ``adam`` and returns the losses before each step.

    ``loss_of(values, batch)`` is differentiable in ``values``; ``first`` is the number of steps already made.
    """
    losses = []
    for done, rate in enumerate(learning_rates):
        values = adam.values.detach().requires_grad_(True)
        loss = loss_of(values, next(batches))
        (gradient,) = torch.autograd.grad(loss, values)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or not bool(gradient.isfinite().all()):
            raise CompressionError(
                "diverged",
                f"the loss of distillation step {first + done + 1} is not finite: lower learning_rate",
            )
        adam.step(gradient, number=first + done + 1, learning_rate=rate)
        watch(done + 1)
    return losses


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) % (1 << 63))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
