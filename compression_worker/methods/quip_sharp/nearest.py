"""The nearest point of E8P, exactly, in about half a microsecond where there are thousands to find.

The best of the seven kinds whose points all belong to the codebook, or a point of the eighth that does, is the answer
where it wins by more than rounding could hide (see :mod:`kinds`). Where a point of the eighth kind wins that does not
belong, 2 to 4 vectors in 100, the 29 patterns of that kind that do are tried one by one. What is still closer to a tie
than rounding allows, a vector in some thousands, is searched exhaustively, in double. QuIP#, arXiv 2402.04396,
section 4.2; the way to the answer is ours.
"""

from __future__ import annotations

from functools import cache

import torch

from compression_worker.making.threads import one_thread_per_operation
from compression_worker.methods.quip_sharp.exhaustive import exhaustive
from compression_worker.methods.quip_sharp.kinds import (
    FIVES,
    PARTS,
    Tables,
    best_of,
    bits_of_signs,
    least_gap,
    parts_of,
    scores_of,
    tables_for,
    ternary,
    words_by_number,
    words_of,
)
from kernels.e8p_matmul.codebook import decode, patterns

TILE = {"cpu": 8192, "cuda": 1 << 18}
"""Vectors searched together: on a CPU their intermediates, about a kilobyte each, stay in its caches."""


def nearest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x (n, 8)`` float32 -> code words ``(n,)`` int32 of the nearest points, and these ``(n, 8)`` float32.

    Of equally near points the one of the lowest code word. Raises ``ValueError`` where x is not finite.
    """
    codes = torch.empty(len(x), dtype=torch.int32, device=x.device)
    size = TILE[x.device.type]
    with one_thread_per_operation():
        for start in range(0, len(x), size):
            _search(x[start : start + size], codes[start : start + size])
    return codes, decode(codes)


@torch.inference_mode()
def _search(x: torch.Tensor, codes: torch.Tensor) -> None:
    tables = tables_for(x.device)
    columns = x.T.to(tables.scoring.dtype, memory_format=torch.contiguous_format, copy=True)
    parts = parts_of(columns, tables)
    scores, rounding = scores_of(parts, tables)
    margin, chosen = best_of(scores, tables.choice)
    codes.copy_(words_of(columns, parts, chosen, tables))
    sure = (margin > rounding) & (least_gap(parts) > 0)
    outside = (sure & (codes < 0)).nonzero()[:, 0]
    if len(outside):
        found, margin = _with_listed_fives(columns[:, outside], parts[:, :, outside], scores[:, outside], tables)
        codes.index_copy_(0, outside, found)
        sure.index_copy_(0, outside, margin > rounding[outside])
    unsure = (~sure).nonzero()[:, 0]
    if len(unsure):
        rest = x[unsure]
        if not rest.isfinite().all():
            raise ValueError("a vector to be rounded is not finite: the weights or the Hessian before it are not")
        codes.index_copy_(0, unsure, exhaustive(rest))


def _with_listed_fives(
    x: torch.Tensor, parts: torch.Tensor, scores: torch.Tensor, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of the seven kinds and of the 29 listed patterns of the eighth: code words, and by how much."""
    candidates, choice = _listed(x.device)
    odd = parts[:, 8:9] > 0
    rows = torch.cat([(x - tables.shift[:, None]).abs(), odd, ~odd, parts[:, 10:]], dim=1)
    listed = (candidates @ rows).view(-1, x.shape[1])
    scores.view(2, 8, -1)[:, FIVES] = -torch.inf
    margin, chosen = best_of(torch.cat([scores, listed]), choice)
    return words_of(x, parts, chosen, tables) ^ chosen[4].to(torch.int32), margin


@cache
@torch.inference_mode(False)
def _listed(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 29 patterns as they are, and with each of their entries of 1/2 turned: how they are scored ``(116, 12)`` from
    ``|u|``, whether the negatives of u are odd in number, or even, 1, and d sum(x). And as :attr:`Tables.choice`, for
    all kinds and then for these ``(6, 248)``, with a row before the last: what is XORed to the word that has no large
    and no turned entry."""
    tables = tables_for(device)
    fives = patterns()[227:]
    turned, entry = (fives == 0.5).nonzero().T
    points = torch.cat([fives, fives[turned].scatter_(1, entry[:, None], -0.5)])
    scoring = torch.zeros(len(points), 12)
    scoring[:, :8], scoring[:, 10], scoring[:, 11] = points, -6, 1
    # Their sum is odd: as they are they fit an odd number of negatives, and turned an even one.
    scoring[:29, 9] = scoring[29:, 8] = -1e30
    words = words_by_number()[((points.abs() - 0.5) @ ternary()).to(torch.int64)]
    words = words ^ ((points < 0).float() @ bits_of_signs()).to(torch.int32)
    own = torch.zeros(6, 2, len(points))
    own[3] = tables.shift.cpu()
    own[:3, 1] = PARTS
    own[4] = words ^ tables.words[0].cpu()
    own[5] = 1
    kinds = torch.cat([tables.choice[:4], torch.zeros_like(tables.choice[:1]), tables.choice[4:]])
    return scoring.to(tables.scoring), torch.cat([kinds, own.view(6, -1).to(kinds)], dim=1)
