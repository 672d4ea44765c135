"""What a follower keeps beside its anchor's weight, as a module: a product of low rank, or one sign bit a weight.

    low_rank:  D = B A,         A (r, K), B (N, r)
    sign:      D = alpha S,     S = sign(W_l - W_a), alpha = mean |W_l - W_a| as it begins, then trained

The second is BitDelta's form (arXiv:2402.10193) between the layers of one model, to compare the two at equal bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from kernels.packing import pack_bits, unpack_signs
from kernels.registry import choose

Pieces = tuple[torch.Tensor, torch.Tensor]
"""As stored: ``A`` and ``B``; or signs, packed ``(ceil(K/32), N)`` int32, and ``alpha (1,)`` fp32."""


class LowRank(torch.nn.Module):
    """``x (..., K) -> (x A^T) B^T (..., N)``; factors are cast to the dtype of ``x`` on use."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(a, requires_grad=False)
        self.B = torch.nn.Parameter(b, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def pieces(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by the ends of their names."""
        return {"A": self.A, "B": self.B}

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}"


class Signs(torch.nn.Module):
    """``x (..., K) -> alpha x S^T (..., N)``; signs stay packed."""

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = choose("binary_matmul", x.device.type)
        y: torch.Tensor = product(x.reshape(-1, x.shape[-1]), self.packed, self.scale)
        return y.view(*x.shape[:-1], -1)

    def pieces(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by the ends of their names."""
        return {"scale": self.scale}


def difference(pieces: Pieces) -> Any:
    """The module of what is stored."""
    first, second = pieces
    return Signs(first, second) if is_signs(pieces) else LowRank(first, second)


def signs_of(delta: torch.Tensor) -> Pieces:
    """The signs of ``delta (N, K)`` and the mean of its magnitudes; a zero counts as +1."""
    scale = delta.double().abs().mean().to(torch.float32).reshape(1)
    return pack_bits(delta >= 0).cpu().contiguous(), scale.cpu()


def dense(pieces: Pieces, inputs: int) -> torch.Tensor:
    """``D (N, K)`` in fp32."""
    first, second = pieces
    if is_signs(pieces):
        return unpack_signs(first, inputs) * second.to(torch.float32)
    return second.to(torch.float32) @ first.to(torch.float32)


def is_signs(pieces: Pieces) -> bool:
    return pieces[0].dtype == torch.int32
