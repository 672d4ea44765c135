"""``y = x @ D_hat^T`` (``+ x @ W^T``) in Triton: the mask is made again in registers, codes are read where it keeps.

A tile of D_hat is ``BLOCK_N`` rows by ``BLOCK_K`` places. Groups of up to ``BLOCK_K`` elements lie whole in a tile,
padded to a power of two, and their smallest keys are searched there. A larger group spans ``chunks`` tiles; for those a
first kernel finds once, per row and group, the largest kept key (``limit``) and the last index kept among its ties
(``last``), and per tile how many elements are kept before it (``start``). The rank of an element among the kept of its
row finds its code. Values are fp32 in the product (TF32 on tensor cores for half inputs, so that a large zero point
cannot overflow fp16), sums are fp32, and scale and full factor are applied once at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.group_mask.kernel import keep_limit, smallest, span_of, tile_keys
from kernels.precision import check_dtype, dot_precision, upcast
from kernels.sparse_delta_matmul.reference import SparseDelta, check_operands

LARGEST_WHOLE = 128
"""The largest span of a group that is searched inside the product's own tile."""


@triton.jit(do_not_specialize=["seed", "tensor"])
def _plan_kernel(  # type: ignore[no-untyped-def]
    limit_ptr, last_ptr, start_ptr, seed, tensor, outputs, inputs, groups, group_size, ratio,
    SPAN: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    inner = tl.arange(0, SPAN)
    size = tl.minimum(group_size, inputs - group * group_size)
    keys = tile_keys(seed, tensor, row, group, 0, SPAN, SPAN)
    keys = tl.where(inner[None, :] < size, keys, 0xFFFFFFFF)
    kept = tl.cdiv(size, ratio) + row * 0
    limit, below = keep_limit(keys, kept)
    tied = keys == limit[:, None]
    tied = tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= (kept - below)[:, None])
    at = row.to(tl.int64) * groups + group
    tl.store(limit_ptr + at, limit.to(tl.int32, bitcast=True), mask=row < outputs)
    tl.store(last_ptr + at, tl.max(tl.where(tied, inner[None, :], -1), axis=1), mask=row < outputs)
    hits = ((keys < limit[:, None]) | tied).to(tl.int32).reshape(ROWS, SPAN // BLOCK_K, BLOCK_K)
    count = tl.sum(hits, axis=2)
    chunks, chunk = tl.cdiv(group_size, BLOCK_K), tl.arange(0, SPAN // BLOCK_K)
    tl.store(
        start_ptr + at[:, None] * chunks + chunk[None, :],
        tl.cumsum(count, axis=1) - count,
        mask=(row[:, None] < outputs) & (chunk[None, :] < chunks),
    )


@triton.jit
def _places(tile, group_size, SPAN: tl.constexpr, PLANNED: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first group of a tile, and of each of its places the group and the index inside."""
    place = tl.arange(0, BLOCK_K)
    if PLANNED:
        chunks = tl.cdiv(group_size, BLOCK_K)
        first = tile // chunks
        group, inner = first + place * 0, (tile % chunks) * BLOCK_K + place
    else:
        first = tile * (BLOCK_K // SPAN)
        group, inner = first + place // SPAN, place % SPAN
    return first, group, inner


@triton.jit
def _delta_tile(  # type: ignore[no-untyped-def]
    tile, row, words_ptr, limit_ptr, last_ptr, start_ptr, seed, tensor,
    outputs, inputs, width, groups, group_size, ratio, zero, rest_factor,
    BITS: tl.constexpr, SPAN: tl.constexpr, PLANNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile's columns, which of its places are columns, and D_hat there ``(BLOCK_N, BLOCK_K)`` before the scale."""
    first, group, inner = _places(tile, group_size, SPAN, PLANNED, BLOCK_K)
    size = tl.minimum(group_size, inputs - group * group_size)
    is_column = inner < size
    before = first * tl.cdiv(group_size, ratio) + row * 0
    if PLANNED:
        chunks = tl.cdiv(group_size, BLOCK_K)
        keys = tile_keys(seed, tensor, row, first, (tile % chunks) * (BLOCK_K // 4), BLOCK_K, BLOCK_K)
        at = row.to(tl.int64) * groups + first
        limit = tl.load(limit_ptr + at, mask=row < outputs, other=0).to(tl.uint32, bitcast=True)[:, None]
        last = tl.load(last_ptr + at, mask=row < outputs, other=-1)[:, None]
        before += tl.load(start_ptr + at * chunks + tile % chunks, mask=row < outputs, other=0)
        kept = (keys < limit) | ((keys == limit) & (inner[None, :] <= last))
    else:
        keys = tile_keys(seed, tensor, row, first, 0, SPAN, BLOCK_K)
        keys = tl.where(is_column[None, :], keys, 0xFFFFFFFF)
        line = first + tl.arange(0, BLOCK_N * BLOCK_K // SPAN) % (BLOCK_K // SPAN)
        count = tl.cdiv(tl.maximum(tl.minimum(group_size, inputs - line * group_size), 0), ratio)
        kept = smallest(keys.reshape(BLOCK_N * BLOCK_K // SPAN, SPAN), count).reshape(BLOCK_N, BLOCK_K)
    kept = kept & is_column[None, :] & (row < outputs)[:, None]
    rank = before[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - 1
    bit = rank * BITS
    shift = (bit % 32).to(tl.uint32)
    word_ptr = words_ptr + row.to(tl.int64)[:, None] * width + bit // 32
    code = tl.load(word_ptr, mask=kept, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        # A code may end in the next word. Where it does, its shift is not zero.
        crosses = kept & (shift + BITS > 32)
        code = code | (tl.load(word_ptr + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True) << ((32 - shift) % 32))
    value = (code & ((1 << BITS) - 1)).to(tl.float32) - zero
    value = value * tl.where(size == group_size, 1.0, rest_factor)[None, :]
    return group * group_size + inner, is_column, tl.where(kept, value, 0.0)


@triton.jit(do_not_specialize=["seed", "tensor"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, base_ptr, y_ptr, words_ptr, limit_ptr, last_ptr, start_ptr, seed, tensor, scale, zero, rest_factor,
    M, N, K, width, groups, group_size, ratio, tiles,
    stride_xm, stride_xk, stride_wn, stride_wk,
    BITS: tl.constexpr, SPAN: tl.constexpr, PLANNED: tl.constexpr, FUSED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64-bit offsets: M * K and N * K pass 2^31 elements on long batches and wide layers.
    x_row, w_row = rows.to(tl.int64)[:, None] * stride_xm, columns.to(tl.int64)[None, :] * stride_wn
    delta = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(0, tiles):
        index, is_column, value = _delta_tile(
            tile, columns, words_ptr, limit_ptr, last_ptr, start_ptr, seed, tensor,
            N, K, width, groups, group_size, ratio, zero, rest_factor, BITS, SPAN, PLANNED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        x = tl.load(
            x_ptr + x_row + index[None, :] * stride_xk, mask=(rows[:, None] < M) & is_column[None, :], other=0.0
        )
        delta += tl.dot(x.to(tl.float32), tl.trans(value), input_precision=PRECISION)
        if FUSED:
            is_weight = is_column[:, None] & (columns[None, :] < N)
            w = tl.load(base_ptr + w_row + index[:, None] * stride_wk, mask=is_weight, other=0.0)
            if UPCAST:
                total += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
            else:
                total += tl.dot(x, w)
    tl.store(
        y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :],
        (total + scale * delta).to(y_ptr.dtype.element_ty),
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


@triton.jit(do_not_specialize=["seed", "tensor"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, base_ptr, dx_ptr, words_ptr, limit_ptr, last_ptr, start_ptr, seed, tensor, scale, zero, rest_factor,
    M, N, K, width, groups, group_size, ratio,
    stride_ym, stride_yn, stride_wn, stride_wk,
    BITS: tl.constexpr, SPAN: tl.constexpr, PLANNED: tl.constexpr, FUSED: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    delta = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        index, is_column, value = _delta_tile(
            tl.program_id(1), columns, words_ptr, limit_ptr, last_ptr, start_ptr, seed, tensor,
            N, K, width, groups, group_size, ratio, zero, rest_factor, BITS, SPAN, PLANNED, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        dy = tl.load(
            dy_ptr + rows.to(tl.int64)[:, None] * stride_ym + columns[None, :] * stride_yn,
            mask=(rows[:, None] < M) & (columns[None, :] < N),
            other=0.0,
        )
        delta += tl.dot(dy.to(tl.float32), value, input_precision=PRECISION)
        if FUSED:
            w = tl.load(
                base_ptr + columns.to(tl.int64)[:, None] * stride_wn + index[None, :] * stride_wk,
                mask=(columns[:, None] < N) & is_column[None, :],
                other=0.0,
            )
            if UPCAST:
                total += tl.dot(dy.to(tl.float32), w.to(tl.float32), input_precision="ieee")
            else:
                total += tl.dot(dy, w)
    _, group, inner = _places(tl.program_id(1), group_size, SPAN, PLANNED, BLOCK_K)
    index = group * group_size + inner
    tl.store(
        dx_ptr + rows.to(tl.int64)[:, None] * K + index[None, :],
        (total + scale * delta).to(dx_ptr.dtype.element_ty),
        mask=(rows[:, None] < M) & (inner < group_size)[None, :] & (index < K)[None, :],
    )


class _SparseDeltaMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, delta: SparseDelta, base: torch.Tensor | None) -> torch.Tensor:
        ctx.delta, ctx.base = delta, base
        y = torch.empty((len(x), len(delta.words)), dtype=x.dtype, device=x.device)
        _launch(_forward_kernel, x, delta, base, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (dy,) = gradients
        dx = torch.empty((len(dy), ctx.delta.inputs), dtype=dy.dtype, device=dy.device)
        _launch(_backward_kernel, dy, ctx.delta, ctx.base, dx)
        return dx, None, None


def _launch(kernel: Any, left: torch.Tensor, delta: SparseDelta, base: torch.Tensor | None, out: torch.Tensor) -> None:
    """Run the product of ``left`` and the delta, and of ``left`` and the base, into ``out``."""
    rows, inputs, group_size = len(left), delta.inputs, min(delta.group_size, delta.inputs)
    if not out.numel():
        return
    count = len(delta.words)
    span, groups = span_of(group_size), -(-inputs // group_size)
    planned = span > LARGEST_WHOLE
    block_k = LARGEST_WHOLE if span > 64 else 64
    tiles = groups * -(-group_size // block_k) if planned else -(-groups // (block_k // span))
    plan = _plan(delta, group_size, span, groups, block_k) if planned else (delta.words,) * 3
    rest = inputs % group_size
    whole_factor = group_size / -(-group_size // delta.ratio)
    rest_factor = (rest / -(-rest // delta.ratio)) / whole_factor if rest else 1.0
    block_m, block_n = (16, 32) if rows <= 16 else (64, 32)
    forward = kernel is _forward_kernel
    grid = (triton.cdiv(rows, block_m), triton.cdiv(count, block_n) if forward else tiles)
    weight = out if base is None else base
    kernel[grid](
        left, weight, out, delta.words, *plan, delta.seed, delta.tensor,
        delta.scale * whole_factor, float(delta.zero), rest_factor,
        rows, count, inputs, delta.words.stride(0), groups, group_size, delta.ratio, *((tiles,) if forward else ()),
        left.stride(0), left.stride(1), weight.stride(0), weight.stride(1),
        BITS=delta.bits, SPAN=span, PLANNED=planned, FUSED=base is not None, UPCAST=upcast(left.dtype),
        PRECISION=dot_precision(left.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4 if block_k == 64 else 8,
    )  # fmt: skip


def _plan(
    delta: SparseDelta, group_size: int, span: int, groups: int, block_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row and group the largest kept key and the last tie kept; per tile how many are kept before it."""
    outputs, device = len(delta.words), delta.words.device
    limit, last = (torch.empty((outputs, groups), dtype=torch.int32, device=device) for _ in range(2))
    start = torch.empty((outputs, groups, -(-group_size // block_k)), dtype=torch.int32, device=device)
    rows = max(1, 2048 // span)
    _plan_kernel[(triton.cdiv(outputs, rows), groups)](
        limit, last, start, delta.seed, delta.tensor, outputs, delta.inputs, groups, group_size, delta.ratio,
        SPAN=span, BLOCK_K=block_k, ROWS=rows, num_warps=4 if span <= 4096 else 8,
    )  # fmt: skip
    return limit, last, start


def sparse_delta_matmul(x: torch.Tensor, delta: SparseDelta, base: torch.Tensor | None = None) -> torch.Tensor:
    """x ``(M, K)``, optionally base ``(N, K)`` -> ``(M, N)`` in x's dtype; differentiable in x. Sums are fp32."""
    check_operands(x, delta, base)
    check_dtype(x.dtype)
    if delta.words.stride(1) != 1:
        raise ValueError("the words of a row lie one after the other: make them contiguous")
    y: torch.Tensor = _SparseDeltaMatmul.apply(x, delta, base)
    return y
