"""How differences begin: ``B A`` in the place of ``W_l - W_a`` or ``W_l - c W_a``, one matrix at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from compression_worker.contracts import sha256
from compression_worker.methods.deltallm.config import SCALED, SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.differences import Pieces, is_signs, signs_of
from compression_worker.methods.deltallm.groups import own_rank
from compression_worker.methods.deltallm.matrices import Shareable, SharedMatrix
from compression_worker.methods.deltallm.sources import Sources
from compression_worker.quantization.calibration import Hessians
from compression_worker.quantization.low_rank import closed_form, truncated


class Starts:
    """The factors that followers begin with, rounded to the dtype that they are stored in.

    They have ``rank``, or what ``ranks`` says of a block; a matrix that would grow has the highest that it can.
    """

    def __init__(
        self,
        config: DeltaLLMConfig,
        rank: int,
        ranks: Mapping[int, int],
        sources: Sources,
        hessians: Hessians | None,
        *,
        seed: int,
        device: str,
    ) -> None:
        self._config, self._rank, self._ranks = config, rank, ranks
        self._sources, self._hessians = sources, hessians
        self._seed, self._device = seed, device
        self._dtype: torch.dtype = getattr(torch, config.delta_dtype)

    def of(self, layers: Shareable, block: int, anchor: int) -> dict[str, Pieces]:
        """Factors of the matrices of ``block`` on ``anchor``, by name of weight."""
        rank = self._ranks.get(block, self._rank)
        return {
            follower.name: self._rounded(self._one(follower, theirs, rank))
            for follower, theirs in layers.pairs({block: anchor})
        }

    def _one(self, follower: SharedMatrix, anchor: SharedMatrix, rank: int) -> Pieces:
        rank = own_rank(*follower.sides, rank)
        if not rank and self._config.share_form == SCALED:  # left out
            return torch.zeros((0, follower.sides[1])), torch.zeros((follower.sides[0], 0)), torch.zeros(1)
        seed = int(sha256(f"{self._seed} {follower.name} {anchor.name}".encode())[:15], 16)
        if self._config.start == "zero":
            return (*_zero(follower.sides, rank, seed), *self._scale(torch.ones(1)))
        own, theirs = (self._sources.own(follower).to(self._device), self._sources.anchor(anchor).to(self._device))
        if self._config.share_form == SIGN:
            return signs_of(own - theirs)
        hessian = None if self._hessians is None else self._hessians.of(follower.name).to(own.device)
        scale = self._scale(likeness(own, theirs, hessian))
        delta = own - scale[0].to(own) * theirs if scale else own - theirs
        if hessian is None:
            return (*truncated(delta, rank, seed), *scale)
        a, b, _ = closed_form(delta, hessian, rank)
        return (a, b, *scale)

    def _scale(self, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``c`` as it is stored, in the form that has one."""
        return (c.to("cpu", self._dtype),) if self._config.share_form == SCALED else ()

    def _rounded(self, factors: Pieces) -> Pieces:
        if is_signs(factors):
            return factors
        return tuple(one.to("cpu", self._dtype).contiguous() for one in factors)


def likeness(own: torch.Tensor, anchor: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """``c (1,)`` with ``c W_a`` nearest to ``W_l``, both ``(N, K)``: in the metric of the inputs where there is one."""
    weighed = anchor.double() if hessian is None else anchor.double() @ hessian.double()
    size = (weighed * anchor).sum()
    return ((weighed * own).sum() / size).reshape(1) if size > 0 else torch.zeros(1, dtype=torch.float64)


def _zero(sides: tuple[int, int], rank: int, seed: int) -> Pieces:
    """``A`` uniform (Kaiming), ``B`` zero."""
    a = torch.empty((rank, sides[1]))
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return a, torch.zeros((sides[0], rank))
