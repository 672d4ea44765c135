"""``y = x W_hat^T`` from packed codes, the obvious way: open some inputs of the matrix, multiply, add; then the next.

x ``(..., K)``, y ``(..., N)`` in x's dtype; the packed weight as in ``kernels.dequant_matmul.layout``. Values and sums
are fp32 (fp64 for fp64 input). A tile of W_hat is all there ever is of it, in the product and in its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.dequant_matmul.gradients import differentiable
from kernels.dequant_matmul.layout import BLOCK, unpack_gptq, unpack_zeros
from kernels.dequant_matmul.operands import PackedWeight, packed_weight

TILE = 1 << 20
"""Weights opened at a time: 4 MB in fp32."""


def dequant_matmul(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x ``(..., K)`` -> ``(..., N)`` in x's dtype, differentiable in x. ValueError where x does not fit."""
    return differentiable(x, weight, product, gradient)


def dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    rows: slice | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """W_hat ``(N, K)`` of ``dtype``, or some of its rows, that is outputs. Values are rounded from fp32 once."""
    weight = packed_weight(qweight, qzeros, scales, g_idx, bits)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    opened = _opened(weight, accumulator, slice(None) if rows is None else rows)
    count = opened.scales.shape[1]
    dense = torch.empty((count, weight.inputs), dtype=dtype, device=qweight.device)
    step = max(BLOCK, TILE // weight.inputs)
    for start in range(0, count, step):
        outputs = slice(start, start + step)
        dense[outputs] = opened.tile(slice(0, weight.inputs), outputs).to(dtype).T
    return dense


def product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x ``(M, K)`` -> ``x W_hat^T (M, N)``."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.zeros((len(x), weight.outputs), dtype=accumulator, device=x.device)
    for inputs, tile in _tiles(weight, accumulator):
        y.addmm_(x[:, inputs].to(accumulator), tile)
    return y.to(x.dtype)


def gradient(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """dy ``(M, N)`` -> ``dy W_hat (M, K)``."""
    accumulator = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dx = torch.empty((len(dy), weight.inputs), dtype=dy.dtype, device=dy.device)
    wide = dy.to(accumulator)
    for inputs, tile in _tiles(weight, accumulator):
        dx[:, inputs] = (wide @ tile.T).to(dy.dtype)
    return dx


@dataclass(frozen=True)
class _Opened:
    """A weight, or some of its outputs, its zeros as numbers ``(G, N)`` uint8; ``dtype`` is what it is opened to."""

    weight: PackedWeight
    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    dtype: torch.dtype

    def tile(self, inputs: slice, outputs: slice = slice(None)) -> torch.Tensor:
        """``W_hat^T (inputs, outputs)`` of some whole blocks of inputs: ``scale * (code - zero)``."""
        bits, size = self.weight.bits, self.weight.group_size
        scales, zeros = self.scales[:, outputs], self.zeros[:, outputs]
        words = self.qweight[inputs.start * bits // 32 : inputs.stop * bits // 32, outputs]
        tile = unpack_gptq(words, bits, self.dtype)
        if size is None:
            group = self.weight.g_idx[inputs].long()
            return tile.sub_(zeros[group]).mul_(scales[group])
        for group in range(inputs.start // size, -(-inputs.stop // size)):
            part = tile[max(0, group * size - inputs.start) : (group + 1) * size - inputs.start]
            part.sub_(zeros[group].to(self.dtype)).mul_(scales[group].to(self.dtype))
        return tile


def _opened(weight: PackedWeight, dtype: torch.dtype, outputs: slice = slice(None)) -> _Opened:
    zeros = unpack_zeros(weight.qzeros, weight.bits)[:, outputs]
    return _Opened(weight, weight.qweight[:, outputs], weight.scales[:, outputs], zeros, dtype)


def _tiles(weight: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some inputs at a time, and ``W_hat^T (inputs, N)`` there."""
    opened = _opened(weight, dtype)
    step = max(1, TILE // (weight.outputs * BLOCK)) * BLOCK
    for start in range(0, weight.inputs, step):
        inputs = slice(start, min(weight.inputs, start + step))
        yield inputs, opened.tile(inputs)
