"""Pieces of the binary product's kernels: words opened into signs, and the token and the delta of each line."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def open_signs(word, dtype: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """word int32 ``(BLOCK_K / 32, BLOCK_N)`` -> +-1 of ``dtype`` ``(BLOCK_K, BLOCK_N)``."""
    place = tl.arange(0, 32)
    if dtype == tl.float32:
        bit = (word[:, None, :] >> place[None, :, None]) & 1
        sign = tl.where(bit == 1, 1.0, -1.0)
    else:
        # A half's sign bit is set where the word's bit is not: cheaper than a conversion of integers.
        one: tl.constexpr = 0x3C00 if dtype == tl.float16 else 0x3F80
        pattern = (((~word)[:, None, :] >> place[None, :, None]) & 1) << 15
        sign = (pattern | one).to(tl.uint16).to(dtype, bitcast=True)
    return sign.reshape(BLOCK_K, BLOCK_N)


@triton.jit
def segment_of(line, order_ptr, ids_ptr, M, MAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token and the delta of each line; past the last line they are token 0 and the base alone."""
    if MAPPED:
        row = tl.load(order_ptr + line, mask=line < M, other=0)
        delta_of = tl.load(ids_ptr + line, mask=line < M, other=-1)
    else:
        row = line
        delta_of = tl.where(line < M, 0, -1)
    return row, delta_of
