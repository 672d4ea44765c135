"""One pass over a base matrix and its fine-tuned pair: the packed signs of the delta, ``sum |D|`` and ``sum D^2``.

``D = W_f - W_b`` in fp32; bit = 1 unless ``D < 0``, so a zero delta counts as +1. Both matrices arrive as tiles of rows
``(n, K)`` that stay in the cache: each is read once, compared, subtracted and packed. Sums run row by row in fp32 and
over rows in fp64, which gives the same bits whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from kernels.packing import pack_bits, words_for


@dataclass(frozen=True)
class SignPack:
    """``packed (ceil(K/32), N)`` int32, and the two sums over all elements of the delta."""

    packed: torch.Tensor
    sum_abs: float
    sum_squares: float


@dataclass(frozen=True)
class SignRows:
    """``packed (ceil(K/32), N)`` int32, and ``sum |D|`` and ``sum D^2`` of each row in fp64 ``(N,)``."""

    packed: torch.Tensor
    sum_abs: torch.Tensor
    sum_squares: torch.Tensor


def check_pair(base: torch.Tensor, finetuned: torch.Tensor) -> None:
    """Refuse two tensors that are no matrices of one shape."""
    if base.dim() != 2 or base.shape != finetuned.shape:
        raise ValueError(f"base {tuple(base.shape)} and variant {tuple(finetuned.shape)} are no matrices of one shape")


def sign_pack_rows(base: torch.Tensor, finetuned: torch.Tensor) -> SignRows:
    """base, finetuned ``(N, K)`` -> their :class:`SignRows`, the obvious way and with every temporary in memory."""
    check_pair(base, finetuned)
    delta = finetuned.to(torch.float32) - base.to(torch.float32)
    packed = pack_bits(finetuned.to(torch.float32) >= base.to(torch.float32))
    wide = delta.to(torch.float64)
    return SignRows(packed, wide.abs().sum(dim=1), wide.square().sum(dim=1))


def sign_pack_tiles(tiles: Iterable[tuple[torch.Tensor, torch.Tensor]], outputs: int, inputs: int) -> SignPack:
    """Pack the delta of consecutive row tiles ``(base, finetuned)`` of an ``(outputs, inputs)`` matrix."""
    packed = np.empty((words_for(inputs), outputs), dtype=np.int32)
    row, sum_abs, sum_squares = 0, 0.0, 0.0
    for base, finetuned in tiles:
        stop = row + base.shape[0]
        words, absolute, squares = _SCRATCH.pack(base, finetuned)
        packed[:, row:stop] = words.T
        row, sum_abs, sum_squares = stop, sum_abs + absolute, sum_squares + squares
    if row != outputs:
        raise ValueError(f"the tiles hold {row} rows, not {outputs}")
    return SignPack(torch.from_numpy(packed), sum_abs, sum_squares)


def sign_pack(base: torch.Tensor, finetuned: torch.Tensor) -> SignPack:
    """base, finetuned ``(N, K)`` of any float dtype -> their :class:`SignPack`."""
    outputs, inputs = base.shape
    rows = max(1, TILE_ELEMENTS // inputs)
    tiles = ((base[i : i + rows], finetuned[i : i + rows]) for i in range(0, outputs, rows))
    return sign_pack_tiles(tiles, outputs, inputs)


TILE_ELEMENTS = 1 << 17
"""Elements of a tile: two fp32 copies of it (1 MB) fit a core's second-level cache."""


class _Scratch(threading.local):
    """Buffers of one thread, used again for each tile and matrix: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._reserve(TILE_ELEMENTS)

    def _reserve(self, elements: int) -> None:
        self._delta, self._base = torch.empty(elements), torch.empty(elements)
        self._bits = torch.empty(elements, dtype=torch.bool)

    def pack(self, base: torch.Tensor, finetuned: torch.Tensor) -> tuple[np.ndarray, float, float]:
        """The words ``(rows, ceil(K/32))`` of a tile, its sum of ``|D|`` and of ``D^2``."""
        rows, inputs = base.shape
        if rows * inputs > self._delta.numel():
            self._reserve(rows * inputs)
        delta, other, bits = (
            flat[: rows * inputs].view(rows, inputs) for flat in (self._delta, self._base, self._bits)
        )
        delta.copy_(finetuned)
        other.copy_(base)
        # numpy compares ten times as fast as torch here, which makes its bools one by one.
        np.greater_equal(delta.numpy(), other.numpy(), out=bits.numpy())
        delta.sub_(other).abs_()
        sum_abs = float(delta.sum(dim=1).double().sum())
        sum_squares = float(torch.mul(delta, delta, out=other).sum(dim=1).double().sum())
        octets = np.packbits(bits.numpy(), axis=1, bitorder="little")
        if octets.shape[1] % 4:
            octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 4)))
        return octets.view("<i4"), sum_abs, sum_squares


_SCRATCH = _Scratch()
