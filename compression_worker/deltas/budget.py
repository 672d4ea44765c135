"""Bytes spent where they save most: one option for each matrix, within a budget.

The options of a matrix are points (bytes, loss). Only those on the lower convex hull can be part of a best choice at
some price of a byte; going from the cheapest point of every matrix along its hull, the steps that save most loss a byte
are taken first (the Lagrangian solution of the multiple-choice knapsack). What room is left at the end goes to the
single changes that still fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One way to store a matrix."""

    bytes: int
    loss: float


@dataclass(frozen=True)
class Move:
    """Matrix ``name`` goes on to its option ``to``."""

    name: str
    to: int
    bytes: int
    loss: float


Choice = dict[str, int]
"""Matrix -> the index of its option."""


def cheapest(options: Mapping[str, Sequence[Option]]) -> Choice:
    """The smallest option of each matrix; of equally small ones, that of the least loss."""
    return {
        name: min(range(len(ways)), key=lambda at, ways=ways: (ways[at].bytes, ways[at].loss, at))  # type: ignore[misc]
        for name, ways in options.items()
    }


def moves(options: Mapping[str, Sequence[Option]]) -> list[Move]:
    """All hull steps of all matrices, the best saving a byte first; each matrix's own steps keep their order."""
    found = []
    start = cheapest(options)
    for name, ways in options.items():
        hull = _hull(ways, start[name])
        for before, after in pairwise(hull):
            bytes_more = ways[after].bytes - ways[before].bytes
            found.append(Move(name, after, bytes_more, ways[before].loss - ways[after].loss))
    return sorted(found, key=lambda move: (-move.loss / move.bytes, move.name, move.to))


def within(options: Mapping[str, Sequence[Option]], budget: int) -> Choice:
    """The least loss that ``budget`` bytes allow; the cheapest of all where not even that fits."""
    choice = cheapest(options)
    left = budget - cost(options, choice)
    stopped = set()
    for move in moves(options):
        if move.name in stopped:
            continue
        if move.bytes <= left:
            choice[move.name] = move.to
            left -= move.bytes
        else:
            stopped.add(move.name)
    return _filled(options, choice, left)


def cost(options: Mapping[str, Sequence[Option]], choice: Choice) -> int:
    """Bytes of a choice."""
    return sum(options[name][at].bytes for name, at in choice.items())


def loss(options: Mapping[str, Sequence[Option]], choice: Choice) -> float:
    """Loss of a choice."""
    return sum(options[name][at].loss for name, at in choice.items())


def _filled(options: Mapping[str, Sequence[Option]], choice: Choice, left: int) -> Choice:
    """Single changes that save loss and still fit, the greatest saving first, until none is left."""
    while True:
        best: tuple[float, str, int] | None = None
        for name, at in choice.items():
            now = options[name][at]
            for other, way in enumerate(options[name]):
                saved = now.loss - way.loss
                if saved > 0 and way.bytes - now.bytes <= left and (best is None or saved > best[0]):
                    best = saved, name, other
        if best is None:
            return choice
        _, name, other = best
        left -= options[name][other].bytes - options[name][choice[name]].bytes
        choice[name] = other


def _hull(ways: Sequence[Option], start: int) -> list[int]:
    """Indices of the lower convex hull from the cheapest option on, by rising bytes and falling loss."""
    order = sorted(range(len(ways)), key=lambda at: (ways[at].bytes, ways[at].loss, at))
    hull = [start]
    for at in order:
        if ways[at].loss >= ways[hull[-1]].loss or ways[at].bytes <= ways[hull[-1]].bytes:
            continue
        while len(hull) > 1 and _slope(ways, hull[-2], hull[-1]) <= _slope(ways, hull[-1], at):
            hull.pop()
        hull.append(at)
    return hull


def _slope(ways: Sequence[Option], before: int, after: int) -> float:
    """Loss saved a byte."""
    return (ways[before].loss - ways[after].loss) / (ways[after].bytes - ways[before].bytes)
