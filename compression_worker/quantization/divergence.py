"""The loss that matches a student's answers to stored ones: KL over the likeliest tokens, all others being one class.

Of one place: ``p`` the teacher's probabilities of ``k`` tokens, ``p_0`` those of all others together; ``q``, ``q_0``
the student's of the same classes at the same temperature ``T``, from its logits ``z``; ``y`` the token that comes.

    L = (1 - c) T^2 KL + c CE,    KL = sum_i p_i ln(p_i / q_i) + p_0 ln(p_0 / q_0),    CE = -ln softmax(z)_y

and, averaged over places, ``dKL/dz_j = (q_j - p_j) / T`` for the ``k`` tokens, ``q_j (1 - p_0 / q_0) / T`` for others.
Grouping classes can only lower KL: what is measured with k below the vocabulary is a lower bound.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.quantization.teacher import TopLogits

ROWS = 128
"""Places at a time, so that no second copy of the logits is ever whole beside their gradient."""
LEAST = 1e-30


@dataclass(frozen=True)
class Divergence:
    """``loss`` has a gradient; ``kl`` and ``ce`` are what it was made of, in nats a token."""

    loss: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor


def divergence(
    logits: torch.Tensor,
    teacher: TopLogits | None,
    windows: torch.Tensor,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
) -> Divergence:
    """Means over all places of ``windows (B, T)`` whose next token is known; ``logits (B, T, V)``.

    Without a teacher it is cross-entropy alone, and kl is 0.
    """
    weight = 1.0 if teacher is None else ce_weight
    known = (teacher.tokens, teacher.log_probs, teacher.rest) if teacher else (None, None, None)
    return Divergence(*_Divergence.apply(logits, *known, windows, temperature, weight))


class _Divergence(torch.autograd.Function):
    """The gradient is made with the loss, so that logits are not kept for it and no probability is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        tokens: torch.Tensor | None,
        log_probs: torch.Tensor | None,
        rest: torch.Tensor | None,
        windows: torch.Tensor,
        temperature: float,
        ce_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        sums = torch.zeros(2, dtype=torch.float64, device=logits.device)
        batch, length = windows.shape
        count = batch * (length - 1)
        for at, start in itertools.product(range(batch), range(0, length - 1, ROWS)):
            places = slice(start, min(start + ROWS, length - 1))
            z = logits[at, places].to(torch.promote_types(logits.dtype, torch.float32))
            next_tokens = windows[at, start + 1 : places.stop + 1, None]
            q = z.softmax(dim=-1)
            sums[1] -= q.gather(1, next_tokens).clamp_min(LEAST).log().sum(dtype=torch.float64)
            slope = None
            if ce_weight:
                slope = q * ce_weight
                slope.scatter_add_(1, next_tokens, torch.full_like(next_tokens, -ce_weight, dtype=slope.dtype))
            if tokens is not None and log_probs is not None and rest is not None:
                q = q if temperature == 1.0 else (z / temperature).softmax(dim=-1)
                kl, matched = _matched(q, tokens[at, places], log_probs[at, places].to(q), rest[at, places].to(q))
                sums[0] += kl
                matched.mul_((1 - ce_weight) * temperature)
                slope = matched if slope is None else slope.add_(matched)
            if ctx.gradient is not None and slope is not None:
                ctx.gradient[at, places] = slope.div_(count)
        kl, ce = sums / count
        ctx.mark_non_differentiable(kl, ce)
        loss = (1 - ce_weight) * temperature**2 * kl + ce_weight * ce
        return loss.to(torch.promote_types(logits.dtype, torch.float32)), kl, ce

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient.mul_(gradients[0]), None, None, None, None, None, None


def _matched(
    q: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor, rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of KL over places, and ``q - p`` with the others' share of ``p_0``; takes ``q (P, V)`` for its memory."""
    p, p_rest = log_probs.exp(), rest.exp()
    named = q.gather(1, tokens)
    others = q.scatter(1, tokens, 0.0).sum(dim=-1).clamp_min(LEAST)
    kl = (p * (log_probs - named.clamp_min(LEAST).log())).sum(dtype=torch.float64)
    kl += torch.where(p_rest > 0, p_rest * (rest - others.log()), 0.0).sum(dtype=torch.float64)
    q.mul_((1 - p_rest / others)[:, None])
    return kl, q.scatter_(1, tokens, named - p)
