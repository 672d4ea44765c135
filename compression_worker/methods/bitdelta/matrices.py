"""One coded matrix in training: its product with exact gradients by the scales.

``y = x W_b^T + scale * (x S^T)``; with ``G = dL/dy``: ``dL/dx = G W_b + scale * G S`` and ``dL/dscale = <G, x S^T>``;
where a mask has several scales, each takes the sum of ``(G^T x) * S`` over the weights that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.methods.bitdelta.coding import Coding, expand, gather


class SignedLinear(torch.autograd.Function):
    """x ``(..., K)``, base ``(N, K)``, signs ``(N, K)`` of +-1 in any dtype, scale one element -> ``(..., N)``.

    Base and signs need no gradient. The merged matrix is made again in the backward pass: it costs one pass over the
    weights, and keeping it would cost a second model.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: torch.Tensor, signs: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, base, signs, scale)
        return x @ merged(base, signs, scale, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        x, base, signs, scale = ctx.saved_tensors
        to_x = gradient @ merged(base, signs, scale, x.dtype) if ctx.needs_input_grad[0] else None
        to_scale = None
        if ctx.needs_input_grad[3]:
            delta = x.reshape(-1, x.shape[-1]) @ signs.to(x.dtype).T
            to_scale = (gradient.reshape(delta.shape) * delta).sum().reshape(scale.shape).to(scale.dtype)
        return to_x, None, None, to_scale


def merged(base: torch.Tensor, signs: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``W_b + scale * S`` in ``dtype``."""
    return base.to(dtype, copy=True).addcmul_(signs.to(dtype), scale.to(dtype))


class CodedLinear(torch.autograd.Function):
    """As :class:`SignedLinear` for a finer coding: signs ``(masks, N, K)``, scales ``(masks * values)``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor, coding: Coding
    ) -> torch.Tensor:
        ctx.save_for_backward(x, base, signs, scales)
        ctx.coding = coding
        return x @ stacked(base, signs, scales, coding, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        x, base, signs, scales = ctx.saved_tensors
        to_x = gradient @ stacked(base, signs, scales, ctx.coding, x.dtype) if ctx.needs_input_grad[0] else None
        to_scales = None
        if ctx.needs_input_grad[3]:
            to_weight = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            parts = [gather(to_weight * mask.to(to_weight.dtype), ctx.coding) for mask in signs]
            to_scales = torch.cat(parts).to(scales.dtype) if parts else torch.zeros_like(scales)
        return to_x, None, None, to_scales, None


def stacked(
    base: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor, coding: Coding, dtype: torch.dtype
) -> torch.Tensor:
    """``W_b + sum_i scale_i * S_i`` in ``dtype``."""
    whole = base.to(dtype, copy=True)
    for mask, scale in zip(signs, scales.to(dtype).view(len(signs), coding.values(*base.shape)), strict=True):
        whole.addcmul_(mask.to(dtype), expand(scale, coding, *base.shape))
    return whole


@dataclass(frozen=True)
class Matrix:
    """What a linear is built from: base ``(N, K)`` with the low-rank part in it, signs ``(masks, N, K)`` int8."""

    base: torch.Tensor
    signs: torch.Tensor
    coding: Coding

    def product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """``x (..., K)`` times the coded matrix, differentiable in x and scales."""
        if self.coding.plain:
            y: torch.Tensor = SignedLinear.apply(x, self.base, self.signs[0], scales.view(()))
        else:
            y = CodedLinear.apply(x, self.base, self.signs, scales, self.coding)
        return y


class CodedMatrix(torch.autograd.Function):
    """The coded matrix itself, ``(N, K)``, differentiable in its scales: for experts that share one parameter."""

    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor, coding: Coding
    ) -> torch.Tensor:
        ctx.save_for_backward(signs)
        ctx.coding = coding
        return stacked(base, signs, scales, coding, scales.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor | None, None]:
        (signs,) = ctx.saved_tensors
        parts = [gather(gradient * mask.to(gradient.dtype), ctx.coding) for mask in signs]
        return None, None, torch.cat(parts) if parts else None, None
