"""Signs and sums of a delta in one pass in Triton: base and variant are read once, one bit a weight is written.

Each program takes ``BLOCK_N`` rows by ``BLOCK_K`` inputs of both, shifts 32 comparisons into each word, and adds
``|D|`` and ``D^2`` of its piece of each row in fp32. The pieces of a row are added in fp64 afterwards, always in the
same order: no atomics, so the sums have the same bits on each run. 32 rows side by side make each store of words
128 bytes long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.packing import words_for
from kernels.precision import check_dtype
from kernels.sign_pack.reference import SignPack, SignRows, check_pair

BLOCK_N = 32
BLOCK_K = 256


@triton.jit
def _sign_pack_kernel(  # type: ignore[no-untyped-def]
    base_ptr, finetuned_ptr, packed_ptr, sums_ptr,
    N, K, words, pieces,
    stride_bn, stride_bk, stride_fn, stride_fk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # 64-bit offsets: a large embedding passes 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < N) & (index[None, :] < K)
    base = tl.load(base_ptr + rows[:, None] * stride_bn + index[None, :] * stride_bk, mask=inside, other=0.0)
    finetuned = tl.load(finetuned_ptr + rows[:, None] * stride_fn + index[None, :] * stride_fk, mask=inside, other=0.0)
    base, finetuned = base.to(tl.float32), finetuned.to(tl.float32)
    bits = ((finetuned >= base) & inside).to(tl.int32).reshape(BLOCK_N, BLOCK_K // 32, 32)
    # Each bit has its own place, so the sum is their union.
    word = tl.sum(bits << tl.arange(0, 32)[None, None, :], axis=2)
    line = tl.program_id(1) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    tl.store(
        packed_ptr + line.to(tl.int64)[None, :] * N + rows[:, None],
        word,
        mask=(rows[:, None] < N) & (line[None, :] < words),
    )
    delta = finetuned - base
    at = sums_ptr + tl.program_id(1).to(tl.int64) * N + rows
    tl.store(at, tl.sum(tl.abs(delta), axis=1), mask=rows < N)
    tl.store(at + tl.cast(pieces, tl.int64) * N, tl.sum(delta * delta, axis=1), mask=rows < N)


def sign_pack_rows(base: torch.Tensor, finetuned: torch.Tensor) -> SignRows:
    """base, finetuned ``(N, K)`` in fp32, fp16 or bf16 -> their :class:`SignRows`, without waiting for the device."""
    check_pair(base, finetuned)
    check_dtype(base.dtype)
    check_dtype(finetuned.dtype)
    outputs, inputs = base.shape
    pieces = triton.cdiv(inputs, BLOCK_K)
    packed = torch.empty((words_for(inputs), outputs), dtype=torch.int32, device=base.device)
    sums = torch.empty((2, pieces, outputs), dtype=torch.float32, device=base.device)
    if base.numel():
        _sign_pack_kernel[(triton.cdiv(outputs, BLOCK_N), pieces)](
            base, finetuned, packed, sums,
            outputs, inputs, len(packed), pieces,
            base.stride(0), base.stride(1), finetuned.stride(0), finetuned.stride(1),
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4,
        )  # fmt: skip
    whole = sums.sum(dim=1, dtype=torch.float64)
    return SignRows(packed, whole[0], whole[1])


def sign_pack(base: torch.Tensor, finetuned: torch.Tensor) -> SignPack:
    """base, finetuned ``(N, K)`` -> their :class:`SignPack`; waits for the two sums."""
    rows = sign_pack_rows(base, finetuned)
    return SignPack(rows.packed, float(rows.sum_abs.sum()), float(rows.sum_squares.sum()))
