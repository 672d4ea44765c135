"""Rounding to E8P: exact against all 65,536 points, the lowest code of equals, and the errors on a Gaussian source."""

from __future__ import annotations

import pytest
import torch

from compression_worker.methods.quip_sharp.codebook import (
    RESIDUAL_SCALE,
    RHO,
    E8PRounder,
    code_words,
    planes,
    second_nearest,
)
from compression_worker.methods.quip_sharp.exhaustive import exhaustive
from compression_worker.methods.quip_sharp.nearest import nearest
from kernels.e8p_matmul.codebook import decode, decode_second_stage, second_stage


def gaussian(count: int, *, seed: int = 0, width: float = 1.0) -> torch.Tensor:
    return torch.randn((count, 8), generator=torch.Generator().manual_seed(seed)) * width


def all_points(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every point ``(8, 65536)``, and minus half its squared norm."""
    points = decode(torch.arange(1 << 16)).to(dtype).T.contiguous()
    return points, -points.square().sum(0) / 2


def first_of_all(x: torch.Tensor) -> torch.Tensor:
    """The lowest code word of the nearest points, in double, over all of them."""
    points, offset = all_points(torch.float64)
    return torch.cat([torch.addmm(offset, part, points).argmax(1) for part in x.double().split(64)])


@pytest.mark.parametrize(
    ("x", "code", "squared"),
    [
        ([0.31, -0.72, 1.23, -1.94, 0.15, 0.46, -0.27, 2.28], 0x22B9, 1.2864),
        ([-1.5, 0.9, 0.4, -0.3, 2.1, -0.8, 0.05, 0.65], 0x9F69, 0.735),
        ([-2.6, 1.4, -0.6, 0.9, -0.4, 0.7, -1.1, 0.2], 0xDD0F, 0.94),
        ([0.0] * 8, 0x0001, 0.5),
    ],
)
def test_a_known_vector_has_its_known_nearest_point(x: list[float], code: int, squared: float) -> None:
    vector = torch.tensor([x])
    codes, points = nearest(vector)
    assert codes.tolist() == exhaustive(vector).tolist() == [code]
    assert (vector - points).square().sum().item() == pytest.approx(squared, abs=1e-5)


def test_no_point_is_nearer_to_any_of_100000_random_vectors() -> None:
    x = torch.cat([gaussian(50_000), gaussian(40_000, seed=1, width=0.9), gaussian(10_000, seed=2, width=2.5)])
    codes, found = nearest(x)
    assert torch.equal(found, decode(codes))
    points, offset = all_points(torch.float32)
    scores = torch.empty(32, 1 << 16)
    for part, point in zip(x.split(32), found.split(32), strict=True):
        best = torch.addmm(offset, part, points, out=scores[: len(part)]).amax(1)
        own = (part * point).sum(1) - point.square().sum(1) / 2
        torch.testing.assert_close(own, best, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("width", [0.9, 1.03, 1.5, 30.0])
def test_the_code_word_is_the_one_of_a_search_over_all(width: float) -> None:
    x = gaussian(1_500, seed=3, width=width)
    expected = first_of_all(x)
    assert torch.equal(nearest(x)[0].long(), expected)
    assert torch.equal(exhaustive(x[:500]).long(), expected[:500])


@pytest.mark.parametrize("grid", [2, 4, 8])
def test_of_equally_near_points_the_lowest_code_wins(grid: int) -> None:
    x = torch.randint(-3 * grid, 3 * grid + 1, (1000, 8), generator=torch.Generator().manual_seed(grid)) / grid
    x = torch.cat([x, torch.eye(8), torch.zeros(1, 8)])
    assert torch.equal(nearest(x)[0].long(), first_of_all(x))


def test_the_result_does_not_depend_on_what_else_is_rounded() -> None:
    x = gaussian(5_000, seed=4)
    codes, _ = nearest(x)
    assert torch.equal(nearest(x[1234:4321])[0], codes[1234:4321])
    assert torch.equal(nearest(x.T.contiguous().T)[0], codes)


def test_each_code_word_rounds_to_itself_and_is_found_from_its_point() -> None:
    codes = torch.arange(1 << 16)
    assert torch.equal(nearest(decode(codes))[0].long(), codes)
    assert torch.equal(code_words(decode(codes)).long(), codes)


def test_points_outside_the_codebook_have_no_code_word() -> None:
    outside = torch.tensor([[3.75] + [0.75] * 7, [1.75] * 6 + [0.75] * 2, [1.75] * 5 + [0.75, 0.75, -0.25]])
    assert code_words(outside).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("bits", "width", "joint", "expected"),
    [
        (2, 1.03, False, 0.09185),
        (2, 0.9, False, 0.0995),
        (3, RHO[3], False, 0.0296),
        (4, RHO[4], False, 0.00977),
        (4, RHO[4], True, 0.00887),
    ],
)
def test_a_gaussian_source_is_rounded_with_the_known_error(
    bits: int, width: float, joint: bool, expected: float
) -> None:
    x = gaussian(20_000 if joint else 100_000, seed=5)
    values, _ = E8PRounder(bits, joint=joint)(x * width)
    assert (values / width - x).square().mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_values_are_what_the_stored_planes_say(bits: int) -> None:
    targets = gaussian(600, seed=6).reshape(20, 30, 8)
    values, codes = E8PRounder(bits)(targets)
    stored = planes(codes, bits)
    assert codes.shape == (20, 30)
    assert [plane.dtype for plane in stored] == [torch.int16, *{3: [torch.uint8], 4: [torch.int16]}.get(bits, [])]
    expected = decode(stored[0])
    if bits > 2:
        expected = expected + (decode_second_stage if bits == 3 else decode)(stored[1]) / RESIDUAL_SCALE[bits]
    assert torch.equal(values, expected)


def test_the_second_stage_of_3_bits_is_the_nearest_of_its_256_points() -> None:
    x = gaussian(3_000, seed=7)
    codes, points = second_nearest(x, 3)
    distances = torch.cdist(x.double(), second_stage().double())
    assert torch.equal(codes.long(), distances.argmin(1))
    assert torch.equal(points, second_stage()[codes.long()])


def test_nothing_to_round_gives_nothing() -> None:
    for bits in RHO:
        values, codes = E8PRounder(bits)(torch.empty(0, 8))
        assert values.shape == (0, 8)
        assert codes.shape == (0,)


def test_what_cannot_be_rounded_is_refused() -> None:
    x = gaussian(5)
    for bad in (torch.inf, torch.nan, -torch.inf):
        x[3, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            E8PRounder(2)(x)
    with pytest.raises(ValueError, match="not 5"):
        E8PRounder(5)
    with pytest.raises(ValueError, match="joint search is for 4 bits"):
        E8PRounder(3, joint=True)
