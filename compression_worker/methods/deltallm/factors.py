"""How differences begin: ``B A`` in the place of ``W_l - W_a``, one matrix at a time."""

from __future__ import annotations

import math

import torch

from compression_worker.contracts import sha256
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.matrices import SharedMatrix
from compression_worker.methods.deltallm.student import Factors, Student
from compression_worker.quantization.calibration import Hessians
from compression_worker.quantization.low_rank import closed_form, truncated


class Starts:
    """The factors that followers begin with, rounded to the dtype that they are stored in."""

    def __init__(self, config: DeltaLLMConfig, rank: int, seed: int, hessians: Hessians | None) -> None:
        self._config, self._rank, self._seed, self._hessians = config, rank, seed, hessians
        self._dtype: torch.dtype = getattr(torch, config.delta_dtype)

    def of(self, student: Student, block: int, anchor: int) -> dict[str, Factors]:
        """Factors of the matrices of ``block`` on ``anchor``, by name of weight."""
        return {
            follower.name: self._rounded(self._one(student, follower, theirs))
            for follower, theirs in student.shareable.pairs({block: anchor})
        }

    def _one(self, student: Student, follower: SharedMatrix, anchor: SharedMatrix) -> Factors:
        seed = int(sha256(f"{self._seed} {follower.name} {anchor.name}".encode())[:15], 16)
        if self._config.start == "zero":
            return _zero(follower.sides, self._rank, seed)
        delta = student.weight(follower) - student.weight(anchor)
        if self._hessians is None:
            return truncated(delta, self._rank, seed)
        a, b, _ = closed_form(delta, self._hessians.of(follower.name).to(delta.device), self._rank)
        return a, b

    def _rounded(self, factors: Factors) -> Factors:
        a, b = (one.to("cpu", self._dtype).contiguous() for one in factors)
        return a, b


def _zero(sides: tuple[int, int], rank: int, seed: int) -> Factors:
    """``A`` uniform (Kaiming), ``B`` zero."""
    a = torch.empty((rank, sides[1]))
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    return a, torch.zeros((sides[0], rank))
