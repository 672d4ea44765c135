"""The dial of one matrix: scales of every kind, stacked masks, a low-rank part; sizes, and gradients through them."""

from __future__ import annotations

import pytest
import torch

from compression_worker.methods.bitdelta.coding import Coding, decode, encode, expand, gather
from compression_worker.methods.bitdelta.matrices import CodedLinear
from kernels.packing import unpack_signs

CODINGS = [
    Coding(),
    Coding(masks=0),
    Coding(scale="row"),
    Coding(scale="column"),
    Coding(scale="group", group_size=16),
    Coding(scale="row", masks=3),
    Coding(scale="group", group_size=16, masks=2, rank=3),
    Coding(masks=0, rank=5),
]


def matrix(outputs: int = 24, inputs: int = 70) -> torch.Tensor:
    return torch.randn((outputs, inputs), generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, inputs)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_decoding_gives_the_error_that_was_counted_and_the_bytes_that_were_promised(coding: Coding) -> None:
    delta = matrix()
    coded = encode(delta, coding)
    found = decode(coded.packed, coded.scales, coded.left, coded.right, coding, 70)
    torch.testing.assert_close(float((found - delta).square().sum()), coded.error, rtol=1e-4, atol=1e-6)
    sizes = coding.sizes(24, 70)
    factors = coded.left.numel() * 2 + coded.right.numel() * 2
    assert sizes["codes"] == coded.packed.numel() * 4 + factors
    assert sizes["scales"] == coded.scales.numel() * (4 if coding.plain else 2)
    assert coded.error <= coded.energy * 1.0001


def test_the_published_form_is_the_mean_and_the_sign() -> None:
    delta = matrix()
    coded = encode(delta, Coding())
    torch.testing.assert_close(coded.scales[0, 0], delta.abs().mean())
    assert torch.equal(unpack_signs(coded.packed[0], 70), torch.where(delta < 0, -1.0, 1.0))


def test_two_masks_of_four_numbers_are_exact() -> None:
    delta = torch.tensor([[3.0, 1.0, -1.0, -3.0]])
    coded = encode(delta, Coding(masks=2))
    assert coded.scales.flatten().tolist() == [2.0, 1.0]
    assert coded.error == 0


def test_each_step_of_the_dial_lowers_the_error() -> None:
    delta = matrix()
    order = [
        Coding(masks=0), Coding(), Coding(scale="column"), Coding(scale="group", group_size=8),
        Coding(scale="group", group_size=8, masks=2), Coding(scale="group", group_size=8, masks=4),
    ]  # fmt: skip
    errors = [encode(delta, coding).error for coding in order]
    assert errors == sorted(errors, reverse=True)
    assert encode(delta, Coding(rank=8)).error < encode(delta, Coding()).error


def test_scales_on_activations_are_the_least_squares_there() -> None:
    generator = torch.Generator().manual_seed(5)
    delta = matrix()
    # Inputs that the delta is aligned with, as those of a fine-tune are.
    x = torch.randn((40, 24), generator=generator) @ delta + 0.5 * torch.randn((40, 70), generator=generator)

    def cost(error: torch.Tensor) -> float:
        return float((x @ error.T).square().sum())

    for coding in (Coding(), Coding(scale="row"), Coding(scale="group", group_size=16), Coding(scale="row", masks=2)):
        fitted, plain = encode(delta, coding, x, cost), encode(delta, coding, None, cost)
        assert fitted.loss < 0.8 * plain.loss
        for factor in (0.97, 1.0, 1.03):
            found = decode(fitted.packed, fitted.scales * factor, fitted.left, fitted.right, coding, 70)
            assert cost(delta - found) >= fitted.loss * 0.998


def test_an_exactly_low_rank_delta_is_found() -> None:
    generator = torch.Generator().manual_seed(2)
    delta = torch.randn((30, 4), generator=generator) @ torch.randn((4, 50), generator=generator)
    coded = encode(delta, Coding(masks=0, rank=4))
    assert coded.error / coded.energy < 1e-4


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.label)
def test_gather_is_the_adjoint_of_expand(coding: Coding) -> None:
    generator = torch.Generator().manual_seed(7)
    scale = torch.randn(coding.values(24, 70), generator=generator, dtype=torch.float64)
    values = torch.randn((24, 70), generator=generator, dtype=torch.float64)
    left = (expand(scale, coding, 24, 70) * values).sum()
    torch.testing.assert_close(left, scale @ gather(values, coding))


@pytest.mark.parametrize("coding", [one for one in CODINGS if one.masks], ids=lambda coding: coding.label)
def test_gradients_of_every_kind_of_scale_agree_with_a_dense_product_in_double(coding: Coding) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((2, 5, 70), generator=generator, dtype=torch.float64, requires_grad=True)
    base = torch.randn((24, 70), generator=generator, dtype=torch.float64)
    signs = torch.where(torch.rand((coding.masks, 24, 70), generator=generator) < 0.5, -1, 1).to(torch.int8)
    count = coding.masks * coding.values(24, 70)
    scales = torch.rand(count, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn((2, 5, 24), generator=generator, dtype=torch.float64)
    delta = sum(
        (
            expand(scale, coding, 24, 70) * mask
            for scale, mask in zip(scales.view(coding.masks, -1), signs, strict=True)
        ),
        torch.zeros_like(base),
    )
    dense = x @ (base + delta).T
    expected = torch.autograd.grad(dense, (x, scales), upstream)
    y = CodedLinear.apply(x, base, signs, scales, coding)
    torch.testing.assert_close(y, dense, rtol=1e-10, atol=1e-10)
    for got, wanted in zip(torch.autograd.grad(y, (x, scales), upstream), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_labels_are_words_for_people() -> None:
    labels = [coding.label for coding in CODINGS]
    assert labels == [
        "tensor", "dropped", "row", "column", "group 16", "3 masks, row", "2 masks, group 16, rank 3", "rank 5",
    ]  # fmt: skip
