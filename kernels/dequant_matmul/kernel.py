"""The product with a packed group grid in Triton: codes are read once and opened in registers, forward and backward.

Each program makes a ``(BLOCK_M, BLOCK_N)`` tile of y. Where a step over K lies inside one group, x is multiplied by
``code + 2^bits``, which halves hold exactly, and the fp32 sum is put right for the group: less ``zero + 2^bits`` times
the sum of x, times the scale. Finer groups and groups in any order (``g_idx``) take ``scale * (code - zero)`` for each
weight, rounded to x's dtype. fp32 input takes fp32 products.

For few tokens K is cut into spans of ``SPAN``, each with a program of its own, and a second kernel adds them in order
(split-K without atomics); above ``FEW_TOKENS`` the tiles of M are programs enough. ``dx = G W_hat`` opens the same
codes again, tile by tile. Grids depend on shapes alone and nothing waits for the device, so a call can be captured in a
CUDA graph; the same call gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.dequant_matmul.codes import magic, open_pairs, open_values, pair_up, read_units, read_zeros
from kernels.dequant_matmul.gradients import differentiable
from kernels.dequant_matmul.operands import PackedWeight
from kernels.precision import check_dtype, upcast

SPAN = 512
"""Inputs summed by one program: 8 programs along a K of 4096 make its 32 tiles of N enough to keep memory busy."""
FEW_TOKENS = 64
ENOUGH_PROGRAMS = 256
"""About two for each multiprocessor of the largest GPU."""


@triton.jit
def _packed_kernel(  # type: ignore[no-untyped-def]
    x_ptr, qweight_ptr, qzeros_ptr, scales_ptr, g_idx_ptr, out_ptr,
    M, N, K, group_size, ones, offset, stride_xm, stride_xk,
    BITS: tl.constexpr, LOW: tl.constexpr, IN_ORDER: tl.constexpr, ALIKE: tl.constexpr, UPCAST: tl.constexpr,
    SPAN: tl.constexpr, SPREAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64-bit offsets: M * K and N * K pass 2^31 elements on long batches and wide layers.
    x_row = rows.to(tl.int64)[:, None] * stride_xm
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if SPREAD:
        first, last = tl.program_id(2) * SPAN, tl.minimum(K, (tl.program_id(2) + 1) * SPAN)
    else:
        first, last = 0, K
    for start in range(first, last, BLOCK_K):
        index = start + tl.arange(0, BLOCK_K)
        is_x = (rows < M)[:, None] & (index < last)[None, :]
        x = tl.load(x_ptr + x_row + index[None, :] * stride_xk, mask=is_x, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        if ALIKE:
            group = (start + columns * 0) // group_size
            unit = read_units(qweight_ptr, start, columns, N, K, BITS, BLOCK_K)
            zero = read_zeros(qzeros_ptr, group, columns, columns < N, N, BITS)
            scale = tl.load(scales_ptr + group.to(tl.int64) * N + columns, mask=columns < N, other=0.0).to(tl.float32)
            code = open_pairs(unit, ones, x.dtype, BITS, LOW, BLOCK_N, BLOCK_K)
            product = tl.dot(pair_up(x, BITS, BLOCK_M, BLOCK_K), tl.trans(code), input_precision="ieee")
            sums = tl.sum(x.to(tl.float32), axis=1)
            total += (product - sums[:, None] * (zero + offset)[None, :]) * scale[None, :]
        else:
            value = open_values(
                qweight_ptr, qzeros_ptr, scales_ptr, g_idx_ptr, start, columns, N, K, group_size,
                BITS, IN_ORDER, ALIKE, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            total += tl.dot(x, tl.trans(value.to(x.dtype)), input_precision="ieee")
    line = rows.to(tl.int64)
    if SPREAD:
        line += tl.program_id(2).to(tl.int64) * M
    tl.store(
        out_ptr + line[:, None] * N + columns[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < N)[None, :],
    )


@triton.jit
def _add_parts_kernel(parts_ptr, y_ptr, size, parts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(0, parts):
        total += tl.load(parts_ptr + tl.cast(part, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _packed_gradient_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, qweight_ptr, qzeros_ptr, scales_ptr, g_idx_ptr, dx_ptr,
    M, N, K, group_size, stride_ym, stride_yn,
    BITS: tl.constexpr, IN_ORDER: tl.constexpr, ALIKE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_K
    y_row = rows.to(tl.int64)[:, None] * stride_ym
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        is_dy = (rows < M)[:, None] & (columns < N)[None, :]
        dy = tl.load(dy_ptr + y_row + columns[None, :] * stride_yn, mask=is_dy, other=0.0)
        if UPCAST:
            dy = dy.to(tl.float32)
        value = open_values(
            qweight_ptr, qzeros_ptr, scales_ptr, g_idx_ptr, first, columns, N, K, group_size,
            BITS, IN_ORDER, ALIKE, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = tl.dot(dy, value.to(dy.dtype), total, input_precision="ieee")
    index = first + tl.arange(0, BLOCK_K)
    tl.store(
        dx_ptr + rows.to(tl.int64)[:, None] * K + index[None, :],
        total.to(dx_ptr.dtype.element_ty),
        mask=(rows < M)[:, None] & (index < K)[None, :],
    )


def dequant_matmul(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x ``(..., K)`` -> ``(..., N)`` in x's dtype (fp32, fp16, bf16), differentiable in x."""
    check_dtype(x.dtype)
    return differentiable(x, weight, product, gradient)


def product(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x ``(M, K)`` -> ``x W_hat^T (M, N)``."""
    tokens, inputs, outputs = len(x), weight.inputs, weight.outputs
    y = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    spans = triton.cdiv(inputs, SPAN) if tokens <= FEW_TOKENS else 1
    block_m, block_n, block_k, warps = _tile(few=tokens <= 16, wide=upcast(x.dtype), weight=weight)
    out = torch.empty((spans, tokens, outputs), dtype=torch.float32, device=x.device) if spans > 1 else y
    ones, low, offset = magic(torch.float32 if upcast(x.dtype) else x.dtype, weight.bits)
    _packed_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(outputs, block_n), spans)](
        x, weight.qweight, weight.qzeros, weight.scales, weight.g_idx, out,
        tokens, outputs, inputs, weight.group_size or inputs, ones, offset, *x.stride(),
        BITS=weight.bits, LOW=low, IN_ORDER=weight.group_size is not None, ALIKE=_alike(weight, block_k),
        UPCAST=upcast(x.dtype), SPAN=SPAN, SPREAD=spans > 1,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    if spans > 1:
        _add_parts_kernel[(triton.cdiv(y.numel(), 1024),)](out, y, y.numel(), spans, BLOCK=1024)
    return y


def gradient(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """dy ``(M, N)`` -> ``dy W_hat (M, K)``."""
    tokens, inputs, outputs = len(dy), weight.inputs, weight.outputs
    dx = torch.empty((tokens, inputs), dtype=dy.dtype, device=dy.device)
    if not dx.numel():
        return dx
    wide = upcast(dy.dtype)
    block_m, warps = (16, 4) if tokens <= 16 else (32, 8) if wide else (64, 8)
    block_n, block_k = 32 if wide else 64, 32 if _alike(weight, 32) and not _alike(weight, 64) else 64
    _packed_gradient_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(inputs, block_k))](
        dy, weight.qweight, weight.qzeros, weight.scales, weight.g_idx, dx,
        tokens, outputs, inputs, weight.group_size or inputs, *dy.stride(),
        BITS=weight.bits, IN_ORDER=weight.group_size is not None, ALIKE=_alike(weight, block_k), UPCAST=wide,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return dx


def _tile(*, few: bool, wide: bool, weight: PackedWeight) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K and warps. ``wide`` products are of fp32 tiles, which registers must hold; a step over
    K lies inside a group where groups are long enough."""
    step = 128 if few and not wide and _alike(weight, 128) else 64 if _alike(weight, 64) else 32
    if wide:
        return (16, 64, min(step, 64), 4) if few else (32, 64, min(step, 64), 8)
    if not few:
        return 64, 128, step, 8
    # What is done with x once a step costs less by the weight in a wide tile, where there is work enough for all.
    spans = triton.cdiv(weight.inputs, SPAN)
    return 16, 256 if _alike(weight, 64) and weight.outputs // 256 * spans >= ENOUGH_PROGRAMS else 128, step, 4


def _alike(weight: PackedWeight, step: int) -> bool:
    """Whether all inputs of each step share a group."""
    size = weight.group_size
    return size is not None and (size % step == 0 or size >= weight.inputs)
