"""Pieces of the binary product's kernels: words opened into signs, and the token and the delta of each line."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def minus_ones(dtype: torch.dtype) -> int:
    """The register of two halves that are -1, as a signed number; 0 for fp32, which does not use it."""
    return {torch.float16: 0xBC00BC00 - (1 << 32), torch.bfloat16: 0xBF80BF80 - (1 << 32)}.get(dtype, 0)


@triton.jit
def pair_order(BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The input at each place of a tile of :func:`open_pairs`: bits i and i + 16 of a word stand side by side."""
    place = tl.arange(0, BLOCK_K)
    return place // 32 * 32 + place % 32 // 2 + place % 2 * 16


@triton.jit
def pair_up(x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """x ``(BLOCK_M, BLOCK_K)`` with its inputs brought into :func:`pair_order`."""
    return x.reshape(BLOCK_M, BLOCK_K // 32, 2, 16).permute(0, 1, 3, 2).reshape(BLOCK_M, BLOCK_K)


@triton.jit
def open_pairs(word, ones, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """word int32 ``(BLOCK_N, BLOCK_K / 32)`` -> +-1 of ``dtype`` ``(BLOCK_N, BLOCK_K)`` in :func:`pair_order`.

    Two halves share a register, so a shift and a three-way logic operation make two signs at once. The sign bit of a
    half is set where the word's bit is not. ``ones`` (:func:`minus_ones`) is an argument of the kernel and no constant,
    since the operation takes one constant only.
    """
    place = tl.arange(0, 16)[None, None, :]
    if dtype == tl.float32:
        low, high = (word[:, :, None] >> place) & 1, (word[:, :, None] >> (place + 16)) & 1
        sign = tl.where(tl.join(low, high) == 1, 1.0, -1.0)
    else:
        pair = ((word.to(tl.uint32, bitcast=True)[:, :, None] << (15 - place)) & 0x80008000) ^ ones.to(tl.uint32)
        sign = tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16)).to(dtype, bitcast=True)
    return sign.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def open_signs(word, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """word int32 ``(BLOCK_K / 32, BLOCK_N)`` -> +-1 in fp32 ``(BLOCK_K, BLOCK_N)``, inputs in their own order."""
    bit = (word[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
    return tl.where(bit == 1, 1.0, -1.0).reshape(BLOCK_K, BLOCK_N)


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
