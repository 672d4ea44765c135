"""The transform in Triton: ``(x * s) Q`` and ``(x Q^T) * s``, each number read and written once where it can be.

Hadamard matrices are multiplied by the matrix units: entries of +-1 are exact in any format, so only x is rounded, to
TF32 for half inputs (as fine as fp16 and finer than bf16), and split into two of that for fp32. Sums are fp32.

A Sylvester matrix of order m = m1 m2 is two products of a tile in registers, with m2 and, turned round, with m1; its
entries ``(-1)^popcount(i & j)`` are made on the spot, and orders below 16 stand side by side in one of 16. Rows of
up to ``LARGEST_ROW`` numbers take that kernel alone. Otherwise a row is ``(h, inner)``: a second kernel multiplies
along its first axis by a dense matrix (Paley's, with what is too much of Sylvester's), then along the second by
Sylvester's in the same registers; the columns of several rows are one axis, so that a short ``inner`` fills the tiles
too. A plan of several Paley factors takes one such pass for each, with fp32 between them. A Fourier plan is torch's
FFT.

Grids depend on shapes alone, nothing is added atomically and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from kernels.hadamard import reference
from kernels.hadamard.factors import Plan, hadamard_matrix
from kernels.hadamard.gradients import check_operands, differentiable
from kernels.precision import check_dtype

LARGEST_ROW = 8192
"""Up to here Sylvester's matrix is multiplied in one tile, which registers hold."""
LARGEST_INNER = 1024
"""Up to here it follows a dense factor in the same tile."""
LARGEST_JOINED = 256
"""Up to here what is left of it joins the last dense factor; above, it takes a pass of its own."""
TILE = 4096
"""Numbers that a program of short rows transforms."""
UNSIGNED, BEFORE, AFTER = 0, 1, 2


@triton.jit
def _sylvester_matrix(ORDER: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """``I kron H_ORDER``, ``(WIDTH, WIDTH)`` fp32; ORDER up to 256."""
    row, column = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    both = (row & column) % ORDER
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    return tl.where(row // ORDER == column // ORDER, 1.0 - 2.0 * (both & 1).to(tl.float32), 0.0)


@triton.jit
def _coarse(x):  # type: ignore[no-untyped-def]
    """fp32 cut to the ten bits that the matrix units read of it; the rest, ``x - _coarse(x)``, is exact."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _times(x, matrix, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x @ matrix`` for a matrix of small whole numbers."""
    if SPLIT:
        high = _coarse(x)
        y = tl.dot(x - high, matrix, input_precision="tf32")
        return tl.dot(high, matrix, y, input_precision="tf32")
    else:
        return tl.dot(x, matrix, input_precision="tf32")


@triton.jit
def _sylvester(tile, SIZE: tl.constexpr, ORDER: tl.constexpr, LEFT: tl.constexpr, SPLIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each ``ORDER`` neighbours of a tile of SIZE numbers, whose last axis they divide, times ``H_ORDER``: a flat tile.

    ORDER is ``LEFT * right``; LEFT 1 makes it one product.
    """
    RIGHT: tl.constexpr = ORDER // LEFT
    WIDTH: tl.constexpr = RIGHT if RIGHT > 16 else 16
    if ORDER > 1:
        tile = _times(tile.reshape(SIZE // WIDTH, WIDTH), _sylvester_matrix(RIGHT, WIDTH), SPLIT)
    if LEFT > 1:
        turned = tile.reshape(SIZE // ORDER, LEFT, RIGHT).permute(0, 2, 1).reshape(SIZE // LEFT, LEFT)
        turned = _times(turned, _sylvester_matrix(LEFT, LEFT), SPLIT)
        tile = turned.reshape(SIZE // ORDER, RIGHT, LEFT).permute(0, 2, 1)
    return tile.reshape(SIZE)


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, signs_ptr, y_ptr, total, scale,
    N: tl.constexpr, SIGNED: tl.constexpr, ORDER: tl.constexpr, LEFT: tl.constexpr, SPLIT: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * SIZE
    inner = tl.arange(0, SIZE)
    is_number = inner < total - first
    value = tl.load(x_ptr + first + inner, mask=is_number, other=0.0).to(tl.float32)
    if SIGNED != 0:
        # Tiles of whole rows all have the same signs, which are then read side by side.
        sign = tl.load(signs_ptr + (inner % N if SIZE % N == 0 else ((first % N).to(tl.int32) + inner) % N))
    if SIGNED == 1:
        value *= sign
    value = _sylvester(value, SIZE, ORDER, LEFT, SPLIT) * scale
    if SIGNED == 2:
        value *= sign
    tl.store(y_ptr + first + inner, value.to(y_ptr.dtype.element_ty), mask=is_number)


@triton.jit
def _factor_kernel(  # type: ignore[no-untyped-def]
    x_ptr, matrix_ptr, signs_ptr, y_ptr, columns, order, segments, scale, stride_i, stride_k,
    INNER: tl.constexpr, SIGNED: tl.constexpr, ORDER: tl.constexpr, LEFT: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    column = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    segment, place = column // INNER, column % INNER
    at = segment * order * INNER + place
    sign_at = segment % segments * order * INNER + place
    total = tl.zeros((BLOCK_I, BLOCK_C), dtype=tl.float32)
    for start in range(0, order, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        is_x = (inner < order)[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr + at[None, :] + inner[:, None] * INNER, mask=is_x, other=0.0).to(tl.float32)
        if SIGNED == 1:
            x *= tl.load(signs_ptr + sign_at[None, :] + inner[:, None] * INNER, mask=is_x, other=0.0)
        matrix = tl.load(
            matrix_ptr + index[:, None] * stride_i + inner[None, :] * stride_k,
            mask=(index < order)[:, None] & (inner < order)[None, :],
            other=0,
        )
        if SPLIT:
            high = _coarse(x)
            total = tl.dot(matrix.to(tl.float32), high, total, input_precision="tf32")
            x -= high
        total = tl.dot(matrix.to(tl.float32), x, total, input_precision="tf32")
    value = _sylvester(total, BLOCK_I * BLOCK_C, ORDER, LEFT, SPLIT).reshape(BLOCK_I, BLOCK_C) * scale
    is_y = (index < order)[:, None] & (column < columns)[None, :]
    if SIGNED == 2:
        value *= tl.load(signs_ptr + sign_at[None, :] + index[:, None] * INNER, mask=is_y, other=0.0)
    tl.store(y_ptr + at[None, :] + index[:, None] * INNER, value.to(y_ptr.dtype.element_ty), mask=is_y)


@dataclass(frozen=True)
class _Stage:
    """A pass over ``(segments, h, inner)``: a dense matrix, the Kronecker product of ``orders``, on the middle axis,
    then Sylvester's of order ``power`` on each ``power`` neighbours of the last."""

    orders: tuple[int, ...]
    inner: int
    power: int

    @property
    def order(self) -> int:
        return int(np.prod(self.orders))


def hadamard(x: torch.Tensor, plan: Plan, signs: torch.Tensor | None = None, transpose: bool = False) -> torch.Tensor:
    """x ``(..., n)`` -> its shape and dtype: ``(x * signs) Q``, or with ``transpose`` ``(x Q^T) * signs``.

    Differentiable in x and signs; x is fp32, fp16 or bf16. ValueError where x or signs do not fit ``plan.n``.
    """
    check_dtype(x.dtype)
    check_operands(x, plan, signs)
    return differentiable(transform, x, plan, signs, transpose)


def transform(x: torch.Tensor, plan: Plan, signs: torch.Tensor | None, transpose: bool) -> torch.Tensor:
    """The transform itself, in one pass for each dense factor, and one where there is none."""
    if plan.kind == "fourier":
        return reference.transform(x, plan, signs, transpose)
    rows = x.reshape(-1, plan.n).contiguous()
    if not rows.numel():
        return rows.reshape(x.shape)
    factor = None if signs is None else signs.to(torch.float32).contiguous()
    scale = (plan.copies / plan.n) ** 0.5
    passes = _stages(plan)
    for number, stage in enumerate(passes):
        last = number == len(passes) - 1
        signed = UNSIGNED if factor is None or (not last if transpose else number) else AFTER if transpose else BEFORE
        y = torch.empty_like(rows, dtype=x.dtype if last else torch.float32)
        _launch(rows, y, plan, stage, factor, signed, transpose, scale if last else 1.0, x.dtype == torch.float32)
        rows = y
    return rows.reshape(x.shape)


def _launch(
    x: torch.Tensor, y: torch.Tensor, plan: Plan, stage: _Stage, signs: torch.Tensor | None, signed: int,
    transpose: bool, scale: float, split: bool,
) -> None:  # fmt: skip
    """One pass, x ``(R, n)`` -> y ``(R, n)``."""
    signs = x if signs is None else signs
    left = 1 << (stage.power.bit_length() - 1) // 2 if stage.power > 128 else 1
    if stage.order == 1:
        size = max(TILE, stage.power)
        _rows_kernel[(triton.cdiv(x.numel(), size),)](
            x, signs, y, x.numel(), scale, N=plan.n, SIGNED=signed, ORDER=stage.power, LEFT=left, SPLIT=split,
            SIZE=size, num_warps=4 if size <= 4096 else 8,
        )  # fmt: skip
        return
    matrix, segment = _dense(stage.orders, x.device), stage.order * stage.inner
    strides = matrix.stride() if transpose else matrix.stride()[::-1]
    block_i, block_k, block_c, warps = _tile(stage, split)
    columns = x.numel() // stage.order
    _factor_kernel[(triton.cdiv(stage.order, block_i), triton.cdiv(columns, block_c))](
        x, matrix, signs, y, columns, stage.order, plan.n // segment, scale, *strides,
        INNER=stage.inner, SIGNED=signed, ORDER=stage.power, LEFT=left, SPLIT=split,
        BLOCK_I=block_i, BLOCK_K=block_k, BLOCK_C=block_c, num_warps=warps, num_stages=2,
    )  # fmt: skip


def _tile(stage: _Stage, split: bool) -> tuple[int, int, int, int]:
    """BLOCK_I, BLOCK_K, BLOCK_C and warps: a tile that registers hold, with all neighbours of Sylvester's in it."""
    block_c = max(128, stage.power)
    block_i = 16 if stage.order <= 16 else 32 if stage.order <= 32 else 64
    block_i = max(16, min(block_i, (8192 if split else 16384) // block_c))
    return block_i, 16 if stage.order <= 16 or block_c > 512 else 32, block_c, 4 if block_i * block_c <= 4096 else 8


@lru_cache(maxsize=256)
def _stages(plan: Plan) -> tuple[_Stage, ...]:
    """The passes of a plan, outermost factor first."""
    if not plan.factors and plan.sylvester <= LARGEST_ROW:
        return (_Stage((), 1, plan.sylvester),)
    power = min(plan.sylvester, LARGEST_INNER)
    groups: list[tuple[int, ...]] = [(order,) for order in plan.factors]
    rest = plan.sylvester // power
    if rest > 1 and groups and groups[-1][0] * rest <= LARGEST_JOINED:
        groups[-1] = (*groups[-1], rest)
    elif rest > 1:
        groups.append((rest,))
    passes: list[_Stage] = []
    inner = power
    for orders in reversed(groups):
        passes.append(_Stage(orders, inner, 1 if passes else power))
        inner *= passes[-1].order
    return tuple(reversed(passes))


@lru_cache(maxsize=64)
def _dense(orders: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The Kronecker product of Hadamard matrices, int8."""
    matrix = np.ones((1, 1), dtype=np.int8)
    for order in orders:
        matrix = np.kron(matrix, hadamard_matrix(order))
    return torch.from_numpy(matrix).to(device)
