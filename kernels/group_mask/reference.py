"""Which elements of a row survive group-wise dropout: exact counts, and a mask that any machine makes from its seed.

A row of K inputs is cut into groups of ``group_size`` (the last may be shorter). Each element has a 32-bit key, and a
group of ``size`` elements keeps the ``ceil(size / ratio)`` smallest, ties by the lower index, each worth
``size / kept`` times itself, so that the expectation of the sum stays. A group that is a multiple of ``ratio`` keeps
one element in ``ratio`` exactly.

Keys come from Philox4x32-10 (:mod:`.philox`): key = low and high word of the 64-bit seed; counter = (block, group, row,
tensor), the tensor being its index in the artifact; block j of a group yields the keys of its elements 4j .. 4j+3.
Group-wise dropout: DeltaDQ, arXiv 2410.08666; the exact count and this rule are our reading.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.group_mask.philox import grid_words

TILE_KEYS = 1 << 16
"""Keys made at a time: their 64-bit words stay in a core's second-level cache, or nearly."""


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
    mask = _smallest(_keys(seed, tensor, rows, groups, size), -(-size // ratio))
    mask = np.ascontiguousarray(mask[:, :size]).reshape(len(rows), -1)
    columns = np.flatnonzero(mask).reshape(len(rows), -1)
    columns -= (np.arange(len(rows)) * mask.shape[1])[:, None]
    return columns


def _keys(seed: int, tensor: int, rows: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """The keys of each group, uint32 ``(rows * groups, size rounded up to 4)``; the largest there is past its end."""
    blocks = np.arange(-(-size // 4), dtype=np.uint64)
    keys = grid_words(blocks, groups, rows, tensor, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1, 4 * len(blocks))
    keys[:, size:] = 0xFFFFFFFF
    return keys


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
