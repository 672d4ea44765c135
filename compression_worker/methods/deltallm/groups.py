"""Which blocks may follow which, how many have to, and at what rank: arithmetic on shapes alone. No torch.

A *follower* uses the weights of its *anchor*, the nearest block before it that shares nothing itself, and keeps a
difference of rank ``r``. Of a block whose shared matrices are ``N x K``, that saves

    s(r) = sum N K - r (N + K),        followers = ceil(target / s(r))

(DeltaLLM, arXiv:2501.18596). That anchors come before their followers, that a follower's anchor is the nearest one and
that first and last blocks are not shared is our reading.

Ours beside it: a follower of rank 0 is *left out*, ``W = 0``. It saves all of ``s(0)``, and uses nothing of its anchor.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from compression_worker.contracts import CompressionError


def parse_groups(text: str) -> dict[int, int]:
    """Follower -> anchor out of ``4:5,6@32;10:11``. Refuses other text, and groups that contradict each other."""
    found: dict[int, int] = {}
    for anchor, followers, _ in _groups(text):
        for follower in followers:
            if not 0 <= anchor < follower:
                raise _bad(f"block {follower} cannot follow block {anchor}: an anchor comes before its followers")
            if follower in found:
                raise _bad(f"block {follower} follows twice; name it once")
            found[follower] = anchor
    if both := sorted(found.keys() & set(found.values())):
        raise _bad(f"block {both[0]} is an anchor and a follower; it can be one of them")
    return found


def parse_ranks(text: str) -> dict[int, int]:
    """Follower -> rank of the groups that say one: 5 and 6 -> 32 out of ``4:5,6@32;10:11``. 0: they are left out."""
    return {follower: rank for _, followers, rank in _groups(text) if rank is not None for follower in followers}


def _groups(text: str) -> Iterator[tuple[int, list[int], int | None]]:
    """Anchor, followers and rank of each group as written."""
    for group in filter(None, (one.strip() for one in text.split(";"))):
        blocks, at, said = group.partition("@")
        head, _, tail = blocks.partition(":")
        try:
            anchor, followers = int(head), [int(one) for one in tail.split(",")]
            rank = int(said) if at else None
        except ValueError:
            raise _bad(
                f"'{group}' is no group; write anchor:follower,follower as in 4:5,6;10:11, and @rank behind a group "
                "that has a rank of its own, as in 4:5,6@32"
            ) from None
        if rank is not None and rank < 0:
            raise _bad(f"group '{group}' has rank {rank}; it must be 0 or more")
        yield anchor, followers, rank


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The blocks of a model as far as sharing goes. ``alike``: those whose shared modules have equal shapes."""

    blocks: int
    alike: tuple[int, ...]
    protect_first: int
    protect_last: int

    @property
    def candidates(self) -> tuple[int, ...]:
        """Blocks that may follow: not protected, and one of their kind stands before them."""
        last = self.blocks - self.protect_last
        return tuple(block for block in self.alike[1:] if self.protect_first <= block < last)

    def anchor(self, follower: int, chosen: Collection[int]) -> int:
        """The nearest block before ``follower`` that is not one of ``chosen``."""
        return max(block for block in self.alike if block < follower and block not in chosen)

    def allowed(self, chosen: Mapping[int, int], still: int) -> dict[int, int]:
        """Candidate -> its anchor where ``chosen`` (follower -> anchor) are, and ``still`` more have to be found.

        An anchor may not follow; what would leave too few to choose from is no candidate.
        """
        taken = chosen.keys() | set(chosen.values())
        left = {block for block in self.candidates if block not in taken}
        pairs = {block: self.anchor(block, chosen) for block in sorted(left)}
        return {block: anchor for block, anchor in pairs.items() if len(left - {block, anchor}) >= still - 1}

    def idle(self, chosen: Collection[int]) -> dict[int, int]:
        """Candidate -> the first block, for those that may be left out where ``chosen`` are followers by now."""
        return {block: self.alike[0] for block in self.candidates if block not in chosen}

    def check(self, groups: Mapping[int, int]) -> None:
        """Refuse groups that name a block which does not exist, or blocks of different shapes."""
        for block in (*groups, *groups.values()):
            if block >= self.blocks:
                raise _bad(f"there is no block {block}: the model has {self.blocks}, from 0 to {self.blocks - 1}")
            if block not in self.alike:
                raise _bad(f"block {block} has no modules like those of the others; leave it out")


def picked(measured: Mapping[int, float], depth: Depth, chosen: Mapping[int, int], count: int, still: int) -> list[int]:
    """The ``count`` best of one round by what they cost, each with the anchor that it was measured with."""
    found = dict(chosen)
    order = sorted(measured, key=lambda block: (measured[block], block))
    first = depth.allowed(chosen, still)
    made: list[int] = []
    for block in order:
        allowed = depth.allowed(found, still - len(made))
        if len(made) < count and block in first and allowed.get(block) == first[block]:
            found[block] = allowed[block]
            made.append(block)
    return made


def cheapest(measured: Mapping[int, float], count: int) -> list[int]:
    """The ``count`` blocks that cost least."""
    return sorted(measured, key=lambda block: (measured[block], block))[:count]


@dataclass(frozen=True)
class Round:
    """``count`` blocks are chosen when ``still`` have to be found; ``leaves_out``: they do nothing any more."""

    count: int
    still: int
    leaves_out: bool = False


@dataclass(frozen=True)
class Budget:
    """How many blocks follow, and at what rank: each of them, or the highest where ``ranks`` names each follower's.

    ``left_out`` of them have rank 0 instead.
    """

    followers: int
    rank: int
    ranks: Mapping[int, int] = field(default_factory=dict)
    left_out: int = 0

    def factors(self, sides: Sequence[tuple[int, int]]) -> int:
        """Parameters of all factors; ``sides`` are ``(N, K)`` of a follower's shared matrices."""
        ranks = self.ranks.values() if self.ranks else [self.rank] * (self.followers - self.left_out)
        return sum(saving(sides, 0) - saving(sides, rank) for rank in ranks)

    def rounds(self, picks: int) -> list[Round]:
        """Rounds of at most ``picks`` choices: first those that are left out, then those that keep a difference."""
        counts = [(count, True) for count in rounds(self.left_out, picks)]
        counts += [(count, False) for count in rounds(self.followers - self.left_out, picks)]
        before = accumulate((count for count, _ in counts), initial=0)
        return [
            Round(count, self.followers - done, leaves) for (count, leaves), done in zip(counts, before, strict=False)
        ]


def saving(sides: Sequence[tuple[int, int]], rank: int) -> int:
    """Parameters that one follower saves; ``sides`` are ``(N, K)`` of its shared matrices."""
    return sum(n * k - own_rank(n, k, rank) * (n + k) for n, k in sides)


def own_rank(n: int, k: int, rank: int) -> int:
    """``rank``, or the highest at which a matrix ``N x K`` is smaller than it was."""
    return min(rank, (n * k - 1) // (n + k))


def highest_rank(sides: Sequence[tuple[int, int]]) -> int:
    """The highest rank at which every matrix is smaller than it was."""
    return min((n * k - 1) // (n + k) for n, k in sides)


def check_rank(sides: Sequence[tuple[int, int]], rank: int, whose: str = "rank") -> None:
    """Refuse a rank at which a difference is as large as a matrix; ``whose`` names it."""
    side, most = min(min(pair) for pair in sides), highest_rank(sides)
    if rank > most:
        what = f"has {side} rows or columns only" if rank > side else "would not become smaller"
        raise _bad(f"{whose} is {rank}, and a shared matrix {what}; the highest rank that saves anything is {most}")


def given(
    groups: Mapping[int, int], own: Mapping[int, int], depth: Depth, sides: Sequence[tuple[int, int]], rank: int
) -> Budget:
    """What ``groups`` (follower -> anchor) come to, at ``rank`` where ``own`` (follower -> rank) has no other.

    Refuses groups that the model does not have, and ranks that save nothing.
    """
    depth.check(groups)
    ranks = {follower: own.get(follower, rank) for follower in sorted(groups)}
    for follower, one in ranks.items():
        whose = (
            f"the rank of block {follower}, in the group of block {groups[follower]}," if follower in own else "rank"
        )
        check_rank(sides, one, whose)
    left_out = sum(1 for follower in groups if own.get(follower) == 0)
    return Budget(len(groups), max(ranks.values()), ranks if own else {}, left_out)


def spread(rank: int, ranks: Collection[int], between: str) -> str:
    """``64``, or the lowest and the highest of ``ranks`` where they differ: ``32 to 64``. Blocks left out have none."""
    kept = [one for one in ranks if one]
    low, high = min(kept, default=rank), max(kept, default=rank)
    return f"{low}{between}{high}" if low < high else str(high)


def budget(
    sides: Sequence[tuple[int, int]],
    parameters: int,
    depth: Depth,
    *,
    target: float | None,
    followers: int | None,
    rank: int,
    beside: int = 0,
    leaves_out: bool = False,
) -> Budget:
    """As few followers as reach ``target`` (a share of ``parameters``) at ``rank``, then the highest rank that does.

    ``followers`` overrules the target; ``beside``: parameters that a follower keeps beside its factors. With
    ``leaves_out``, as many blocks are left out as the target has room for, and ``rank`` is not asked for. Refuses a
    model without shareable layers, and what cannot be met.
    """
    most = len(depth.candidates)
    if not most:
        raise CompressionError(
            "nothing_to_share",
            f"no layer can be shared: of {depth.blocks} blocks the first {depth.protect_first} and the last "
            f"{depth.protect_last} are protected and an anchor is needed; lower protect_first and protect_last",
        )
    if leaves_out:
        assert target is not None
        return _leaving_out(sides, parameters, most, target, beside)
    check_rank(sides, rank)
    if followers is not None:
        if followers > most:
            raise _bad(f"followers is {followers}, and {most} blocks can follow at most")
        return Budget(followers, rank)
    assert target is not None
    wanted = target * parameters
    needed = math.ceil(wanted / (saving(sides, rank) - beside))
    if needed > most:
        reached, ever = (100 * most * (saving(sides, one) - beside) / parameters for one in (rank, 1))
        raise CompressionError(
            "target_out_of_reach",
            f"target_reduction is {target:g}, and {most} followers of rank {rank} save {reached:.3g} % of the "
            f"parameters at most ({ever:.3g} % at rank 1): set a lower target or rank, share more modules, or protect "
            "fewer blocks",
        )
    return Budget(needed, max(rank, _rank_that_saves(sides, wanted / needed + beside, highest_rank(sides))))


def _leaving_out(sides: Sequence[tuple[int, int]], parameters: int, most: int, target: float, beside: int) -> Budget:
    """As many blocks left out as the target has room for, and one follower with a difference for what is missing.

    Where even a difference of rank 1 is too large for that, one block more is left out. So that little more goes than
    is asked for, the rank may be higher than what saves anything in the smallest matrices, which have the highest that
    does.
    """
    wanted, whole = target * parameters, saving(sides, 0) - beside
    gone = math.floor(wanted / whole)
    missing = wanted - gone * whole
    if missing > saving(sides, 1) - beside:
        gone, missing = gone + 1, 0.0
    followers = gone + (missing > 0)
    if followers > most:
        raise CompressionError(
            "target_out_of_reach",
            f"target_reduction is {target:g}, and the {most} blocks that may be left out have "
            f"{100 * most * whole / parameters:.3g} % of the parameters: set a lower target, share more modules, or "
            "protect fewer blocks",
        )
    most_rank = max(highest_rank([pair]) for pair in sides)
    rank = _rank_that_saves(sides, missing + beside, most_rank) if missing else 0
    return Budget(followers, rank, left_out=gone)


def _rank_that_saves(sides: Sequence[tuple[int, int]], wanted: float, most: int) -> int:
    """The highest rank up to ``most`` with ``s(r) >= wanted``: ``s`` falls with the rank."""
    return bisect_left(range(1, most + 1), True, key=lambda rank: saving(sides, rank) < wanted)


def rounds(followers: int, picks: int) -> list[int]:
    """How many are chosen in each round."""
    edges = [*range(0, followers, picks), followers]
    return [stop - start for start, stop in pairwise(edges)]


def _bad(words: str) -> CompressionError:
    return CompressionError("bad_setting", words)
