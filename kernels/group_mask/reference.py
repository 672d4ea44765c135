"""Which elements of a row survive group-wise dropout: exact counts, and a mask that any machine makes from its seed.

A row of K inputs is cut into groups of ``group_size`` (the last may be shorter). Each element has a 32-bit key, and a
group of ``size`` elements keeps the ``ceil(size / ratio)`` smallest, ties by the lower index, each worth
``size / kept`` times itself, so that the expectation of the sum stays. A group that is a multiple of ``ratio`` keeps
one element in ``ratio`` exactly.

Keys come from Philox4x32-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = low and
high word of the 64-bit seed; counter = (block, group, row, tensor), the tensor being its index in the artifact; block j
of a group yields the keys of its elements 4j .. 4j+3. Only whole numbers are in it, so every processor makes the same.
Group-wise dropout: DeltaDQ, arXiv 2410.08666; the exact count and this rule are our reading.
"""

from __future__ import annotations

import numpy as np
import torch

TILE_KEYS = 1 << 16
"""Keys made at a time: their 64-bit temporaries stay in a core's second-level cache."""
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def keep_positions(seed: int, tensor: int, rows: range, inputs: int, group_size: int, ratio: int) -> np.ndarray:
    """Columns that survive in each of ``rows``: int64 ``(len(rows), kept_per_row)``, ascending in a row.

    ``seed`` has 64 bits, ``tensor`` and the rows 32. A row's columns do not depend on which rows are asked for.
    """
    check_mask(seed, tensor, rows, inputs, group_size, ratio)
    kept = np.empty((len(rows), kept_per_row(inputs, group_size, ratio)), dtype=np.int64)
    whole, rest = divmod(inputs, group_size)
    step, split = max(1, TILE_KEYS // inputs), whole * -(-group_size // ratio)
    for start in range(0, len(rows), step):
        tile = np.asarray(rows[start : start + step], dtype=np.uint64)
        out = kept[start : start + len(tile)]
        if whole:
            out[:, :split] = _columns(seed, tensor, tile, np.arange(whole, dtype=np.uint64), group_size, ratio)
        if rest:
            last = _columns(seed, tensor, tile, np.array([whole], dtype=np.uint64), rest, ratio)
            out[:, split:] = last + whole * group_size
    return kept


def kept_per_row(inputs: int, group_size: int, ratio: int) -> int:
    """How many elements of a row survive."""
    whole, rest = divmod(inputs, group_size)
    return whole * -(-group_size // ratio) + -(-rest // ratio)


def keep_factors(inputs: int, group_size: int, ratio: int) -> np.ndarray:
    """What each kept element of a row is multiplied by, in scan order: fp32 ``(kept_per_row,)``, equal for all rows."""
    rest = inputs % group_size
    factors = np.full(kept_per_row(inputs, group_size, ratio), group_size / -(-group_size // ratio), dtype=np.float32)
    if rest:
        kept = -(-rest // ratio)
        factors[-kept:] = rest / kept
    return factors


def group_mask(
    seed: int, tensor: int, rows: int, inputs: int, group_size: int, ratio: int, device: str = "cpu"
) -> torch.Tensor:
    """The mask of rows 0 .. ``rows`` - 1 as bool ``(rows, inputs)``: True where the element survives."""
    mask = np.zeros((rows, inputs), dtype=np.bool_)
    np.put_along_axis(mask, keep_positions(seed, tensor, range(rows), inputs, group_size, ratio), True, axis=1)
    return torch.from_numpy(mask).to(device)


def philox(
    counter: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], key: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Philox4x32-10 of four uint64 arrays that hold 32-bit words and broadcast; so do the four it returns."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # Counters that depend on the row or the group alone stay small here until the third round mixes them.
        c0 = (second >> _HALF) ^ (c1 ^ np.uint64(k0))
        c2 = (first >> _HALF) ^ (c3 ^ np.uint64(k1))
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + _INCREMENTS[0]) & 0xFFFFFFFF, (k1 + _INCREMENTS[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def check_mask(seed: int, tensor: int, rows: range, inputs: int, group_size: int, ratio: int) -> None:
    """Refuse what no counter can hold."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} does not fit 64 bits")
    if not 0 <= tensor < 1 << 32:
        raise ValueError(f"tensor index {tensor} does not fit 32 bits")
    if rows and (min(rows[0], rows[-1]) < 0 or max(rows[0], rows[-1]) >= 1 << 32):
        raise ValueError(f"rows {rows[0]} .. {rows[-1]} do not fit 32 bits")
    if min(inputs, group_size, ratio) < 1:
        raise ValueError(f"inputs {inputs}, group size {group_size} and ratio {ratio} must be at least 1")


def _columns(seed: int, tensor: int, rows: np.ndarray, groups: np.ndarray, size: int, ratio: int) -> np.ndarray:
    """Columns kept in ``rows`` of ``groups`` of ``size``, counted from the first group: ``(rows, groups * kept)``."""
    keys = _keys(seed, tensor, rows, groups, size)
    kept = -(-size // ratio)
    mask = _smallest(keys, kept).reshape(len(rows), -1)
    columns = np.flatnonzero(mask).reshape(len(rows), -1)
    columns -= (np.arange(len(rows)) * mask.shape[1])[:, None]
    return columns


def _keys(seed: int, tensor: int, rows: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """The keys of each group, uint32 ``(rows * groups, size)``."""
    blocks = np.arange(-(-size // 4), dtype=np.uint64)
    counter = (blocks, groups[:, None], rows[:, None, None], np.array(tensor, dtype=np.uint64))
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    keys = np.empty((len(rows), len(groups), len(blocks), 4), dtype=np.uint32)
    for lane, word in enumerate(words):
        keys[..., lane] = word
    return np.ascontiguousarray(keys.reshape(len(rows) * len(groups), 4 * len(blocks))[:, :size])


def _smallest(keys: np.ndarray, kept: int) -> np.ndarray:
    """True at the ``kept`` smallest keys of each group, ties by the lower index."""
    limit = keys.min(axis=1) if kept == 1 else np.partition(keys, kept - 1, axis=1)[:, kept - 1]
    mask = keys <= limit[:, None]
    if np.count_nonzero(mask) != kept * len(keys):
        # Two equal keys at the limit: one group in 2^32 / size or so.
        tied = np.flatnonzero(mask.sum(axis=1) > kept)
        mask[tied] = False
        mask[tied[:, None], np.argsort(keys[tied], axis=1, kind="stable")[:, :kept]] = True
    return mask
