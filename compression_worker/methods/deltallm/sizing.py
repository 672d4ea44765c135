"""How many blocks follow and at what rank: the job and what is foretold of it ask the settings once. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from compression_worker.methods.deltallm.config import SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.groups import Budget, Depth, budget, given


def depth_of(config: DeltaLLMConfig, blocks: int, alike: Sequence[int]) -> Depth:
    """The blocks of a model, of which those in ``alike`` have equal shapes, and the settings protect some."""
    return Depth(
        blocks=blocks, alike=tuple(alike), protect_first=config.protect_first, protect_last=config.protect_last
    )


def size_of(config: DeltaLLMConfig, depth: Depth, sides: Sequence[tuple[int, int]], parameters: int) -> Budget:
    """As the groups by hand come to, or as the target takes; ``sides`` are ``(N, K)`` of a block's shared matrices.

    Raises :class:`CompressionError` as :mod:`compression_worker.methods.deltallm.groups` does.
    """
    rank = 0 if config.share_form == SIGN else config.rank
    if by_hand := config.by_hand:
        return given(by_hand, config.own_ranks, depth, sides, rank)
    return budget(
        sides,
        parameters,
        depth,
        target=config.target_reduction,
        followers=config.followers,
        rank=rank,
        beside=config.scales_of(len(sides)),
        leaves_out=config.drops,
    )
