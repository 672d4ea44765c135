"""The kinds of E8P's points, and the best of them for a vector: how a nearest point is found without a search.

Take a shift d = +-1/4, ``u = x - d``, and sort ``|u|`` to ``v_1 >= ... >= v_8``. All patterns of squared norm up to 10
are codewords, so the best of them puts its large entries where ``|u|`` is largest, takes the signs of u, and, where
their parity does not fit, turns that of v_8 (which is 1/2 in every such pattern). It is the best of seven kinds, each
scored from v alone: ``g . u - |g|^2 / 2 = sum_i a_i v_i - |a|^2 / 2``, less v_8 for a turned sign, plus ``d sum(x)``,
which compares the shifts. The eighth kind, five entries of 3/2, bounds the 29 of 56 patterns that are codewords.

Vectors are columns here, so that each step is one operation over many. QuIP#, arXiv 2402.04396, sections 4.2 and C.1;
the kinds are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from kernels.e8p_matmul.codebook import PLACES, patterns

LARGE = (0, 2, 4, 1, 1, 3, 5, 2)
"""Entries above 1/2 of each kind; in the first half of the kinds the sum of the pattern is even."""
WIDEST = (0, 0, 0, 1, 0, 0, 0, 1)
"""Entries of 5/2 of each kind; the other large ones are 3/2."""
FIVES = 6
"""The kind whose patterns are not all codewords."""
PARTS = 12
"""Of what scores are made of: v_1 .. v_8, v_8 where the signs of u are odd in number, v_8 where even, 1, d sum(x)."""
ROUNDING = {torch.float32: 2.0**-18, torch.float64: 2.0**-47}
"""Bounds the error of the difference of two scores over ``sum(v) + 5``: 14 roundings of sums below twice that, each."""


@dataclass(frozen=True)
class Tables:
    """``shift (2, 1)``. ``scoring (9, PARTS)``: of each kind, and of the bound on rounding. ``choice (5, 16)``: of each
    kind and shift the rows, of ``2 PARTS``, that entries of 3/2 or more, entries of 5/2, and all but the turned entry
    exceed; the shift; and 1. ``packing (3, 32)``: from these four tests of 8 coordinates to the base-3 number of the
    pattern, the sign bits of all but the turned entry, and those of u. ``words (6561,)``: by number, or -1."""

    shift: torch.Tensor
    scoring: torch.Tensor
    choice: torch.Tensor
    packing: torch.Tensor
    words: torch.Tensor


def parts_of(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """``x (8, n)`` -> ``(2, PARTS, n)``: what the scores for each shift are made of."""
    u = x - tables.shift[:, None]
    parts = x.new_empty(2, PARTS, x.shape[1])
    _sort_descending(u.abs(), parts[:, :8])
    bits = u.view(torch.int32 if u.dtype == torch.float32 else torch.int64)
    bits = bits[:, :4] ^ bits[:, 4:]
    bits = bits[:, :2] ^ bits[:, 2:]
    odd = (bits[:, 0] ^ bits[:, 1]) < 0
    torch.mul(parts[:, 7], odd, out=parts[:, 8])
    torch.sub(parts[:, 7], parts[:, 8], out=parts[:, 9])
    parts[:, 10] = 1
    torch.mul(x.sum(0), tables.shift, out=parts[:, 11])
    return parts


def _sort_descending(v: torch.Tensor, out: torch.Tensor) -> None:
    """Sort ``v (2, 8, n)``, which is used up, along its middle axis: Batcher's network of 19 comparisons, 6 layers."""
    other, n = torch.empty_like(v), v.shape[2]
    pairs, pairs_out = v.view(2, 4, 2, n), other.view(2, 4, 2, n)
    _compare(pairs[:, :, 0], pairs[:, :, 1], pairs_out[:, :, 0], pairs_out[:, :, 1])
    fours, fours_out = other.view(2, 2, 2, 2, n), v.view(2, 2, 2, 2, n)
    _compare(fours[:, :, 0], fours[:, :, 1], fours_out[:, :, 0], fours_out[:, :, 1])
    fours = v.view(2, 2, 4, n)
    _compare_in_place(fours[:, :, 1], fours[:, :, 2])
    _compare(v[:, :4], v[:, 4:], out[:, :4], out[:, 4:])
    _compare_in_place(out[:, 2:4], out[:, 4:6])
    _compare_in_place(out[:, 1:7:2], out[:, 2:8:2])


def _compare(a: torch.Tensor, b: torch.Tensor, high: torch.Tensor, low: torch.Tensor) -> None:
    torch.maximum(a, b, out=high)
    torch.minimum(a, b, out=low)


def _compare_in_place(a: torch.Tensor, b: torch.Tensor) -> None:
    high = torch.maximum(a, b)
    torch.minimum(a, b, out=b)
    a.copy_(high)


def scores_of(parts: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts ``(2, PARTS, n)`` -> scores ``(16, n)`` of each shift and kind, and the bound on rounding ``(n,)``."""
    scores = parts.new_empty(17, parts.shape[2])
    torch.mm(tables.scoring[:8], parts[0], out=scores[:8])
    torch.mm(tables.scoring, parts[1], out=scores[8:])
    return scores[:16], scores[16]


def best_of(scores: torch.Tensor, choice: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``scores (m, n)``, whose best are lost -> by how much the best is it ``(n,)``, 0 among equals, and its column of
    ``choice (k, m)``, whose last row is 1; among equals the sum of theirs."""
    best = scores.amax(0)
    is_best = scores == best
    chosen = choice @ is_best.to(scores.dtype)
    margin = best - scores.masked_fill_(is_best, -torch.inf).amax(0)
    return margin.mul_(chosen[-1] == 1), chosen


def least_gap(parts: torch.Tensor) -> torch.Tensor:
    """The least difference of two neighbours among ``v_1 .. v_8, 0``, which say where entries stand and signs.

    Where it is not zero they are right: rounding ``x - d`` may make two of them equal, but never turns them round.
    """
    return torch.minimum((parts[:, :7] - parts[:, 1:8]).amin((0, 1)), parts[:, 7].amin(0))


def words_of(x: torch.Tensor, parts: torch.Tensor, chosen: torch.Tensor, tables: Tables) -> torch.Tensor:
    """The code words ``(n,)`` int32 of the chosen kinds, negative where the pattern is not in the codebook."""
    n = x.shape[1]
    # Among equals rows are sums of rows: the answer is not used, but must find some row.
    at = chosen[:3].to(torch.int64).clamp_(max=2 * PARTS - 1)
    limits = parts.view(2 * PARTS, n).gather(0, at)
    u = x - chosen[3]
    above = torch.empty((4, 8, n), dtype=torch.bool, device=x.device)
    torch.gt(u.abs(), limits[:, None], out=above[:3])
    torch.lt(u, 0, out=above[3])
    number, others, signs = (tables.packing @ above.view(32, n).to(x.dtype)).to(torch.int32)
    return tables.words[number] ^ others ^ signs ^ (chosen[3] < 0)


@cache
@torch.inference_mode(False)
def tables_for(device: torch.device) -> Tables:
    """In double on a GPU, where the precision of single products is a setting of the process."""
    dtype = torch.float32 if device.type == "cpu" else torch.float64
    scoring = torch.zeros(9, PARTS)
    choice = torch.ones(5, 2, 8)
    for kind, (large, widest) in enumerate(zip(LARGE, WIDEST, strict=True)):
        odd = kind >= 4
        pattern = torch.full((8,), 0.5)
        pattern[:large] += 1
        pattern[:widest] += 1
        scoring[kind, :8] = pattern
        scoring[kind, 8 + odd] = -1
        scoring[kind, 10:] = torch.tensor([-pattern.square().sum() / 2, 1])
        for side, shift in enumerate((0.25, -0.25)):
            choice[:3, side, kind] = PARTS * side + torch.tensor([large, widest, 8 + odd])
            choice[3, side, kind] = shift
    scoring[8, :8], scoring[8, 10] = ROUNDING[dtype], 5 * ROUNDING[dtype]
    packing = torch.zeros(3, 4, 8)
    packing[0, :2] = ternary()
    packing[1, 2] = packing[2, 3] = bits_of_signs()
    # Every bit of the sign byte is turned over, because the turned entry is found as the one that is not above.
    words = words_by_number()
    words = torch.where(words < 0, words, words ^ 255)
    shifts = torch.tensor([[0.25], [-0.25]])
    return Tables(
        shift=shifts.to(device, dtype),
        scoring=scoring.to(device, dtype),
        choice=choice.view(5, 16).to(device, dtype),
        packing=packing.view(3, 32).to(device, dtype),
        words=words.to(device),
    )


def ternary() -> torch.Tensor:
    """``(8,)`` float32: what the levels 0, 1, 2 of a pattern are multiplied by to make its base-3 number."""
    return 3.0 ** torch.arange(7, -1, -1)


def bits_of_signs() -> torch.Tensor:
    """``(8,)`` float32: the bit of the sign mask for each coordinate."""
    return 2.0 ** torch.tensor(PLACES)


@cache
def words_by_number() -> torch.Tensor:
    """``(6561,)`` int32: by the base-3 number of a pattern the code word of its all-positive point but for the shift,
    and -1 for patterns outside the codebook."""
    words = torch.full((3**8,), -1, dtype=torch.int32)
    odd = (patterns().sum(1) % 2).to(torch.int32)
    words[((patterns() - 0.5) @ ternary()).to(torch.int64)] = torch.arange(256, dtype=torch.int32) << 8 ^ odd << 7
    return words
