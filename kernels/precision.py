"""How a product's operands are taken: natively, or as fp32, and with which precision."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands become fp32 first: bf16 products are wrong in the interpreter, and fp32 wants fp32 products."""
    return dtype == torch.float32 or (INTERPRETED and dtype == torch.bfloat16)


def dot_precision(dtype: torch.dtype) -> str:
    """Of a product of fp32 tiles: exact for fp32 input, and 10 bits of mantissa, more than it has, for half input."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what the kernels do not compute in: their sums are fp32."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{dtype} is not computed by the kernel: float32, float16 and bfloat16 are")
