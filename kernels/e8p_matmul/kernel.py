"""``y = x @ W_hat^T`` in Triton for W_hat in code words of E8P: two looks into tables of 1 KiB open eight weights.

A code word's pattern and sign byte each choose 32 bits (``packed_patterns``, ``packed_signs``), whose XOR holds eight
nibbles ``n``, a coordinate being ``(n - 7.5) / 2``. Two nibbles become two halves in one register by a mask and an OR:
in fp16 ``0x5008 | n << 4`` is ``36 + (n - 7.5) / 2``, exactly; in bf16 ``0x4201 | n << 1`` is. Points of the second
stage of 3 bits are ``(n - 8) / 2``, which leaves the quarter out. The tables lie in shared memory.

A tile of y is made transposed, ``W_hat x^T``, so that the opened weights are the left operand, which tensor cores read
from registers. The inputs of a tile are taken in an order in which a code word's weights stay in the thread that opened
them (:func:`_input_order`), rows likewise (:func:`_row_order`); x is read in the same order. Both stages have sums of
their own, in fp32, and meet at the end. For few rows of x the inputs are cut into spans with a program each, and a
second kernel adds their sums in order: no atomics, the same bits on each run. QuIP#, arXiv 2402.04396.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.e8p_matmul.codebook import packed_patterns, packed_second_stage, packed_signs
from kernels.e8p_matmul.reference import E8PWeight, check_operands
from kernels.precision import check_dtype, upcast

FEW_ROWS = 16
"""Up to so many rows of x the inputs are cut into spans."""
PROGRAMS = 512
"""How many programs spans are to make: some for each processor of a large GPU."""


@triton.jit
def _input_order(CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The input at each place of a tile of ``8 CODES``: a thread of four holds a quarter of a row's code words, and a
    step of 16 inputs takes half a code word of each, two neighbours and two more eight places on."""
    at = tl.arange(0, 8 * CODES)
    code = at // 2 % 4 * (CODES // 4) + at // 32
    return code * 8 + at // 16 % 2 * 4 + at // 8 % 2 * 2 + at % 2


@triton.jit
def _places(CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    """0 .. CODES - 1 as ``(1, CODES)``, written so that the compiler gives a thread a quarter of a row, not more."""
    at = tl.arange(0, CODES)
    return (at // (CODES // 4) * (CODES // 4) + at % (CODES // 4))[None, :]


@triton.jit
def _row_order(BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The output at each place ``(BLOCK_N, 1)``: a warp holds 16 in a row, a thread two of them, 8 apart."""
    at = tl.arange(0, BLOCK_N)[:, None]
    return at % (BLOCK_N // 2) // 8 * 16 + at // (BLOCK_N // 2) * 8 + at % 8


@triton.jit
def _halves(entry, magic, place: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Nibbles ``place`` and ``place + 4`` as two halves: 36 and half of what ``magic`` (see :func:`_magic`) leaves."""
    up: tl.constexpr = (1 if dtype == tl.bfloat16 else 4) - 4 * place
    moved = entry << up if up >= 0 else entry >> -up
    return (moved & (0x001E001E if dtype == tl.bfloat16 else 0x00F000F0)) | magic


@triton.jit
def _open(entry, magic, dtype: tl.constexpr, BLOCK_N: tl.constexpr, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Packed entries ``(BLOCK_N, CODES)`` -> points ``(BLOCK_N, 8 CODES)`` of ``dtype``, both in our orders."""
    narrow: tl.constexpr = tl.bfloat16 if dtype == tl.bfloat16 else tl.float16
    magic = magic.to(tl.uint32)
    first = tl.join(_halves(entry, magic, 0, narrow), _halves(entry, magic, 1, narrow))
    last = tl.join(_halves(entry, magic, 2, narrow), _halves(entry, magic, 3, narrow))
    pairs = tl.join(first, last)
    point = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16)).to(narrow, bitcast=True)
    point = (point - 36.0).to(dtype)
    point = point.reshape(2, BLOCK_N // 16, 8, 4, CODES // 4, 2, 2, 2).permute(1, 0, 2, 4, 6, 5, 3, 7)
    return point.reshape(BLOCK_N, 8 * CODES)


@triton.jit
def _look_up(table, index, BLOCK_N: tl.constexpr, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    found = tl.gather(table, index.to(tl.int32).reshape(BLOCK_N * CODES), 0)
    return found.reshape(BLOCK_N, CODES).to(tl.uint32, bitcast=True)


@triton.jit
def _points(  # type: ignore[no-untyped-def]
    codes_ptr, table_ptr, at, mask, magic,
    WORDS: tl.constexpr, dtype: tl.constexpr, BLOCK_N: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Code words of E8P, or codes of the 256 points, at ``at (BLOCK_N, CODES)`` -> ``(BLOCK_N, 8 CODES)``."""
    entry = tl.arange(0, 256)
    if WORDS:
        code = tl.load(codes_ptr + at, mask=mask, other=0).to(tl.uint16, bitcast=True)
        packed = _look_up(tl.load(table_ptr + entry), code >> 8, BLOCK_N, CODES)
        packed ^= _look_up(tl.load(table_ptr + 256 + entry), code & 0xFF, BLOCK_N, CODES)
    else:
        code = tl.load(codes_ptr + at, mask=mask, other=0)
        packed = _look_up(tl.load(table_ptr + 512 + entry), code, BLOCK_N, CODES)
    return _open(packed, magic, dtype, BLOCK_N, CODES)


@triton.jit
def _e8p_forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, first_ptr, second_ptr, table_ptr, out_ptr,
    M, N, K, blocks, span, scale, second_scale, first_magic, second_magic, stride_xm, stride_xk,
    BITS: tl.constexpr, SPREAD: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_N + _row_order(BLOCK_N)
    # 64-bit offsets: M * K and N * K / 8 pass 2^31 elements on long batches and wide layers.
    row_at = row.to(tl.int64) * blocks
    place = _places(CODES)
    order = _input_order(CODES)
    line = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    line_at = line.to(tl.int64)[None, :] * stride_xm
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    rest = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    begin = tl.program_id(2) * span
    for start in range(begin, tl.minimum(blocks, begin + span), CODES):
        at = row_at + start + place
        mask = (row < N) & (start + place < blocks)
        index = 8 * start + order
        x = tl.load(
            x_ptr + line_at + index[:, None] * stride_xk, mask=(line < M)[None, :] & (index < K)[:, None], other=0.0
        ).to(dtype)
        first = _points(first_ptr, table_ptr, at, mask, first_magic, True, dtype, BLOCK_N, CODES)
        total = tl.dot(first, x, total, input_precision="ieee")
        if BITS > 2:
            second = _points(second_ptr, table_ptr, at, mask, second_magic, BITS == 4, dtype, BLOCK_N, CODES)
            rest = tl.dot(second, x, rest, input_precision="ieee")
    if BITS > 2:
        total += second_scale * rest
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = line.to(tl.int64)
    if SPREAD:
        line += tl.program_id(2).to(tl.int64) * M
    tl.store(
        out_ptr + line[None, :] * N + column[:, None],
        (scale * total).to(out_ptr.dtype.element_ty),
        mask=(column < N)[:, None] & (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M) < M)[None, :],
    )


@triton.jit
def _e8p_add_kernel(parts_ptr, y_ptr, elements, spans, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for span in range(0, spans):
        total += tl.load(parts_ptr + tl.cast(span, tl.int64) * elements + at, mask=at < elements, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < elements)


@triton.jit
def _e8p_backward_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, first_ptr, second_ptr, table_ptr, dx_ptr,
    M, N, K, blocks, scale, second_scale, first_magic, second_magic, stride_ym, stride_yn,
    BITS: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float32 if UPCAST else dy_ptr.dtype.element_ty
    line = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    line_at = line.to(tl.int64)[:, None] * stride_ym
    place = tl.program_id(1) * CODES + _places(CODES)
    total = tl.zeros((BLOCK_M, 8 * CODES), dtype=tl.float32)
    rest = tl.zeros((BLOCK_M, 8 * CODES), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        row = start + _row_order(BLOCK_N)
        at = row.to(tl.int64) * blocks + place
        mask = (row < N) & (place < blocks)
        column = start + tl.arange(0, BLOCK_N)
        dy = tl.load(
            dy_ptr + line_at + column[None, :] * stride_yn, mask=(line < M)[:, None] & (column < N)[None, :], other=0.0
        ).to(dtype)
        first = _points(first_ptr, table_ptr, at, mask, first_magic, True, dtype, BLOCK_N, CODES)
        total = tl.dot(dy, first, total, input_precision="ieee")
        if BITS > 2:
            second = _points(second_ptr, table_ptr, at, mask, second_magic, BITS == 4, dtype, BLOCK_N, CODES)
            rest = tl.dot(dy, second, rest, input_precision="ieee")
    if BITS > 2:
        total += second_scale * rest
    index = tl.program_id(1) * (8 * CODES) + _input_order(CODES)
    tl.store(
        dx_ptr + line.to(tl.int64)[:, None] * K + index[None, :],
        (scale * total).to(dx_ptr.dtype.element_ty),
        mask=(line < M)[:, None] & (index < K)[None, :],
    )


class _E8PMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: E8PWeight) -> torch.Tensor:
        ctx.weight = weight
        return _forward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (dy,) = gradients
        return _backward(dy, ctx.weight), None


def _forward(x: torch.Tensor, weight: E8PWeight) -> torch.Tensor:
    (outputs, inputs), rows = weight.shape, len(x)
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    wide, few = upcast(x.dtype), rows <= FEW_ROWS
    block_m, block_n, codes, warps = _tile(rows, weight.bits, wide)
    programs = triton.cdiv(outputs, block_n)
    blocks = inputs // 8
    span = _span(blocks, programs, codes) if few else blocks
    spans = triton.cdiv(blocks, span)
    out = torch.empty((spans, rows, outputs), dtype=torch.float32, device=x.device) if spans > 1 else y
    _e8p_forward_kernel[(programs, triton.cdiv(rows, block_m), spans)](
        x, weight.first, _second(weight), _tables(x.device), out,
        rows, outputs, inputs, blocks, span, *_factors(weight), *_magic(x.dtype, weight.bits), *x.stride(),
        BITS=weight.bits, SPREAD=spans > 1, UPCAST=wide, BLOCK_M=block_m, BLOCK_N=block_n, CODES=codes,
        num_warps=warps,
    )  # fmt: skip
    if spans > 1:
        _e8p_add_kernel[(triton.cdiv(y.numel(), 1024),)](out, y, y.numel(), spans, BLOCK=1024)
    return y


def _backward(dy: torch.Tensor, weight: E8PWeight) -> torch.Tensor:
    (outputs, inputs), rows = weight.shape, len(dy)
    dx = torch.empty((rows, inputs), dtype=dy.dtype, device=dy.device)
    if not dx.numel():
        return dx
    wide = upcast(dy.dtype)
    block_m = 16 if rows <= FEW_ROWS else 64
    block_n, codes, warps = (64, 8, 4) if wide else (64, 16, 4)
    _e8p_backward_kernel[(triton.cdiv(rows, block_m), triton.cdiv(inputs, 8 * codes))](
        dy, weight.first, _second(weight), _tables(dy.device), dx,
        rows, outputs, inputs, inputs // 8, *_factors(weight), *_magic(dy.dtype, weight.bits), *dy.stride(),
        BITS=weight.bits, UPCAST=wide, BLOCK_M=block_m, BLOCK_N=block_n, CODES=codes, num_warps=warps,
    )  # fmt: skip
    return dx


def _tile(rows: int, bits: int, wide: bool) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, CODES and warps of the forward product. Two stages hold twice the registers, and ``wide``
    products are of fp32 tiles."""
    if wide:
        return 16 if rows <= FEW_ROWS else 64, 64, 8, 4
    if rows <= FEW_ROWS:
        return 16, 128, 32 if bits == 2 else 16, 8
    return 64 if rows <= 64 else 128, 128, 16, 8


def _span(blocks: int, programs: int, step: int) -> int:
    """Code words of a row in a span: as many whole steps as leave :data:`PROGRAMS` in all, one at least. The rows of x
    play no part in it, nor does the device: they change no bit of a result."""
    steps = triton.cdiv(blocks, step)
    return max(1, steps * programs // PROGRAMS) * step


def _second(weight: E8PWeight) -> torch.Tensor:
    return weight.first if weight.second is None else weight.second


def _factors(weight: E8PWeight) -> tuple[float, float]:
    return weight.scale, 1 / weight.residual_scale


def _magic(dtype: torch.dtype, bits: int) -> tuple[int, int]:
    """What is ORed to two nibbles of the first and of the second stage, for 36 and the nibbles' halves less 8, and a
    quarter in codes of E8P. Arguments of the kernel and no constants: an operation takes one constant only."""
    lone, whole = (0x4200, 0x4201) if dtype == torch.bfloat16 and not upcast(dtype) else (0x5000, 0x5008)
    return whole * 0x10001, (whole if bits == 4 else lone) * 0x10001


@cache
def _tables(device: torch.device) -> torch.Tensor:
    """Patterns, signs and second stage, packed: ``(768,)`` int32."""
    return torch.cat([packed_patterns(), packed_signs(), packed_second_stage()]).to(device)


def e8p_matmul(x: torch.Tensor, weight: E8PWeight) -> torch.Tensor:
    """x ``(M, K)`` -> ``(M, N)`` in x's dtype; differentiable in x. Sums are fp32."""
    check_operands(x, weight)
    check_dtype(x.dtype)
    if not weight.first.is_contiguous() or not _second(weight).is_contiguous():
        raise ValueError("code words lie one after the other, row by row: make them contiguous")
    y: torch.Tensor = _E8PMatmul.apply(x, weight)
    return y
