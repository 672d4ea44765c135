"""Pieces of the packed product's kernels: words of a GPTQ layout opened into codes, zeros and groups.

A *unit* is what a thread opens at once: a word of 16, 8 or 4 codes for 2, 4 or 8 bits, and for 3 bits the 24 bits of 8
codes, cut out of one or two of the three words of 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def magic(dtype: torch.dtype, bits: int) -> tuple[int, int, int]:
    """How codes become halves: a register of two halves of 2^bits, the place of the lowest of the ``bits`` highest bits
    of their mantissas, and 2^bits. A code put there by an OR adds itself. All 0 where a mantissa has too few bits (of 8
    in bf16), and for fp32: those are converted.
    """
    exponent, mantissa = {torch.float16: (15, 10), torch.bfloat16: (127, 7)}.get(dtype, (0, 0))
    if mantissa < bits:
        return 0, 0, 0
    return ((exponent + bits) << mantissa) * 0x10001, mantissa - bits, 1 << bits


@triton.jit
def read_units(qweight_ptr, start, columns, N, K, BITS: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Units of the inputs from ``start`` on (a multiple of 32): uint32 ``(BLOCK_N, BLOCK_K / codes of a unit)``."""
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    first = start + tl.arange(0, BLOCK_K // CODES) * CODES
    is_unit = (columns < N)[:, None] & (first < K)[None, :]
    word_ptr = qweight_ptr + columns[:, None] + (first * BITS // 32).to(tl.int64)[None, :] * N
    word = tl.load(word_ptr, mask=is_unit, other=0).to(tl.uint32, bitcast=True)
    if BITS == 3:
        # Units begin at bits 0, 24, 16 and 8 of a word; the second and the third end in the next.
        shift = (first * BITS % 32).to(tl.uint32)[None, :]
        rest = tl.load(word_ptr + N, mask=is_unit & (shift > 8), other=0).to(tl.uint32, bitcast=True)
        word = ((word >> shift) | ((rest << 1) << (31 - shift))) & 0xFFFFFF
    return word


@triton.jit
def open_codes(unit, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Units -> codes in fp32 ``(BLOCK_N, BLOCK_K)``, inputs in their own order."""
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    place = tl.arange(0, CODES)[None, None, :].to(tl.uint32)
    code = (unit[:, :, None] >> (place * BITS)) & ((1 << BITS) - 1)
    return code.to(tl.float32).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def open_pairs(  # type: ignore[no-untyped-def]
    unit, ones, dtype: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Units -> ``code + 2^bits`` of ``dtype``, exact, or the code where :func:`magic` has nothing for it:
    ``(BLOCK_N, BLOCK_K)`` in an order of the inputs that :func:`pair_up` gives x.

    Two halves share a register: codes i and i + half a unit stand 16 bits apart, so that one shift, which brings them
    to bit LOW of each half, and one three-way logic operation make both. ``ones`` is an argument of the kernel and no
    constant, since the operation takes one constant only. A matrix unit takes the places of a row from four threads in
    turn, four at a time: in this order those are of one unit, so that a thread opens whole units by constant shifts
    and reads the x of a unit at once.
    """
    CODES: tl.constexpr = 8 if BITS == 3 else 32 // BITS
    if BITS == 3:
        unit = (unit & 0xFFF) | ((unit << 4) & 0xFFF0000)
    THREADS: tl.constexpr = 4 if BLOCK_K // CODES >= 4 else BLOCK_K // CODES
    unit = unit.reshape(BLOCK_N, BLOCK_K // (CODES * THREADS), THREADS)[:, :, :, None]
    shift = (tl.arange(0, CODES // 2)[None, None, None, :] * BITS - LOW).to(tl.uint32) & 31
    pair = (unit >> shift) | (unit << ((32 - shift) & 31))
    pair = pair & (((1 << BITS) - 1) * 0x10001 << LOW)
    if (dtype == tl.float32) or (dtype == tl.bfloat16 and BITS == 8):
        # The same in fp32, whose mantissa holds any code, then a conversion.
        whole = tl.join((pair & 0xFFFF) | 0x4B000000, (pair >> 16) | 0x4B000000).to(tl.float32, bitcast=True)
        half = (whole - 8388608.0).to(dtype)
    else:
        pair = pair | ones.to(tl.uint32)
        half = tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16)).to(dtype, bitcast=True)
    half = half.reshape(BLOCK_N, BLOCK_K // (CODES * THREADS), THREADS, CODES // 4, 2, 2)
    return half.permute(0, 1, 3, 2, 4, 5).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def pair_up(x, BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """x ``(BLOCK_M, BLOCK_K)`` with its inputs brought into the order of :func:`open_pairs`."""
    HALF: tl.constexpr = 4 if BITS == 3 else 16 // BITS
    THREADS: tl.constexpr = 4 if BLOCK_K // HALF >= 8 else BLOCK_K // (2 * HALF)
    x = x.reshape(BLOCK_M, BLOCK_K // (2 * HALF * THREADS), THREADS, 2, HALF // 2, 2)
    return x.permute(0, 1, 4, 2, 5, 3).reshape(BLOCK_M, BLOCK_K)


@triton.jit
def read_zeros(qzeros_ptr, group, columns, mask, N, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros in fp32 of groups and outputs, whose shapes broadcast to that of ``mask``."""
    bit = columns * BITS
    word_ptr = qzeros_ptr + group.to(tl.int64) * (N * BITS // 32) + bit // 32
    shift = (bit % 32).to(tl.uint32)
    zero = tl.load(word_ptr, mask=mask, other=0).to(tl.uint32, bitcast=True) >> shift
    if BITS == 3:
        crosses = mask & (shift > 29)
        zero |= tl.load(word_ptr + 1, mask=crosses, other=0).to(tl.uint32, bitcast=True) << ((32 - shift) % 32)
    return (zero & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def open_values(  # type: ignore[no-untyped-def]
    qweight_ptr, qzeros_ptr, scales_ptr, g_idx_ptr, start, columns, N, K, group_size,
    BITS: tl.constexpr, IN_ORDER: tl.constexpr, ALIKE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``scale * (code - zero)`` in fp32 ``(BLOCK_N, BLOCK_K)``, inputs in their own order, 0 past N and K.

    ALIKE: all inputs of the tile share a group. IN_ORDER: input k is in group ``k // group_size``, else ``g_idx[k]``.
    """
    code = open_codes(read_units(qweight_ptr, start, columns, N, K, BITS, BLOCK_K), BITS, BLOCK_N, BLOCK_K)
    index = start + tl.arange(0, BLOCK_K)
    is_weight = (columns < N)[:, None] & (index < K)[None, :]
    if ALIKE:
        group = (start + columns * 0) // group_size
        zero = read_zeros(qzeros_ptr, group, columns, columns < N, N, BITS)[:, None]
        scale_ptr = scales_ptr + group.to(tl.int64) * N + columns
        scale = tl.load(scale_ptr, mask=columns < N, other=0.0).to(tl.float32)[:, None]
    else:
        group = index // group_size if IN_ORDER else tl.load(g_idx_ptr + index, mask=index < K, other=0)
        zero = read_zeros(qzeros_ptr, group[None, :], columns[:, None], is_weight, N, BITS)
        scale_ptr = scales_ptr + group.to(tl.int64)[None, :] * N + columns[:, None]
        scale = tl.load(scale_ptr, mask=is_weight, other=0.0).to(tl.float32)
    return tl.where(is_weight, scale * (code - zero), 0.0)
