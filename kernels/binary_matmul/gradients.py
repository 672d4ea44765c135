"""Gradients of the binary product in Triton: for x, and for scales of every kind.

With ``G = dL/dy``: ``dL/dx = G W + sum_masks G (c * S)``, and ``dL/dc[t, mask, n, g]`` is the sum, over the tokens m of
delta t and the inputs k of group g, of ``G[m, n] x[m, k] S[n, k]`` (over n too where the outputs share a scale).
Partial sums go to memory and are added in order by torch: no atomics, the same bits on each run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.binary_matmul.operands import Operands
from kernels.binary_matmul.signs import open_signs, segment_of
from kernels.precision import dot_precision, upcast

BLOCK_N = 64
BLOCK_K = 64


@triton.jit
def _x_gradient_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, packed_ptr, scale_ptr, weight_ptr, order_ptr, ids_ptr, dx_ptr,
    M, N, K, words, deltas, group_size,
    stride_ym, stride_yn, stride_pm, stride_pr, stride_pn, stride_sm, stride_sn, stride_sc, stride_wn, stride_wk,
    MASKS: tl.constexpr, FUSED: tl.constexpr, MAPPED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, delta_of = segment_of(line, order_ptr, ids_ptr, M, MAPPED)
    row = row.to(tl.int64)
    index = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = tl.program_id(1) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    if FUSED:
        for start in range(0, N, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            dy = tl.load(
                dy_ptr + row[:, None] * stride_ym + columns[None, :] * stride_yn,
                mask=(line < M)[:, None] & (columns < N)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + columns.to(tl.int64)[:, None] * stride_wn + index[None, :] * stride_wk,
                mask=(columns < N)[:, None] & (index < K)[None, :],
                other=0.0,
            )
            if UPCAST:
                total += tl.dot(dy.to(tl.float32), w.to(tl.float32), input_precision="ieee")
            else:
                total += tl.dot(dy, w)
    delta = tl.min(tl.where(delta_of >= 0, delta_of, deltas))
    while delta < deltas:
        own = delta_of == delta
        for mask in range(MASKS):
            matrix = (delta * MASKS + mask).to(tl.int64)
            for start in range(0, N, BLOCK_N):
                columns = start + tl.arange(0, BLOCK_N)
                dy = tl.load(
                    dy_ptr + row[:, None] * stride_ym + columns[None, :] * stride_yn,
                    mask=own[:, None] & (columns < N)[None, :],
                    other=0.0,
                )
                word = tl.load(
                    packed_ptr + matrix * stride_pm + at[:, None] * stride_pr + columns[None, :] * stride_pn,
                    mask=(at < words)[:, None] & (columns < N)[None, :],
                    other=0,
                )
                scale = tl.load(
                    scale_ptr + matrix * stride_sm + columns[None, :] * stride_sn
                    + (index // group_size)[:, None] * stride_sc,
                    mask=(index < K)[:, None] & (columns < N)[None, :],
                    other=0.0,
                )  # fmt: skip
                weight = open_signs(word, BLOCK_K, BLOCK_N) * scale
                total += tl.dot(dy.to(tl.float32), tl.trans(weight), input_precision=PRECISION)
        delta = tl.min(tl.where(delta_of > delta, delta_of, deltas))
    total = tl.where(((delta_of >= -1) & (delta_of < deltas))[:, None], total, float("nan"))
    tl.store(
        dx_ptr + row[:, None] * K + index[None, :],
        total.to(dx_ptr.dtype.element_ty),
        mask=(line < M)[:, None] & (index < K)[None, :],
    )


@triton.jit
def _scale_gradient_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, x_ptr, packed_ptr, order_ptr, ids_ptr, starts_ptr, parts_ptr,
    M, N, K, words, lines, units,
    stride_ym, stride_yn, stride_xm, stride_xk, stride_pm, stride_pr, stride_pn,
    MASKS: tl.constexpr, MAPPED: tl.constexpr, UPCAST: tl.constexpr, BY_ROW: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    at = tl.program_id(1) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    delta = tl.program_id(2)
    if MAPPED:
        first, last = tl.load(starts_ptr + delta), tl.load(starts_ptr + delta + 1)
    else:
        first, last = 0, M
    outer = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        line = start + tl.arange(0, BLOCK_M)
        row, _ = segment_of(line, order_ptr, ids_ptr, M, MAPPED)
        row = row.to(tl.int64)
        dy = tl.load(
            dy_ptr + row[None, :] * stride_ym + columns[:, None] * stride_yn,
            mask=(line < last)[None, :] & (columns < N)[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + row[:, None] * stride_xm + index[None, :] * stride_xk,
            mask=(line < last)[:, None] & (index < K)[None, :],
            other=0.0,
        )
        if UPCAST:
            outer += tl.dot(dy.to(tl.float32), x.to(tl.float32), input_precision="ieee")
        else:
            outer += tl.dot(dy, x)
    unit = tl.program_id(1) * (BLOCK_K // UNIT) + tl.arange(0, BLOCK_K // UNIT)
    for mask in range(MASKS):
        matrix = (delta * MASKS + mask).to(tl.int64)
        word = tl.load(
            packed_ptr + matrix * stride_pm + at[:, None] * stride_pr + columns[None, :] * stride_pn,
            mask=(at < words)[:, None] & (columns < N)[None, :],
            other=0,
        )
        signed = outer * tl.trans(open_signs(word, BLOCK_K, BLOCK_N))
        sums = tl.sum(signed.reshape(BLOCK_N, BLOCK_K // UNIT, UNIT), axis=2)
        parts = parts_ptr + matrix * lines * units
        if BY_ROW:
            part_at = columns.to(tl.int64)[:, None] * units + unit[None, :]
            tl.store(parts + part_at, sums, mask=(columns < N)[:, None])
        else:
            tl.store(parts + tl.program_id(0).to(tl.int64) * units + unit, tl.sum(sums, axis=0))


def x_gradient(dy: torch.Tensor, x: torch.Tensor, operands: Operands) -> torch.Tensor:
    """dy ``(M, N)`` -> dx ``(M, K)`` in x's dtype."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not dx.numel():
        return dx
    (tokens, inputs), (deltas, masks, words, outputs) = x.shape, operands.packed.shape
    weight, segments, scale = operands.weight, operands.segments, operands.scale
    order, ids = (segments.order, segments.ids) if segments else (operands.packed, operands.packed)
    # Products of fp32 tiles are made by threads, which must hold them.
    block_m, warps = (16, 4) if tokens <= 16 else (32, 8) if upcast(x.dtype) else (64, 8)
    strides = (scale.stride(1), *(0 if scale.shape[axis] == 1 else scale.stride(axis) for axis in (2, 3)))
    _x_gradient_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(inputs, BLOCK_K))](
        dy, operands.packed, scale, dy if weight is None else weight, order, ids, dx,
        tokens, outputs, inputs, words, deltas, operands.group_size,
        *dy.stride(), *operands.packed.stride()[1:], *strides, *((0, 0) if weight is None else weight.stride()),
        MASKS=masks, FUSED=weight is not None, MAPPED=segments is not None, UPCAST=upcast(x.dtype),
        PRECISION=dot_precision(x.dtype), BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=warps,
    )  # fmt: skip
    return dx


def scale_gradient(dy: torch.Tensor, x: torch.Tensor, operands: Operands) -> torch.Tensor:
    """dy ``(M, N)``, x ``(M, K)`` -> the gradient of the scales, fp32, in their shape."""
    (tokens, inputs), (deltas, masks, words, outputs) = x.shape, operands.packed.shape
    rows, groups = operands.scale.shape[2:]
    # The finest sums that still add up to groups: a power of two that divides the group.
    unit = BLOCK_K if groups == 1 else math.gcd(operands.group_size, BLOCK_K)
    tiles, blocks = triton.cdiv(inputs, BLOCK_K), triton.cdiv(outputs, BLOCK_N)
    by_row = rows == outputs and rows > 1
    lines, units = outputs if by_row else blocks, tiles * (BLOCK_K // unit)
    parts = torch.empty((deltas, masks, lines, units), dtype=torch.float32, device=x.device)
    segments = operands.segments
    index = (segments.order, segments.ids, segments.starts) if segments else (operands.packed,) * 3
    if parts.numel():
        _scale_gradient_kernel[(blocks, tiles, deltas)](
            dy, x, operands.packed, *index, parts,
            tokens, outputs, inputs, words, lines, units,
            *dy.stride(), *x.stride(), *operands.packed.stride()[1:],
            MASKS=masks, MAPPED=segments is not None, UPCAST=upcast(x.dtype), BY_ROW=by_row, UNIT=unit,
            BLOCK_M=32, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    if groups == 1:
        sums = parts.sum(dim=3, keepdim=True)
    else:
        # Units past K are zero: cut or fill them so that each group has its own.
        each = operands.group_size // unit
        whole = torch.nn.functional.pad(parts, (0, groups * each - units))
        sums = whole.view(deltas, masks, lines, groups, each).sum(dim=4)
    return sums if by_row else sums.sum(dim=2, keepdim=True)
