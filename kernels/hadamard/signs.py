"""The random part of a transform: signs for a vector, phases for a Fourier plan. Every machine makes the same.

Both come from Philox4x32-10 with the seed as key (``kernels.group_mask.reference``): word i of stream ``tensor`` is
lane ``i % 4`` of counter ``(i // 4, purpose, 0, tensor)``. A sign is the word's highest bit, set for -1; a phase is the
word as a fraction of a whole turn.
"""

from __future__ import annotations

import numpy as np

from kernels.group_mask.philox import philox

_SIGNS, _PHASES = 0x51617, 0x50A5E


def random_signs(n: int, seed: int, tensor: int = 0) -> np.ndarray:
    """n signs +-1, float32. ``seed`` has 64 bits; ``tensor`` (32 bits) tells streams of one seed apart."""
    return np.where(_words(n, seed, tensor, _SIGNS) >> np.uint64(31), np.float32(-1), np.float32(1))


def phases(count: int, seed: int) -> np.ndarray:
    """``exp(i theta)`` of ``count`` angles, complex128."""
    turns = _words(count, seed, 0, _PHASES).astype(np.float64) / 2**32
    return np.exp(2j * np.pi * turns)


def _words(count: int, seed: int, tensor: int, purpose: int) -> np.ndarray:
    """The first ``count`` words of a stream, 32 bits in uint64."""
    if not 0 <= seed < 1 << 64 or not 0 <= tensor < 1 << 32:
        raise ValueError(f"seed {seed} and tensor {tensor} do not fit 64 and 32 bits")
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    first, second, third = (np.full_like(blocks, value) for value in (purpose, 0, tensor))
    lanes = philox((blocks, first, second, third), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(lanes, axis=1).reshape(-1)[:count]
