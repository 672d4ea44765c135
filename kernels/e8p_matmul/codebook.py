"""The E8P codebook of 16-bit code words and the 256-point second stage: their tables, and the points of code words.

E8P (QuIP#, arXiv 2402.04396, section 4.2 and appendix C) is a subset C of E8 + 1/4 with 65,536 points. A point is a
pattern of absolute values (256 of them, half-odd), signs whose sum with it is even, and a shift of +-1/4. Code word
``c``: bits 15..8 are the pattern, bits 7..0 the sign byte ``s``. The parity p of s says the shift: -1/4 where p = 1,
else +1/4; the sign mask is s with bit 0 turned over where p = 1, and a set bit negates the stored coordinate. Stored
patterns have coordinate 7 negative where the sum of the pattern is odd, so that any even mask keeps the sum even.
Coordinate i is bit ``PLACES[i]`` of the mask and nibble ``PLACES[i]`` of the pattern's packed entry (32 bits; a nibble
is ``2 v + 8``): 1 KiB in all.

The second stage of 3 bits has 256 points of E8: 241 of squared norm up to 2 and 15 of the 16 points +-2 e_i (-2 e_7 is
left out), ordered by squared norm, then lexicographically. Its packed entries have the same form.

Tables are built with numpy, whose small operations start no threads, and are kept for the life of the process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The bit and nibble of each coordinate."""
NORM_12 = (
    "31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 33133311 33133131"
    " 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113 31331313 31331133 13333311 13333131"
    " 13331331 13333113 13331313 11331333 33113331"
)
"""The 29 patterns of squared norm 12 that belong to the codebook, in units of 1/2 and in the order of their codes."""


@cache
def patterns() -> torch.Tensor:
    """``(256, 8)`` float32: the absolute patterns by index, 227 of squared norm up to 10 in lexicographic order, then
    :data:`NORM_12`."""
    halves = _lexicographic(3).astype(np.float32) + 0.5
    last = np.array([[int(digit) for digit in word] for word in NORM_12.split()], dtype=np.float32) / 2
    return torch.from_numpy(np.concatenate([halves[np.square(halves).sum(1) <= 10], last]))


@cache
def stored_patterns() -> torch.Tensor:
    """``(256, 8)`` float32: :func:`patterns` with coordinate 7 negative where their sum is odd."""
    stored = patterns().numpy().copy()
    stored[stored.sum(1) % 2 == 1, 7] *= -1
    return torch.from_numpy(stored)


@cache
def second_stage() -> torch.Tensor:
    """``(256, 8)`` float32: the points of the 3-bit second stage by code."""
    whole = _lexicographic(3).astype(np.float32) - 1
    half = _lexicographic(2).astype(np.float32) - 0.5
    inner = np.concatenate([whole[np.square(whole).sum(1) <= 2], half])
    axes = np.concatenate([-2 * np.eye(8, dtype=np.float32)[:7], 2 * np.eye(8, dtype=np.float32)])
    points = np.concatenate([inner[inner.sum(1) % 2 == 0], axes]) + 0.0
    order = np.lexsort((*points.T[::-1], np.square(points).sum(1)))
    return torch.from_numpy(points[order])


@cache
def packed_patterns() -> torch.Tensor:
    """``(256,)`` int32: the packed entries of E8P by pattern index."""
    return _packed(stored_patterns())


@cache
def packed_signs() -> torch.Tensor:
    """``(256,)`` int32, by sign byte: what turns a packed entry into the nibbles ``2 v + 7.5`` of the point itself.

    XOR with 14 negates a nibble, all of which are odd, and XOR with 1 takes 1 from it, for the shift -1/4.
    """
    mask, parity = _signs()
    nibbles = (14 * mask ^ parity[:, None]) << 4 * np.array(PLACES)
    return torch.from_numpy(nibbles.sum(1).astype(np.uint32).view(np.int32))


@cache
def packed_second_stage() -> torch.Tensor:
    """``(256,)`` int32: the packed entries of the second stage by code."""
    return _packed(second_stage())


@cache
def quarters() -> torch.Tensor:
    """``(65536, 8)`` int8: four times each point of E8P, by code word."""
    mask, parity = _signs()
    four = (4 * stored_patterns().numpy()).astype(np.int8)
    signs, shift = (1 - 2 * mask).astype(np.int8), (1 - 2 * parity).astype(np.int8)
    return torch.from_numpy((four[:, None] * signs + shift[:, None]).reshape(-1, 8))


@cache
def second_quarters() -> torch.Tensor:
    """``(256, 8)`` int8: four times each point of the second stage, by code."""
    return (4 * second_stage()).to(torch.int8)


def quarters_of(codes: torch.Tensor) -> torch.Tensor:
    """Code words of any shape, in any integer dtype of which the low 16 bits count -> four times their points, int8
    ``(..., 8)``, on the device of the codes."""
    index = codes.view(torch.uint16).to(torch.int32) if codes.dtype == torch.int16 else codes.to(torch.int32) & 0xFFFF
    return _eights(quarters, codes.device).index_select(0, index.flatten()).view(torch.int8).reshape(*codes.shape, 8)


def second_quarters_of(codes: torch.Tensor) -> torch.Tensor:
    """The same for codes of the 3-bit second stage, of which the low 8 bits count."""
    index = codes.to(torch.int32) & 0xFF
    table = _eights(second_quarters, codes.device)
    return table.index_select(0, index.flatten()).view(torch.int8).reshape(*codes.shape, 8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Code words, as :func:`quarters_of` takes them -> points ``(..., 8)`` float32."""
    return quarters_of(codes).to(torch.float32).mul_(0.25)


def decode_second_stage(codes: torch.Tensor) -> torch.Tensor:
    """Codes of the 3-bit second stage -> points ``(..., 8)`` float32."""
    return second_quarters_of(codes).to(torch.float32).mul_(0.25)


@cache
def _eights(table: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """``table() (n, 8)`` int8 as ``(n,)`` int64 on a device: a point is gathered as one word."""
    return table().view(torch.int64).flatten().to(device)


def _lexicographic(levels: int) -> np.ndarray:
    """``(levels^8, 8)``: the digits of 0 .. levels^8 - 1 in that base, the most significant first."""
    return np.arange(levels**8)[:, None] // levels ** np.arange(7, -1, -1) % levels


def _signs() -> tuple[np.ndarray, np.ndarray]:
    """By sign byte, whether each coordinate is negated ``(256, 8)``, and the parity ``(256,)``."""
    sign_byte = np.arange(256)
    parity = np.bitwise_xor.reduce(sign_byte >> np.arange(8)[:, None] & 1)
    return (sign_byte ^ parity)[:, None] >> np.array(PLACES) & 1, parity


def _packed(points: torch.Tensor) -> torch.Tensor:
    nibbles = (2 * points.numpy() + 8).astype(np.int64) << 4 * np.array(PLACES)
    return torch.from_numpy(nibbles.sum(1).astype(np.uint32).view(np.int32))
