"""How differences begin: ``B A`` in the place of ``W_l - W_a``, one matrix at a time."""

from __future__ import annotations

import math

import torch

from compression_worker.contracts import sha256
from compression_worker.methods.deltallm.config import SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.differences import Pieces, is_signs, signs_of
from compression_worker.methods.deltallm.matrices import Shareable, SharedMatrix
from compression_worker.methods.deltallm.sources import Sources
from compression_worker.quantization.calibration import Hessians
from compression_worker.quantization.low_rank import closed_form, truncated


class Starts:
    """The factors that followers begin with, rounded to the dtype that they are stored in."""

    def __init__(
        self, config: DeltaLLMConfig, rank: int, sources: Sources, hessians: Hessians | None, *, seed: int, device: str
    ) -> None:
        self._config, self._rank, self._sources, self._hessians = config, rank, sources, hessians
        self._seed, self._device = seed, device
        self._dtype: torch.dtype = getattr(torch, config.delta_dtype)

    def of(self, layers: Shareable, block: int, anchor: int) -> dict[str, Pieces]:
        """Factors of the matrices of ``block`` on ``anchor``, by name of weight."""
        return {
            follower.name: self._rounded(self._one(follower, theirs))
            for follower, theirs in layers.pairs({block: anchor})
        }

    def _one(self, follower: SharedMatrix, anchor: SharedMatrix) -> Pieces:
        seed = int(sha256(f"{self._seed} {follower.name} {anchor.name}".encode())[:15], 16)
        if self._config.start == "zero":
            return _zero(follower.sides, self._rank, seed)
        delta = (self._sources.own(follower) - self._sources.anchor(anchor)).to(self._device)
        if self._config.share_form == SIGN:
            return signs_of(delta)
        if self._hessians is None:
            return truncated(delta, self._rank, seed)
        a, b, _ = closed_form(delta, self._hessians.of(follower.name).to(delta.device), self._rank)
        return a, b

    def _rounded(self, factors: Pieces) -> Pieces:
        if is_signs(factors):
            return factors
        a, b = (one.to("cpu", self._dtype).contiguous() for one in factors)
        return a, b


def _zero(sides: tuple[int, int], rank: int, seed: int) -> Pieces:
    """``A`` uniform (Kaiming), ``B`` zero."""
    a = torch.empty((rank, sides[1]))
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return a, torch.zeros((sides[0], rank))
