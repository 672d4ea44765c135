"""The seeded mask in Triton: keys by Philox in registers, the smallest of each group by a binary search over key bits.

Each program makes a tile of ``BLOCK_ROWS`` rows and ``GROUPS`` whole groups, padded to a power of two ``SPAN``. The
keep-th smallest key of a group is found bit by bit from the top (32 steps, each a count over the group), which costs
``32 * h`` and no sort; ties go to the lower index. The rule is that of the reference, bit for bit; the functions
:func:`tile_keys` and :func:`smallest` serve the sparse product as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.group_mask.reference import check_mask

LARGEST_GROUP = 1 << 17
"""Elements of a group: a tile of Triton ends at 2^20, and registers far before."""


@triton.jit
def tile_keys(seed, tensor, rows, group, block, SPAN: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys uint32 ``(len(rows), BLOCK_K)`` of groups ``group ..``: ``SPAN`` of each from its block ``block`` on."""
    place = tl.arange(0, BLOCK_K // 4)
    blocks = (block + place % (SPAN // 4)).to(tl.uint32)
    groups = (group + place // (SPAN // 4)).to(tl.uint32)
    c0, c1, c2, c3 = tl.philox(
        seed, blocks[None, :], groups[None, :], rows.to(tl.uint32)[:, None], tl.cast(tensor, tl.uint32)
    )
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def keep_limit(keys, kept):  # type: ignore[no-untyped-def]
    """keys uint32 ``(R, SPAN)``, kept int32 ``(R,)`` -> the kept-th smallest key of each row, how many lie below."""
    limit = (kept * 0).to(tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = limit | bit
        below = tl.sum((keys < candidate[:, None]).to(tl.int32), axis=1)
        limit = tl.where(below < kept, candidate, limit)
        bit = bit >> 1
    return limit, tl.sum((keys < limit[:, None]).to(tl.int32), axis=1)


@triton.jit
def smallest(keys, kept):  # type: ignore[no-untyped-def]
    """True at the ``kept`` smallest of each row of ``keys (R, SPAN)``, ties by the lower index."""
    limit, below = keep_limit(keys, kept)
    tied = keys == limit[:, None]
    rank = tl.cumsum(tied.to(tl.int32), axis=1)
    return (keys < limit[:, None]) | (tied & (rank <= (kept - below)[:, None]))


@triton.jit(do_not_specialize=["seed", "tensor"])
def _group_mask_kernel(  # type: ignore[no-untyped-def]
    mask_ptr, seed, tensor, row_count, inputs, group_size, ratio,
    SPAN: tl.constexpr, GROUPS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * GROUPS
    keys = tile_keys(seed, tensor, rows, first, 0, SPAN, GROUPS * SPAN).reshape(BLOCK_ROWS * GROUPS, SPAN)
    line = tl.arange(0, BLOCK_ROWS * GROUPS)
    inner = tl.arange(0, SPAN)
    row, group = tl.program_id(0) * BLOCK_ROWS + line // GROUPS, first + line % GROUPS
    size = tl.minimum(group_size, inputs - group * group_size)
    # Past the group's end lie the largest key and higher indices: never kept before an element of the group.
    keys = tl.where(inner[None, :] < size[:, None], keys, 0xFFFFFFFF)
    kept = smallest(keys, tl.cdiv(tl.maximum(size, 0), ratio))
    index = row.to(tl.int64) * inputs + group * group_size
    tl.store(
        mask_ptr + index[:, None] + inner[None, :],
        kept.to(tl.int8),
        mask=(row[:, None] < row_count) & (inner[None, :] < size[:, None]),
    )


def span_of(group_size: int) -> int:
    """The power of two, 4 at least, that holds a group."""
    if group_size > LARGEST_GROUP:
        raise ValueError(f"a group of {group_size} elements is too large for the kernel: {LARGEST_GROUP} at most")
    return max(4, triton.next_power_of_2(group_size))


def group_mask(
    seed: int, tensor: int, rows: int, inputs: int, group_size: int, ratio: int, device: str = "cpu"
) -> torch.Tensor:
    """The mask of rows 0 .. ``rows`` - 1 as bool ``(rows, inputs)`` on ``device``: True where the element survives."""
    check_mask(seed, tensor, range(rows), inputs, group_size, ratio)
    group_size = min(group_size, inputs)
    span, count = span_of(group_size), -(-inputs // group_size)
    groups = max(1, min(triton.next_power_of_2(count), 1024 // span))
    block_rows = max(1, 2048 // (groups * span))
    mask = torch.empty((rows, inputs), dtype=torch.int8, device=device)
    if rows:
        _group_mask_kernel[(triton.cdiv(rows, block_rows), triton.cdiv(count, groups))](
            mask, seed, tensor, rows, inputs, group_size, ratio,
            SPAN=span, GROUPS=groups, BLOCK_ROWS=block_rows, num_warps=4 if span <= 4096 else 8,
        )  # fmt: skip
    return mask.view(torch.bool)
