"""The seeded mask: published words of the generator, the vectors of the rule, exact counts, an expectation that stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.group_mask import kernel
from kernels.group_mask.philox import grid_words, philox
from kernels.group_mask.reference import _smallest, group_mask, keep_factors, keep_positions, kept_per_row
from kernels.registry import OPS
from tests.kernels.device import DEVICE

SHAPES = [(3, 32, 16, 8), (5, 33, 16, 8), (2, 7, 16, 4), (4, 45, 10, 5), (3, 64, 1, 1), (1, 1, 4, 4), (6, 100, 100, 32)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_generator_gives_the_published_words(counter: list[int], key: tuple[int, int], expected: str) -> None:
    c0, c1, c2, c3 = (np.array([word], dtype=np.uint64) for word in counter)
    assert " ".join(f"{int(word[0]):08x}" for word in philox((c0, c1, c2, c3), key)) == expected


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (1, 5, 3), (4, 2, 17)])
@pytest.mark.parametrize("key", [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x9ABCDEF0, 0x12345678)])
def test_the_words_of_a_grid_are_those_of_its_counters(shape: tuple[int, int, int], key: tuple[int, int]) -> None:
    rows, groups, blocks = (np.arange(2**32 - 7, 2**32 - 7 + count, dtype=np.uint64) & 0xFFFFFFFF for count in shape)
    found = grid_words(blocks, groups, rows, 0xFFFFFFFE, key)
    assert (found.dtype, found.shape) == (np.uint32, (*shape[:2], 4 * shape[2]))
    counter = (*np.broadcast_arrays(blocks, groups[:, None], rows[:, None, None]), np.array(2**32 - 2, dtype=np.uint64))
    words = philox(counter, key)
    for lane, word in enumerate(words):
        assert (found[..., lane::4] == word).all()


def test_the_rule_gives_its_vectors() -> None:
    assert keep_positions(0, 0, range(2), 32, 16, 8).tolist() == [[7, 8, 16 + 3, 16 + 14], [2, 12, 16 + 6, 16 + 7]]
    row = keep_positions(0x123456789ABCDEF0, 3, range(5, 6), 8 * 32, 32, 8)[0]
    assert (row[7 * 4 : 8 * 4] - 7 * 32).tolist() == [10, 14, 16, 26]


@pytest.mark.parametrize(("rows", "inputs", "group_size", "ratio"), SHAPES)
def test_each_group_keeps_its_exact_count(rows: int, inputs: int, group_size: int, ratio: int) -> None:
    positions = keep_positions(9, 1, range(rows), inputs, group_size, ratio)
    assert positions.dtype == np.int64
    assert positions.shape == (rows, kept_per_row(inputs, group_size, ratio))
    assert (np.diff(positions, axis=1) > 0).all()
    mask = group_mask(9, 1, rows, inputs, group_size, ratio)
    assert mask.sum() == positions.size
    for start in range(0, inputs, group_size):
        group = mask[:, start : start + group_size]
        assert (group.sum(dim=1) == -(-group.shape[1] // ratio)).all()


@pytest.mark.parametrize(("rows", "inputs", "group_size", "ratio"), SHAPES)
def test_factors_give_each_group_its_weight_back(rows: int, inputs: int, group_size: int, ratio: int) -> None:
    factors = keep_factors(inputs, group_size, ratio)
    groups = keep_positions(9, 1, range(1), inputs, group_size, ratio)[0] // group_size
    assert factors.shape == groups.shape
    for group in range(-(-inputs // group_size)):
        size = min(group_size, inputs - group * group_size)
        assert factors[groups == group].sum() == pytest.approx(size)


def test_a_row_does_not_depend_on_the_rows_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keep_positions(4, 2, range(40), 50, 16, 4)
    assert (keep_positions(4, 2, range(13, 29, 3), 50, 16, 4) == whole[13:29:3]).all()
    monkeypatch.setattr("kernels.group_mask.reference.TILE_KEYS", 150)
    assert (keep_positions(4, 2, range(40), 50, 16, 4) == whole).all()


def test_seed_tensor_row_and_group_each_change_the_mask() -> None:
    mask = group_mask(1, 1, 2, 256, 128, 2)
    assert (mask != group_mask(2, 1, 2, 256, 128, 2)).any()
    assert (mask != group_mask(1 + (1 << 32), 1, 2, 256, 128, 2)).any()
    assert (mask != group_mask(1, 2, 2, 256, 128, 2)).any()
    assert (mask[0] != mask[1]).any()
    assert (mask[:, :128] != mask[:, 128:]).any()


def test_the_expectation_over_seeds_and_rows_is_the_matrix_itself() -> None:
    hits = sum(group_mask(seed, 0, 100, 10, 8, 4).double().sum(dim=0) for seed in range(100))
    factors = torch.tensor([4.0] * 8 + [2.0] * 2)
    # The mean of 10,000 draws of 0 or 4 has a standard deviation of 0.017, and of 0 or 2 one of 0.01.
    assert (hits / 10_000 * factors - 1).abs().max() < 0.08


def test_equal_keys_are_kept_from_the_left() -> None:
    keys = np.array([[5, 3, 3, 3, 9, 3], [1, 2, 3, 4, 5, 6], [7, 7, 7, 7, 7, 7]], dtype=np.uint32)
    assert _smallest(keys, 3).nonzero()[1].tolist() == [1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert _smallest(keys, 1).nonzero()[1].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1 << 64}, "seed 18446744073709551616 does not fit 64 bits"),
        ({"tensor": -1}, "tensor index -1"),
        ({"rows": range(-1, 1)}, "rows -1 .. 0"),
        ({"group_size": 0}, "group size 0"),
        ({"ratio": 0}, "ratio 0"),
    ],
)
def test_it_refuses_what_no_counter_can_hold(changed: dict[str, object], message: str) -> None:
    arguments = {"seed": 0, "tensor": 0, "rows": range(1), "inputs": 8, "group_size": 8, "ratio": 2} | changed
    with pytest.raises(ValueError, match=message):
        keep_positions(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "inputs", "group_size", "ratio"), OPS["group_mask"].shapes)
@pytest.mark.parametrize(("seed", "tensor"), [(0, 0), (1, 1), (0xFEDCBA9876543210, 0xFFFFFFFF)])
def test_the_kernel_makes_the_same_bits(
    rows: int, inputs: int, group_size: int, ratio: int, seed: int, tensor: int
) -> None:
    mask = kernel.group_mask(seed, tensor, rows, inputs, group_size, ratio, DEVICE)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), group_mask(seed, tensor, rows, inputs, group_size, ratio))


def test_the_kernel_keeps_equal_keys_from_the_left() -> None:
    keys = torch.tensor([[5, 3, 3, 3], [1, 2, 3, 4], [7, 7, 7, 7], [-1, -1, 0, 0]], dtype=torch.int32, device=DEVICE)
    kept = torch.tensor([2, 2, 3, 3], dtype=torch.int32, device=DEVICE)
    found = torch.empty((4, 4), dtype=torch.int8, device=DEVICE)
    _smallest_kernel[(1,)](keys, kept, found)
    assert found.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]


@triton.jit
def _smallest_kernel(keys_ptr, kept_ptr, found_ptr):  # type: ignore[no-untyped-def]
    line = tl.arange(0, 4)
    at = line[:, None] * 4 + line[None, :]
    keys = tl.load(keys_ptr + at).to(tl.uint32, bitcast=True)
    tl.store(found_ptr + at, kernel.smallest(keys, tl.load(kept_ptr + line)).to(tl.int8))


def test_no_rows_make_an_empty_mask() -> None:
    assert kernel.group_mask(0, 0, 0, 8, 8, 2, DEVICE).shape == (0, 8)


def test_the_kernel_refuses_a_group_that_no_tile_holds() -> None:
    with pytest.raises(ValueError, match="a group of 131073 elements is too large"):
        kernel.group_mask(0, 0, 1, 1 << 20, (1 << 17) + 1, 8, DEVICE)
