"""``y = x @ D_hat^T`` (``+ x @ W^T``) for a delta of group-wise dropout, the obvious way: mask, codes, dense, product.

D_hat ``(N, K)`` is zero but for the survivors of the seeded mask (see ``kernels.group_mask``), each of which is
``scale * (q - zero) * factor``: q its code of 1-8 bits, scale and zero those of the matrix, factor its group's size
over how many survive. A row's codes lie in scan order in words of its own, so no position is stored.
DeltaDQ, arXiv 2410.08666.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.group_mask.reference import check_mask, keep_factors, keep_positions, kept_per_row
from kernels.packing import code_words, unpack_code_rows


@dataclass(frozen=True)
class SparseDelta:
    """What D_hat ``(N, inputs)`` is made of: the codes, ``words (N, ceil(kept_per_row * bits / 32))`` int32; their grid
    (bits, scale, zero); and the rule of the mask (seed, tensor index, group size, ratio)."""

    words: torch.Tensor
    bits: int
    scale: float
    zero: int
    seed: int
    tensor: int
    inputs: int
    group_size: int
    ratio: int

    def __post_init__(self) -> None:
        check_mask(self.seed, self.tensor, range(len(self.words)), self.inputs, self.group_size, self.ratio)
        if not 1 <= self.bits <= 8:
            raise ValueError(f"codes of {self.bits} bits cannot be packed: 1 to 8 bits can")
        wanted = code_words(kept_per_row(self.inputs, self.group_size, self.ratio), self.bits)
        if self.words.dim() != 2 or self.words.dtype != torch.int32 or self.words.shape[1] != wanted:
            raise ValueError(
                f"a row of this delta is {wanted} words of int32 long, not {tuple(self.words.shape)} {self.words.dtype}"
            )


def check_operands(x: torch.Tensor, delta: SparseDelta, base: torch.Tensor | None) -> None:
    """Refuse operands whose shapes do not fit, and a base that would miss its gradient."""
    if x.dim() != 2 or x.shape[1] != delta.inputs:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a delta of {delta.inputs} inputs")
    if base is None:
        return
    if tuple(base.shape) != (len(delta.words), delta.inputs):
        raise ValueError(f"a base of shape {tuple(base.shape)} has no delta of {(len(delta.words), delta.inputs)}")
    if base.requires_grad:
        raise ValueError("the base is frozen: it gets no gradient here, so it must not ask for one")


def dense_delta(delta: SparseDelta, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """D_hat ``(N, K)``."""
    outputs, inputs = len(delta.words), delta.inputs
    kept = keep_positions(delta.seed, delta.tensor, range(outputs), inputs, delta.group_size, delta.ratio)
    factors = torch.from_numpy(keep_factors(inputs, delta.group_size, delta.ratio)).to(dtype)
    codes = unpack_code_rows(delta.words.cpu(), kept.shape[1], delta.bits).to(dtype)
    values = (codes - delta.zero) * delta.scale * factors
    return (
        torch.zeros((outputs, inputs), dtype=dtype).scatter_(1, torch.from_numpy(kept), values).to(delta.words.device)
    )


def sparse_delta_matmul(x: torch.Tensor, delta: SparseDelta, base: torch.Tensor | None = None) -> torch.Tensor:
    """x ``(M, K)``, optionally base ``(N, K)`` -> ``(M, N)`` in x's dtype; differentiable in x. Sums as in fp32."""
    check_operands(x, delta, base)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dense_delta(delta, accumulator)
    if base is not None:
        weight += base.to(accumulator)
    return (x.to(accumulator) @ weight.T).to(x.dtype)
