"""``y = scale * x @ S^T`` from packed signs, the obvious way: unpack, multiply, scale.

x ``(M, K)``, packed ``(ceil(K/32), N)`` int32, scale a float or a one-element tensor, y ``(M, N)`` in x's dtype. Sums
are in fp32 (fp64 for fp64 input); a bf16 result is never narrowed to fp16 on the way, so it cannot overflow at 65504.
"""

from __future__ import annotations

import torch

from kernels.packing import unpack_signs


def binary_matmul(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x ``(M, K)``, packed ``(ceil(K/32), N)`` -> ``(M, N)`` in x's dtype."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    signs = unpack_signs(packed, x.shape[1], accumulator)
    return (x.to(accumulator) @ signs.T).mul_(scale).to(x.dtype)
