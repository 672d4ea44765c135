"""The nearest point of E8P by trying every candidate, in double: the lowest code word among equals.

For each shift d = +-1/4 and ``u = x - d``, the best codeword of a pattern takes the signs of u, but for one where their
parity does not fit. So candidates are patterns with at most one negative entry among the first seven coordinates, that
one -1/2, and the sign of coordinate 7 that the parity asks for: 1,366. They are scored against ``|u|`` with coordinate
7 negated where u has an odd number of negatives: ``w . g - |g|^2 / 2``, plus ``d sum(x)``, which compares the shifts.
Among patterns of equal score the lowest wins, and among its 256 sign bytes the lowest of equal score. Sums are exact,
and so is the rule, for inputs of few binary digits, which are the ones that tie. QuIP#, arXiv 2402.04396, section 4.2.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from kernels.e8p_matmul.codebook import PLACES, patterns, stored_patterns

TILE = 32
"""Vectors searched together: 2 x 1366 scores of each, in double, about fill a second-level cache."""


@torch.inference_mode()
def exhaustive(x: torch.Tensor) -> torch.Tensor:
    """``x (n, 8)`` finite -> code words ``(n,)`` int32."""
    return torch.cat([_tile(part) for part in x.to(torch.float64).split(TILE)])


def _tile(x: torch.Tensor) -> torch.Tensor:
    shift, candidates, owners, stored, signs, is_minus = _tables(x.device)
    u = x - shift
    rows = x.new_empty(2, len(x), 10)
    torch.abs(u, out=rows[:, :, :8])
    rows[:, :, 7] *= u.sign().add_(0.5).prod(2).sign()
    rows[:, :, 8] = 1
    torch.mul(x.sum(1), shift[:, :, 0], out=rows[:, :, 9])
    scores = (rows.view(-1, 10) @ candidates).view(2, len(x), -1)
    is_best = scores == scores.amax(2, keepdim=True).amax(0)
    pattern = torch.where(is_best, owners, 256.0).amin(2).amin(0).to(torch.int64)
    plus, minus = (stored[pattern] * u) @ signs + rows[:, :, 9:]
    return (pattern << 8 | torch.where(is_minus, minus, plus).argmax(1)).to(torch.int32)


@cache
@torch.inference_mode(False)
def _tables(device: torch.device) -> tuple[torch.Tensor, ...]:
    """The shifts ``(2, 1, 1)``; candidates with their half norms and a one ``(10, 1366)``, and their patterns
    ``(1366,)``; stored patterns ``(256, 8)``; the signs of each sign byte ``(8, 256)``, and where its shift is -1/4."""
    absolute = patterns().double().numpy()
    flips = np.ones((8, 8))
    flips[range(7), range(7)] = -1
    points = absolute[:, None] * flips
    points[points.sum(2) % 2 == 1, 7] *= -1
    wanted = np.concatenate([absolute[:, :7] == 0.5, np.ones((256, 1), dtype=bool)], axis=1)
    owners = np.broadcast_to(np.arange(256.0)[:, None], (256, 8))[wanted]
    points = points[wanted]
    rows = np.concatenate([points, -np.square(points).sum(1, keepdims=True) / 2, np.ones((len(points), 1))], axis=1)
    byte = np.arange(256)
    parity = np.bitwise_xor.reduce(byte >> np.arange(8)[:, None] & 1)
    signs = 1.0 - 2 * ((byte ^ parity) >> np.array(PLACES)[:, None] & 1)
    shift = np.array([0.25, -0.25]).reshape(2, 1, 1)
    tables = (shift, rows.T.copy(), owners, stored_patterns().double().numpy(), signs, parity == 1)
    return tuple(torch.from_numpy(table).to(device) for table in tables)
