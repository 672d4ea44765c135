"""Uniform grids: a scale and a zero for each row of each group of columns, fitted before a matrix is rounded.

``value = scale * (code - zero)`` with codes 0 to ``2^b - 1``. Asymmetric: from the least to the greatest weight, 0
included. Symmetric: ``+-max |w|`` with the zero in the middle. Scales are rounded to fp16 before anything is rounded to
them, because that is what a runtime will multiply by (arXiv:2210.17323; the search for a smaller range as in the
published code: the share of the range with the least error).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CLIP_NORM = 2.4
CLIP_SHARES = tuple(1 - step / 25 for step in range(15))
"""Shares of the range that are tried: down to 44 %."""
LEAST_SCALE = 6e-8
"""The smallest number of fp16: a group of zeros needs some scale."""


@dataclass(frozen=True)
class Grids:
    """``scales`` and ``zeros``, both fp32 ``(G, N)``: one line a group of ``group_size`` columns."""

    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int

    @property
    def most(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """``codes (K, N)`` -> fp32 ``(K, N)``."""
        group = torch.arange(len(codes), device=codes.device) // self.group_size
        return (codes.to(torch.float32) - self.zeros[group]) * self.scales[group]


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """How grids are fitted. ``least_zero`` is 1 for a format that cannot store a zero of 0."""

    bits: int
    symmetric: bool
    clip: bool
    least_zero: int = 0


def fitted(weight: torch.Tensor, group_size: int, settings: GridSettings, importance: torch.Tensor | None) -> Grids:
    """The grids of ``weight (K, N)``. ``importance (K,)``: how much an error of each input counts for clips.

    A last group may be shorter than the others.
    """
    scales, zeros = [], []
    whole = len(weight) // group_size * group_size
    for part, start in ((weight[:whole], 0), (weight[whole:], whole)):
        if len(part):
            size = min(group_size, len(part))
            grouped = part.reshape(len(part) // size, size, weight.shape[1])
            weights = importance[start : start + len(part)].view(-1, size, 1) if importance is not None else None
            scale, zero = _fit(grouped, settings, weights)
            scales.append(scale)
            zeros.append(zero)
    return Grids(torch.cat(scales), torch.cat(zeros), settings.bits, group_size)


def _fit(
    grouped: torch.Tensor, settings: GridSettings, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``grouped (G, g, N)`` -> scales and zeros ``(G, N)``."""
    least, greatest = grouped.amin(dim=1).clamp_(max=0), grouped.amax(dim=1).clamp_(min=0)
    if settings.symmetric:
        greatest = torch.maximum(greatest, -least)
        least = -greatest
    best = _grid(least, greatest, settings)
    if not settings.clip:
        return best
    least_error = _error(grouped, *best, settings.bits, importance)
    for share in CLIP_SHARES[1:]:
        scale, zero = _grid(least * share, greatest * share, settings)
        error = _error(grouped, scale, zero, settings.bits, importance)
        better = error < least_error
        least_error = torch.where(better, error, least_error)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
    return best


def _grid(least: torch.Tensor, greatest: torch.Tensor, settings: GridSettings) -> tuple[torch.Tensor, torch.Tensor]:
    most = (1 << settings.bits) - 1
    scale = ((greatest - least) / most).clamp_(min=LEAST_SCALE).to(torch.float16).to(torch.float32)
    if settings.symmetric:
        return scale, torch.full_like(scale, 1 << (settings.bits - 1))
    return scale, (-least / scale).round_().clamp_(settings.least_zero, most)


def _error(
    grouped: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, importance: torch.Tensor | None
) -> torch.Tensor:
    """``sum |w - w^|^2.4`` of each group and row, or with ``importance`` the weighted sum of squares."""
    scale, zero = scale[:, None], zero[:, None]
    off = (grouped / scale).add_(zero).round_().clamp_(0, (1 << bits) - 1).sub_(zero).mul_(scale).sub_(grouped)
    if importance is None:
        return off.abs_().pow_(CLIP_NORM).sum(dim=1)
    return off.square_().mul_(importance).sum(dim=1)


class GridRounding:
    """Nearest point of the grid, one column of all rows at a time; columns come in the order ``order``."""

    block = 1

    def __init__(self, grids: Grids, order: torch.Tensor) -> None:
        groups = order // grids.group_size
        self._scales, self._zeros = grids.scales[groups], grids.zeros[groups]
        self._inverse = 1 / self._scales
        self._most = grids.most

    def __call__(self, targets: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        zero = self._zeros[start]
        codes = torch.addcmul(zero, targets, self._inverse[start]).round_().clamp_(0, self._most)
        return (codes - zero) * self._scales[start], codes.to(torch.uint8)
