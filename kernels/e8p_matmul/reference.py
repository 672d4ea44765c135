"""``y = x @ W_hat^T`` for a matrix in code words of E8P, the obvious way: decode some rows, multiply, go on.

W_hat ``(N, K)``, K a multiple of 8, is ``scale * (q1 + q2 / r)``: q1 the points of ``first (N, K / 8)`` int16, one code
word for 8 inputs of an output, and q2 those of ``second (N, K / 8)``, absent at 2 bits, uint8 at 3 bits and int16 code
words again at 4 bits. Rows are decoded a tile at a time, so that no more than :data:`TILE_ELEMENTS` weights stand in
memory, and the gradient for x decodes them again: nothing but codes is kept. QuIP#, arXiv 2402.04396, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kernels.e8p_matmul.codebook import quarters_of, second_quarters_of

TILE_ELEMENTS = 1 << 19
"""Weights decoded together: 2 MB of fp32."""


@dataclass(frozen=True)
class E8PWeight:
    """W_hat in code words: ``first`` and ``second`` as above, r (of no effect at 2 bits) and the scale."""

    first: torch.Tensor
    second: torch.Tensor | None = None
    residual_scale: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.first.dim() != 2 or self.first.dtype != torch.int16:
            raise ValueError(f"code words are int16 (N, K / 8), not {self.first.dtype} {tuple(self.first.shape)}")
        second = self.second
        if second is not None and (second.dtype not in (torch.uint8, torch.int16) or second.shape != self.first.shape):
            shape = tuple(self.first.shape)
            raise ValueError(f"the second stage is uint8 or int16 {shape}, not {second.dtype} {tuple(second.shape)}")
        if not self.residual_scale > 0:
            raise ValueError(f"the scale of the second stage is positive, not {self.residual_scale}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.first.shape[0], 8 * self.first.shape[1]

    @property
    def bits(self) -> int:
        """Bits a weight: 2, 3 or 4."""
        if self.second is None:
            return 2
        return 3 if self.second.dtype == torch.uint8 else 4


def check_operands(x: torch.Tensor, weight: E8PWeight) -> None:
    """Refuse an x that does not fit."""
    if x.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit code words for {weight.shape[1]} inputs")


def decode_matrix(weight: E8PWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W_hat ``(N, K)`` whole, on the device of its codes."""
    whole = torch.empty(weight.shape, dtype=dtype, device=weight.first.device)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, tile in _tiles(weight, accumulator):
        torch.mul(tile, weight.scale / 4, out=whole[rows])
    return whole


def e8p_matmul(x: torch.Tensor, weight: E8PWeight) -> torch.Tensor:
    """x ``(M, K)`` -> ``(M, N)`` in x's dtype; differentiable in x. Sums are fp32 (fp64 for fp64 input)."""
    check_operands(x, weight)
    y: torch.Tensor = _E8PMatmul.apply(x, weight)
    return y


class _E8PMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: E8PWeight) -> torch.Tensor:
        ctx.weight = weight
        wide = x.to(_accumulator(x))
        y = x.new_empty((len(x), weight.shape[0]))
        for rows, tile in _tiles(weight, wide.dtype):
            y[:, rows] = (wide @ tile.T).mul_(weight.scale / 4)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (dy,), weight = gradients, ctx.weight
        wide = dy.to(_accumulator(dy)) * (weight.scale / 4)
        dx = wide.new_zeros((len(dy), weight.shape[1]))
        for rows, tile in _tiles(weight, wide.dtype):
            dx.addmm_(wide[:, rows], tile)
        return dx.to(dy.dtype), None


def _accumulator(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(weight: E8PWeight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows after the other, and what they are ``(rows, K)`` in quarters of the scale, in the same memory."""
    outputs, inputs = weight.shape
    step = min(outputs, max(1, TILE_ELEMENTS // max(1, inputs)))
    memory = torch.empty((step, inputs), dtype=dtype, device=weight.first.device)
    for start in range(0, outputs, max(1, step)):
        rows = slice(start, min(start + step, outputs))
        tile = memory[: rows.stop - start].copy_(quarters_of(weight.first[rows]).view(-1, inputs))
        if weight.second is not None:
            opened = second_quarters_of if weight.bits == 3 else quarters_of
            tile.add_(opened(weight.second[rows]).view(-1, inputs), alpha=1 / weight.residual_scale)
        yield rows, tile
