"""The product as a function that torch differentiates in x, whichever code computes it.

``y = x W_hat^T``, so ``dL/dx = G W_hat`` with ``G = dL/dy``. W_hat is opened again tile by tile in backward; nothing is
kept for it but the packed matrix, which its layer holds anyway: neither x nor a dense weight. (The memory rule of
low-rank adapters on a packed base: QLoRA, arXiv 2305.14314; INT2.1, arXiv 2306.08162.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernels.dequant_matmul.operands import PackedWeight, check_operand

Product = Callable[[torch.Tensor, PackedWeight], torch.Tensor]
"""``(M, K)`` and a weight -> ``(M, N)`` for the product, ``(M, N)`` and a weight -> ``(M, K)`` for its gradient."""


class _DequantMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: PackedWeight, forward: Product, backward: Product) -> torch.Tensor:
        ctx.arguments = weight, forward, backward
        return forward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, forward, backward = ctx.arguments
        # The gradient is a product of the same kind, whose own gradient is the product.
        return _DequantMatmul.apply(gradients[0], weight, backward, forward), None, None, None


def differentiable(x: torch.Tensor, weight: PackedWeight, forward: Product, backward: Product) -> torch.Tensor:
    """x ``(..., K)`` -> ``(..., N)`` by ``forward``; its gradient by ``backward``."""
    check_operand(x, weight.inputs, "inputs")
    y: torch.Tensor = _DequantMatmul.apply(x.reshape(-1, weight.inputs), weight, forward, backward)
    return y.reshape(*x.shape[:-1], weight.outputs)
