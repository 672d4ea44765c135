"""What a follower keeps beside its anchor's weight, as a module: a product of low rank, or one sign bit a weight.

    low_rank:  W = W_a + B A,           A (r, K), B (N, r)
    scaled:    W = c W_a + B A,         c = <W_l, W_a> / <W_a, W_a> as it begins, then trained
    sign:      W = W_a + alpha S,       S = sign(W_l - W_a), alpha = mean |W_l - W_a| as it begins, then trained

The first is published (arXiv:2501.18596). The second is ours: where the weights of two layers have nothing in common
``c`` is near 0, and an anchor that would only be noise counts for nothing; with ``c = 0`` and no rank nothing is left
of the matrix, and nothing is computed. The third is BitDelta's form (arXiv:2402.10193)
between the layers of one model, to compare at equal bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from kernels.packing import pack_bits, unpack_signs
from kernels.registry import choose

Pieces = tuple[torch.Tensor, ...]
"""As stored: ``A`` and ``B``, and ``c (1,)`` where there is one; or signs, packed ``(ceil(K/32), N)`` int32, and
``alpha (1,)`` fp32."""


class LowRank(torch.nn.Module):
    """``y + (x A^T) B^T (..., N)`` from ``x (..., K)`` and ``y = x W_a^T``; factors are cast to the dtype of ``x``."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(a, requires_grad=False)
        self.B = torch.nn.Parameter(b, requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + linear(linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    is_nothing = False
    """Whether it is zero, and its anchor counts for nothing."""

    def pieces(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by the ends of their names."""
        return {"A": self.A, "B": self.B}

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}"


class ScaledLowRank(LowRank):
    """``c y + (x A^T) B^T``"""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
        super().__init__(a, b)
        self.c = torch.nn.Parameter(c, requires_grad=False)
        self.is_nothing = not len(a) and not bool(c.any())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x, self.c.to(y.dtype) * y)

    def pieces(self) -> dict[str, torch.nn.Parameter]:
        return {**super().pieces(), "c": self.c}


class Signs(torch.nn.Module):
    """``y + alpha x S^T (..., N)`` from ``x (..., K)`` and ``y = x W_a^T``; signs stay packed."""

    is_nothing = False

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = choose("binary_matmul", x.device.type)
        added: torch.Tensor = product(x.reshape(-1, x.shape[-1]), self.packed, self.scale)
        return y + added.view(*x.shape[:-1], -1)

    def pieces(self) -> dict[str, torch.nn.Parameter]:
        """What learns, by the ends of their names."""
        return {"scale": self.scale}


def difference(pieces: Pieces) -> Any:
    """The module of what is stored."""
    if is_signs(pieces):
        return Signs(*pieces)
    return LowRank(*pieces) if len(pieces) == 2 else ScaledLowRank(*pieces)


def signs_of(delta: torch.Tensor) -> Pieces:
    """The signs of ``delta (N, K)`` and the mean of its magnitudes; a zero counts as +1."""
    scale = delta.double().abs().mean().to(torch.float32).reshape(1)
    return pack_bits(delta >= 0).cpu().contiguous(), scale.cpu()


def dense(pieces: Pieces, anchor: torch.Tensor) -> torch.Tensor:
    """``W (N, K)`` in fp32 on the weight ``anchor (N, K)``."""
    first, second, *scale = (one if one.dtype == torch.int32 else one.to(torch.float32) for one in pieces)
    if is_signs(pieces):
        return anchor + unpack_signs(first, anchor.shape[1]) * second
    return (scale[0] * anchor if scale else anchor) + second @ first


def is_signs(pieces: Pieces) -> bool:
    return pieces[0].dtype == torch.int32
