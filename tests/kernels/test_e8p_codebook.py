"""The E8P codebook: its points, its code words and its packed tables, against what the lattice says and known vectors."""

from __future__ import annotations

import pytest
import torch

from kernels.e8p_matmul.codebook import (
    PLACES,
    decode,
    decode_second_stage,
    packed_patterns,
    packed_second_stage,
    patterns,
    quarters,
    second_stage,
    stored_patterns,
)


def in_e8(points: torch.Tensor) -> torch.Tensor:
    """Whether the coordinates are all whole or all half-odd, with an even sum."""
    whole = (points % 1 == 0).all(-1)
    half = (points % 1 == 0.5).all(-1)
    return (whole | half) & (points.sum(-1) % 2 == 0)


def test_there_are_65536_points_of_e8_shifted_by_a_quarter() -> None:
    points = decode(torch.arange(1 << 16))
    assert len(points.unique(dim=0)) == 1 << 16
    assert in_e8(points - 0.25).all()
    norms = points.square().sum(1)
    assert norms.mean().item() == pytest.approx(9.5703, abs=1e-4)
    assert norms.max() == 16.5


def test_the_patterns_are_all_short_ones_and_29_of_squared_norm_12() -> None:
    norms = patterns().square().sum(1)
    assert norms.unique(return_counts=True)[1].tolist() == [1, 8, 28, 64, 126, 29]
    assert (norms[227:] == 12).all()
    assert len(patterns().unique(dim=0)) == 256
    short = patterns()[:227].tolist()
    assert short == sorted(short)
    assert (stored_patterns().sum(1) % 2 == 0).all()


@pytest.mark.parametrize(
    ("code", "point"),
    [
        (0x0000, [0.75] * 8),
        (0x0001, [0.25] * 8),
        (0x00FF, [-0.25] * 8),
        (0x0003, [-0.25, 0.75, -0.25, 0.75, 0.75, 0.75, 0.75, 0.75]),
        (0x0100, [0.75] * 7 + [-1.25]),
        (0x1234, [-0.75, -0.75, 0.25, -0.75, -1.75, 0.25, 0.25, 1.25]),
        (0xE300, [1.75, 0.75, 0.75, 0.75, 1.75, 1.75, 1.75, -1.25]),
    ],
)
def test_a_known_code_word_has_its_known_point(code: int, point: list[float]) -> None:
    assert decode(torch.tensor([code]))[0].tolist() == point
    assert (quarters()[code] / 4).tolist() == point


def test_code_words_are_read_from_any_integer_of_16_bits_or_more_and_any_shape() -> None:
    codes = torch.arange(0, 1 << 16, 8).reshape(4, -1, 16)[:, :100]
    assert torch.equal(decode(codes.to(torch.int16)), decode(codes))
    assert torch.equal(decode(codes.to(torch.uint16)), decode(codes))
    assert decode(codes | 5 << 16).shape == (*codes.shape, 8)
    assert torch.equal(decode(codes | 5 << 16), decode(codes))


def test_packed_entries_are_the_known_ones() -> None:
    known = {0: "99999999", 1: "59999999", 226: "799b999d", 227: "5b99bb9b", 255: "7b9bbb9b"}
    found = {index: f"{packed_patterns()[index].item() & 0xFFFFFFFF:08x}" for index in known}
    assert found == known


@pytest.mark.parametrize(
    ("packed", "points"), [(packed_patterns, stored_patterns), (packed_second_stage, second_stage)]
)
def test_packed_entries_hold_twice_the_coordinates_and_8_more(packed: object, points: object) -> None:
    assert callable(packed)
    assert callable(points)
    entries = packed().to(torch.int64) & 0xFFFFFFFF
    assert torch.equal((entries[:, None] >> 4 * torch.tensor(PLACES) & 15) / 2 - 4, points())


def test_the_second_stage_is_the_241_shortest_points_of_e8_and_15_on_the_axes() -> None:
    points = second_stage()
    assert len(points.unique(dim=0)) == 256
    assert in_e8(points).all()
    norms = points.square().sum(1)
    assert norms.unique(return_counts=True)[1].tolist() == [1, 240, 15]
    assert (norms.diff() >= 0).all()
    last = points[norms == 4]
    assert ((last != 0).sum(1) == 1).all()
    assert not (last == torch.tensor([0.0] * 7 + [-2])).all(1).any()
    assert torch.equal(decode_second_stage(torch.arange(256, dtype=torch.uint8)), points)
