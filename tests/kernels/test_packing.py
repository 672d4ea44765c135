"""Signs into words: the published vectors, odd shapes, and the one pass that packs a delta."""

from __future__ import annotations

import pytest
import torch

from kernels.packing import pack_bits, unpack_bits, unpack_signs, words_for
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
