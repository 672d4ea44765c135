"""``y = x W^T + sum_masks (x (c * S)^T) + bias`` from packed signs, the obvious way: unpack, scale, multiply.

x ``(M, K)``, packed ``([[T,] masks,] ceil(K/32), N)`` int32, scale of any kind, y ``(M, N)`` in x's dtype; see
``kernels.binary_matmul.operands`` for the shapes. Each token takes the delta that ``segments`` gives it. Sums are in
fp32 (fp64 for fp64 input); a bf16 result is never narrowed to fp16 on the way, so it cannot overflow at 65504. Torch
differentiates it in x, scale and bias. BitDelta, arXiv 2402.10193; segments as in S-LoRA and Punica.
"""

from __future__ import annotations

import torch

from kernels.binary_matmul.operands import Operands, Segments, operands_of
from kernels.packing import unpack_signs


def binary_matmul(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    segments: Segments | None = None,
    group_size: int | None = None,
    invariant: bool | None = None,
) -> torch.Tensor:
    """x ``(M, K)`` -> ``(M, N)`` in x's dtype. ``invariant`` is the kernel's choice and changes nothing here."""
    del invariant
    operands = operands_of(x, packed, scale, weight=weight, bias=bias, segments=segments, group_size=group_size)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(accumulator)
    y = wide.new_zeros((len(x), packed.shape[-1])) if weight is None else wide @ weight.to(accumulator).T
    if segments is None:
        y = y + wide @ _delta(operands, 0, x.shape[1], accumulator).T
    else:
        for delta in range(len(operands.packed)):
            tokens = segments.order[segments.ids == delta].long()
            if len(tokens):
                y = y.index_add(0, tokens, wide[tokens] @ _delta(operands, delta, x.shape[1], accumulator).T)
    if bias is not None:
        y = y + (bias if bias.dim() == 1 else bias[_delta_of(len(x), segments)]).to(accumulator)
    return y.to(x.dtype)


def _delta(operands: Operands, delta: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """One delta, dense ``(N, K)``: its masks times their scales."""
    scales = operands.scale[delta].to(dtype)
    if scales.shape[2] > 1:
        scales = scales.repeat_interleave(operands.group_size, dim=2)[:, :, :inputs]
    first, *others = (
        unpack_signs(mask, inputs, dtype) * scale for mask, scale in zip(operands.packed[delta], scales, strict=True)
    )
    return sum(others, start=first)


def _delta_of(tokens: int, segments: Segments | None) -> torch.Tensor:
    """The delta of each token, which makes -1 the last row of a table."""
    if segments is None:
        return torch.zeros(tokens, dtype=torch.int64)
    return torch.empty_like(segments.ids, dtype=torch.int64).scatter_(0, segments.order.long(), segments.ids.long())
