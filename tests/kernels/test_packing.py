"""Signs into words: the published vectors, odd shapes, and the one pass that packs a delta."""

from __future__ import annotations

import pytest
import torch

from kernels.packing import (
    code_words,
    pack_bits,
    pack_code_rows,
    pack_codes,
    unpack_bits,
    unpack_code_rows,
    unpack_codes,
    unpack_signs,
    words_for,
)
from kernels.sign_pack.reference import sign_pack, sign_pack_tiles

SHAPES = [(1, 1), (7, 33), (1, 32), (5, 63), (3, 65), (16, 128), (300, 1000)]


def word(negative: list[int]) -> int:
    """The word of a delta of 32 elements that is below zero at ``negative`` and zero elsewhere."""
    delta = torch.zeros(1, 32)
    delta[0, negative] = -1.0
    packed = sign_pack(torch.zeros(1, 32), delta).packed
    assert packed.shape == (1, 1)
    return int(packed[0, 0]) & 0xFFFFFFFF


def test_it_packs_the_published_vectors() -> None:
    assert word([0]) == 0xFFFFFFFE
    assert word([31]) == 0x7FFFFFFF
    assert word(list(range(1, 32, 2))) == 0x55555555


def test_a_delta_of_zero_counts_as_plus_one() -> None:
    assert word([]) == 0xFFFFFFFF


def test_minus_zero_counts_as_plus_one() -> None:
    packed = sign_pack(torch.zeros(1, 32), torch.full((1, 32), -0.0)).packed
    assert int(packed[0, 0]) == -1


def test_the_initial_scale_is_the_mean_of_the_absolute_delta() -> None:
    delta = torch.tensor([[0.3, -0.1, 0.0, 0.2]])
    signs = sign_pack(torch.zeros(1, 4), delta)
    assert signs.sum_abs / 4 == pytest.approx(0.15)
    assert signs.sum_squares == pytest.approx(0.14)
    assert unpack_bits(signs.packed, 4).int().tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_bits_come_back_and_the_tail_is_zero(outputs: int, inputs: int) -> None:
    bits = torch.rand((outputs, inputs), generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_bits(bits)
    assert packed.shape == (words_for(inputs), outputs)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_bits(packed, inputs), bits)
    assert not unpack_bits(packed, words_for(inputs) * 32)[:, inputs:].any()
    assert torch.equal(unpack_signs(packed, inputs), bits.float() * 2 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_one_pass_agrees_with_the_plain_way(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn((outputs, inputs), generator=generator).to(dtype)
    finetuned = (base + 0.01 * torch.randn((outputs, inputs), generator=generator)).to(dtype)
    delta = finetuned.double() - base.double()
    signs = sign_pack(base, finetuned)
    assert torch.equal(unpack_bits(signs.packed, inputs), ~(delta < 0))
    assert signs.sum_abs == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    assert signs.sum_squares == pytest.approx(float(delta.square().sum()), rel=1e-5)


def test_the_number_of_threads_changes_no_bit() -> None:
    base, finetuned = torch.randn(700, 520), torch.randn(700, 520)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = sign_pack(base, finetuned)
    torch.set_num_threads(2)
    two = sign_pack(base, finetuned)
    torch.set_num_threads(threads)
    assert torch.equal(one.packed, two.packed)
    assert (one.sum_abs, one.sum_squares) == (two.sum_abs, two.sum_squares)


def test_it_refuses_tiles_that_do_not_fill_the_matrix() -> None:
    with pytest.raises(ValueError, match="hold 2 rows, not 3"):
        sign_pack_tiles([(torch.zeros(2, 4), torch.zeros(2, 4))], outputs=3, inputs=4)


def test_it_refuses_words_of_another_width() -> None:
    with pytest.raises(ValueError, match="hold no matrix of 65 inputs"):
        unpack_bits(torch.zeros((2, 3), dtype=torch.int32), 65)


CODE_CASES = [(count, bits) for count in (0, 1, 7, 8, 9, 33, 1000) for bits in range(1, 9)]


def random_codes(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize(("count", "bits"), CODE_CASES)
def test_codes_come_back_from_a_stream_of_the_fewest_bytes(count: int, bits: int) -> None:
    codes = random_codes((count,), bits)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-count * bits // 8)
    assert torch.equal(unpack_codes(packed, count, bits), codes)


@pytest.mark.parametrize(("count", "bits"), CODE_CASES)
def test_each_row_of_codes_is_a_stream_of_words_of_its_own(count: int, bits: int) -> None:
    codes = random_codes((3, count), bits)
    words = pack_code_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, code_words(count, bits))
    assert torch.equal(unpack_code_rows(words, count, bits), codes)
    for row in range(3):
        assert torch.equal(words[row : row + 1], pack_code_rows(codes[row : row + 1], bits))


def test_a_stream_starts_at_the_least_significant_bit() -> None:
    assert pack_codes(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack_codes(torch.tensor([5, 6, 7]), 3).tolist() == [5 | 6 << 3 | (7 & 3) << 6, 7 >> 2]
    assert pack_code_rows(torch.tensor([[255, 0, 0, 128, 1]]), 8).tolist() == [[255 - (1 << 31), 1]]


def test_codes_of_no_rows_make_no_words() -> None:
    assert pack_code_rows(torch.zeros((0, 5), dtype=torch.uint8), 3).shape == (0, 1)
    assert unpack_code_rows(torch.zeros((0, 1), dtype=torch.int32), 5, 3).shape == (0, 5)


def test_it_refuses_codes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"codes of 4 bits lie in 0 .. 15; these lie in 0 .. 16"):
        pack_codes(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match=r"these lie in -1 .. 0"):
        pack_codes(torch.tensor([0, -1]), 4)
    with pytest.raises(ValueError, match="codes of 9 bits cannot be packed"):
        pack_codes(torch.tensor([0]), 9)
    with pytest.raises(ValueError, match="whole numbers"):
        pack_codes(torch.tensor([0.5]), 4)
    with pytest.raises(ValueError, match="no stream"):
        pack_codes(torch.zeros((2, 2), dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="no rows"):
        pack_code_rows(torch.zeros(2, dtype=torch.uint8), 4)


def test_it_refuses_a_stream_of_another_length() -> None:
    with pytest.raises(ValueError, match="5 codes of 3 bits is 2 bytes long"):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 5, 3)
    with pytest.raises(ValueError, match="5 codes of 8 bits is 2 words"):
        unpack_code_rows(torch.zeros((1, 3), dtype=torch.int32), 5, 8)
