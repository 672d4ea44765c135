"""``y = scale * x @ S^T`` from packed signs in Triton: words are loaded once and opened in registers.

Each program makes one ``(BLOCK_M, BLOCK_N)`` tile of y. A step over K loads ``BLOCK_K / 32`` rows of words, shifts each
word by 0..31 into its bits, and multiplies +-1 tiles. The tail of K is masked on x, so the zero padding of the last
word (which would read as -1) adds nothing. Sums are fp32; the scale is applied once, in fp32, before the one store.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _binary_matmul_kernel(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_ptr, y_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_pr, stride_pn, stride_ym, stride_yn,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # 64-bit offsets: M * K passes 2^31 elements on long batches of wide layers.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        index = start + inner
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + index[None, :] * stride_xk,
            mask=(rows[:, None] < M) & (index[None, :] < K),
            other=0.0,
        )
        word = tl.load(
            packed_ptr + (index[:, None] // 32) * stride_pr + columns[None, :] * stride_pn,
            mask=(index[:, None] < K) & (columns[None, :] < N),
            other=0,
        )
        bit = (word >> (index[:, None] % 32)) & 1
        sign = (2 * bit - 1).to(tl.float32)
        if UPCAST:
            # The interpreter computes bf16 products wrongly, and fp32 input wants fp32 products everywhere.
            total += tl.dot(x.to(tl.float32), sign, input_precision="ieee")
        else:
            total += tl.dot(x, sign.to(x.dtype))
    scale = tl.load(scale_ptr).to(tl.float32)
    tl.store(
        y_ptr + rows[:, None] * stride_ym + columns[None, :] * stride_yn,
        (total * scale).to(y_ptr.dtype.element_ty),
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )


def binary_matmul(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x ``(M, K)``, packed ``(ceil(K/32), N)`` -> ``(M, N)`` in x's dtype. Blocks depend on a bucket of M."""
    rows, inputs = x.shape
    outputs = packed.shape[1]
    if packed.shape[0] != -(-inputs // 32):
        raise ValueError(f"{packed.shape[0]} words hold no matrix of {inputs} inputs")
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    factor = torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(1)
    block_m, block_n = (16, 64) if rows <= 16 else (64, 64)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(outputs, block_n))
    _binary_matmul_kernel[grid](
        x, packed, factor, y,
        rows, outputs, inputs,
        x.stride(0), x.stride(1), packed.stride(0), packed.stride(1), y.stride(0), y.stride(1),
        UPCAST=INTERPRETED or x.dtype == torch.float32, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
    )  # fmt: skip
    return y
