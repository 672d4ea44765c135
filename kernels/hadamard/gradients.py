"""The transform as a function that torch differentiates, whichever code computes it.

With ``y = (x * s) Q`` and ``G = dL/dy``: ``dL/dx = (G Q^T) * s``, the transposed transform, and ``dL/ds`` is the sum
over rows of ``x * (G Q^T)``. With ``y = (x Q^T) * s`` they are ``(G * s) Q`` and the sum of ``G * (x Q^T)``. Nothing is
kept for that but the signs, and x where the signs are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.hadamard.factors import Plan

Transform = Callable[[torch.Tensor, Plan, torch.Tensor | None, bool], torch.Tensor]
"""``(x, plan, signs, transpose)`` -> the transformed x, of its shape and dtype; nothing is differentiated."""


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, signs: torch.Tensor | None, plan: Plan, transpose: bool, transform: Transform
    ) -> torch.Tensor:
        trained = signs is not None and signs.requires_grad
        ctx.save_for_backward(signs, x if trained else None)
        ctx.arguments = plan, transpose, transform
        return transform(x, plan, signs, transpose)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (signs, x) = gradients, ctx.saved_tensors
        plan, transpose, transform = ctx.arguments
        dx = differentiable(transform, dy, plan, signs, not transpose) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        turned, other = (x, dy) if transpose else (dy, x)
        product = differentiable(transform, turned, plan, None, True).to(signs.dtype) * other.to(signs.dtype)
        return dx, product.reshape(-1, plan.n).sum(dim=0), None, None, None


def differentiable(
    transform: Transform, x: torch.Tensor, plan: Plan, signs: torch.Tensor | None, transpose: bool
) -> torch.Tensor:
    """``transform`` of x, differentiable in x and signs as often as is asked."""
    y: torch.Tensor = _Transformed.apply(x, signs, plan, transpose, transform)
    return y


def check_operands(x: torch.Tensor, plan: Plan, signs: torch.Tensor | None) -> None:
    """Refuse what does not fit the plan's dimension."""
    if x.dim() == 0 or x.shape[-1] != plan.n or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} {x.dtype} does not fit a transform of dimension {plan.n}")
    if signs is not None and (tuple(signs.shape) != (plan.n,) or not signs.is_floating_point()):
        raise ValueError(f"signs of shape {tuple(signs.shape)} {signs.dtype} do not fit dimension {plan.n}")
