"""What rank buys: how near the chosen followers are before training with less and less of their differences.

The factors of a truncated decomposition are nested: those of rank ``r`` are the first rows of ``A`` and columns of
``B`` of any higher rank. So one decomposition of each matrix tells of every rank below its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from compression_worker.contracts import Json
from compression_worker.methods.deltallm.config import SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.differences import Pieces
from compression_worker.methods.deltallm.student import Student
from compression_worker.quantization.learning import HeldOut

PARTS = (2, 4, 8, 16)
"""A half of the rank, a quarter ...: measured beside all of it and none."""


def is_swept(config: DeltaLLMConfig) -> bool:
    """Whether differences begin as something that a lower rank is a part of."""
    return config.share_form != SIGN and config.start != "zero"


def rank_sweep(
    student: Student,
    groups: Mapping[int, int],
    factors: Callable[[int, int], Mapping[str, Pieces]],
    held: HeldOut,
    whole: Json,
    rank: int,
) -> list[Json]:
    """Divergences on held-out text, from no rank to all of it: ``parts`` divides the rank, 0 leaves nothing of it.

    ``groups``: follower -> anchor; ``factors`` of a follower and its anchor, by weight; ``whole``: the point of the
    whole ``rank``, which is known.
    """
    points = [{"parts": 1, "kl": whole["kl"]}]
    for parts in (*(one for one in PARTS if one <= rank), 0):
        for follower, anchor in groups.items():
            # What is left out has no rank to lose, and stays as it is.
            student.put(
                follower, anchor, {name: cut(pieces, parts) for name, pieces in factors(follower, anchor).items()}
            )
        student.share(groups)
        points.append({"parts": parts, "kl": held.measured(student, 0, "start")["kl"]})
    return points[::-1]


def cut(pieces: Pieces, parts: int) -> Pieces:
    """The first ``rank // parts`` of a product's terms, none where ``parts`` is 0, and what stands beside them."""
    a, b, *rest = pieces
    rank = len(a) // parts if parts else 0
    return (a[:rank], b[:, :rank], *rest)
