"""The product with a packed group grid: the layout's published vectors, and the product against a dense one in double."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kernels.dequant_matmul import kernel, reference
from kernels.dequant_matmul.layout import BITS, pack_gptq, pack_zeros, unpack_gptq, unpack_zeros
from kernels.dequant_matmul.operands import PackedWeight, packed_weight
from kernels.registry import OPS, load
from tests.kernels.device import DEVICE

OP = OPS["dequant_matmul"]
PATHS = (OP.reference, OP.kernel)

VECTORS = {
    2: "e4e4e4e4 e4e4e4e4",
    3: "88fac688 c688fac6 fac688fa",
    4: "76543210 fedcba98 76543210 fedcba98",
    8: "03020100 07060504 0b0a0908 0f0e0d0c 13121110 17161514 1b1a1918 1f1e1d1c",
}
"""Words of the codes ``i mod 2^b``, i = 0 .. 31, low word first."""


@dataclass(frozen=True)
class Case:
    """Random codes and grids, and W_hat in double made from them by hand."""

    weight: PackedWeight
    dense: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        one = self.weight
        return one.qweight, one.qzeros, one.scales, one.g_idx, one.bits


def random_case(outputs: int, inputs: int, group_size: int, bits: int, *, shuffled: bool = False) -> Case:
    generator = torch.Generator().manual_seed(1000 * outputs + inputs + bits)
    groups = -(-inputs // group_size)
    codes = torch.randint(0, 1 << bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 1 << bits, (groups, outputs), generator=generator)
    scales = (0.5 + torch.rand((groups, outputs), generator=generator)).div(1 << bits).half()
    g_idx = (torch.arange(inputs) // group_size).to(torch.int32)
    if shuffled:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    dense = torch.stack(
        [scales[g].double() * (codes[k].double() - zeros[g].double()) for k, g in enumerate(g_idx.tolist())], dim=1
    )
    packed = pack_gptq(codes, bits), pack_zeros(zeros, bits), scales, g_idx
    return Case(packed_weight(*(tensor.to(DEVICE) for tensor in packed), bits), dense.to(DEVICE))


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_that_the_format_publishes(bits: int) -> None:
    codes = torch.arange(32) % (1 << bits)
    words = [int(word, 16) for word in VECTORS[bits].split()]
    column = pack_gptq(codes[:, None], bits)
    assert (column.dtype, column.shape) == (torch.int32, (bits, 1))
    assert [word & 0xFFFFFFFF for word in column[:, 0].tolist()] == words
    row = pack_zeros(codes[None], bits)
    assert [word & 0xFFFFFFFF for word in row[0].tolist()] == words
    assert row.is_contiguous()


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_zeros_come_back(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (96, 5), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack_gptq(pack_gptq(codes, bits), bits), codes.to(torch.uint8))
    assert torch.equal(unpack_zeros(pack_zeros(codes.T, bits), bits), codes.T.to(torch.uint8))
    # Blocks of 32 codes can be opened one by one.
    assert torch.equal(unpack_gptq(pack_gptq(codes, bits)[bits : 2 * bits], bits, torch.float32), codes[32:64].float())


def test_code_10_and_code_21_of_three_bits_straddle_words() -> None:
    for place in (10, 21):
        codes = torch.zeros((32, 1), dtype=torch.int64)
        codes[place] = 7
        packed = pack_gptq(codes, 3)
        assert int((packed != 0).sum()) == 2
        assert unpack_gptq(packed, 3)[:, 0].nonzero().tolist() == [[place]]


def test_what_the_layout_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"33 inputs cannot be packed: .* 32 at a time"):
        pack_gptq(torch.zeros((33, 2), dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="40 outputs cannot be packed"):
        pack_zeros(torch.zeros((2, 40), dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="codes of 5 bits"):
        pack_gptq(torch.zeros((32, 2), dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"lie in 0 \.\. 7; these lie in 0 \.\. 8"):
        pack_gptq(torch.tensor([[8], *[[0]] * 31]), 3)
    with pytest.raises(ValueError, match="whole numbers"):
        pack_gptq(torch.zeros((32, 2)), 4)
    with pytest.raises(ValueError, match="no matrix"):
        pack_gptq(torch.zeros(32, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="no blocks of 32 codes"):
        unpack_gptq(torch.zeros((4, 2), dtype=torch.int32), 3)


def test_operands_that_do_not_fit_are_refused() -> None:
    qweight, qzeros, scales, g_idx, bits = random_case(32, 64, 32, 4).tensors
    for change, message in (
        ((qweight[:-1], qzeros, scales, g_idx, bits), "qweight of 4 bits"),
        ((qweight, qzeros[:, :-1], scales, g_idx, bits), "qzeros of 4 bits"),
        ((qweight, qzeros, scales, g_idx, 3), "qweight of 3 bits"),
        ((qweight, qzeros, scales, g_idx, 5), "codes of 5 bits"),
        ((qweight, qzeros, scales, g_idx.long(), bits), "are not"),
        ((qweight, qzeros, scales, g_idx[:60], bits), "multiples of 32"),
        ((qweight, qzeros, scales, g_idx + 1, bits), r"names groups 1 \.\. 2"),
        ((qweight, qzeros, scales.float().requires_grad_(), g_idx, bits), "frozen"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_weight(*change)
    for path in PATHS:
        with pytest.raises(ValueError, match="does not fit a packed weight of 64 inputs"):
            load(path)(torch.zeros(2, 32, device=DEVICE), packed_weight(qweight, qzeros, scales, g_idx, bits))
    with pytest.raises(ValueError, match="float64 is not computed"):
        kernel.dequant_matmul(torch.zeros(2, 64, dtype=torch.float64), random_case(32, 64, 32, 4).weight)


def test_groups_in_order_are_told_from_others() -> None:
    assert random_case(32, 96, 32, 4).weight.group_size == 32
    assert random_case(32, 96, 64, 4).weight.group_size == 64
    assert random_case(32, 96, 96, 4).weight.group_size == 96
    assert random_case(32, 96, 40, 4).weight.group_size == 40
    assert random_case(32, 96, 32, 4, shuffled=True).weight.group_size is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "shuffled"), [(32, False), (40, False), (96, False), (32, True)])
def test_the_dense_matrix_is_that_of_the_formula(
    bits: int, group_size: int, shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(64, 96, group_size, bits, shuffled=shuffled)
    for tile in (reference.TILE, 1):
        monkeypatch.setattr(reference, "TILE", tile)
        assert torch.equal(reference.dequantize(*case.tensors), case.dense.float())
    assert torch.equal(reference.dequantize(*case.tensors, rows=slice(7, 43)), case.dense[7:43].float())
    assert torch.equal(reference.dequantize(*case.tensors, dtype=torch.bfloat16), case.dense.float().bfloat16())


@pytest.mark.parametrize("tile", [reference.TILE, 1])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "shuffled"), [(32, False), (40, False), (128, False), (32, True)])
def test_the_twin_and_its_gradient_equal_the_dense_product(
    bits: int, group_size: int, shuffled: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "TILE", tile)
    case = random_case(64, 96, group_size, bits, shuffled=shuffled)
    x = torch.randn((2, 3, 96), generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    dy = torch.randn((2, 3, 64), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    y = reference.dequant_matmul(x, case.weight)
    y.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(y.double(), x.double() @ case.dense.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), dy.double() @ case.dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", OP.shapes)
def test_kernel_and_twin_agree_with_the_dense_product_forward_and_backward(shape: tuple[int, ...]) -> None:
    tokens, outputs, inputs, group_size, bits = shape
    check_against_dense(random_case(outputs, inputs, group_size, bits), tokens, "float32")


@pytest.mark.parametrize("bits", BITS)
def test_groups_in_any_order_are_gathered(bits: int) -> None:
    check_against_dense(random_case(32, 96, 32, bits, shuffled=True), 3, "float32")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [name for name in OP.tolerances if name != "float32"])
@pytest.mark.parametrize(("group_size", "shuffled"), [(32, False), (64, False), (128, False), (40, False), (32, True)])
def test_half_input_gives_half_output_with_sums_in_fp32(dtype: str, bits: int, group_size: int, shuffled: bool) -> None:
    check_against_dense(random_case(32, 160, group_size, bits, shuffled=shuffled), 3, dtype)


def check_against_dense(case: Case, tokens: int, dtype: str) -> None:
    """The product and the gradient of x, by both codes."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (
        torch.randn((tokens, width), generator=generator).to(getattr(torch, dtype)).to(DEVICE)
        for width in (case.weight.inputs, case.weight.outputs)
    )
    relative, absolute = OP.tolerances[dtype]
    for path in PATHS:
        own = x.clone().requires_grad_()
        y = load(path)(own, case.weight)
        y.backward(dy)
        assert own.grad is not None
        assert (y.dtype, own.grad.dtype) == (x.dtype, x.dtype)
        for found, expected in ((y, x.double() @ case.dense.T), (own.grad, dy.double() @ case.dense)):
            torch.testing.assert_close(found.double(), expected, rtol=relative, atol=10 * absolute)


@pytest.mark.parametrize("few", [16, 0])
def test_more_tokens_and_more_inputs_than_a_tile_hold_take_other_paths(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "SPAN", 128)
    monkeypatch.setattr(kernel, "FEW_TOKENS", few)
    case = random_case(32, 288, 64, 4)
    x = torch.randn((1, 2, 3, 288), generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    y = kernel.dequant_matmul(x, case.weight)
    assert y.shape == (1, 2, 3, 32)
    torch.testing.assert_close(y.double(), x.double() @ case.dense.T, rtol=2e-3, atol=2e-2)
    assert torch.equal(y, kernel.dequant_matmul(x, case.weight))


def test_a_common_part_of_x_does_not_drown_the_rest() -> None:
    # What zeros take is taken off afterwards: it must not be so much that fp32 keeps nothing of what is left.
    case = random_case(32, 64, 64, 2)
    x = torch.full((1, 64), 100.0, dtype=torch.float16, device=DEVICE)
    x[0, 1::2] += 0.125
    y = kernel.dequant_matmul(x, case.weight)
    torch.testing.assert_close(y.double(), x.double() @ case.dense.T, rtol=2e-3, atol=2e-2)


def test_the_twin_passes_gradcheck_in_double_twice() -> None:
    case = random_case(32, 32, 16, 3)
    x = torch.randn((1, 32), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def squared(x: torch.Tensor) -> torch.Tensor:
        return reference.dequant_matmul(x, case.weight) ** 2

    assert torch.autograd.gradcheck(squared, x.requires_grad_())
    assert torch.autograd.gradgradcheck(squared, x)


def test_a_layer_keeps_no_dense_weight_for_backward() -> None:
    case, kept = random_case(64, 96, 32, 2), []
    x = torch.randn(5, 96, device=DEVICE, requires_grad=True)
    for path in PATHS:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
            y = load(path)(x, case.weight)
        y.sum().backward()
    assert kept == []


def test_no_rows_one_row_and_strided_rows() -> None:
    case = random_case(32, 64, 32, 4)
    x = torch.randn((6, 128), generator=torch.Generator().manual_seed(1)).to(DEVICE)[::2, ::2]
    for path in PATHS:
        product = load(path)
        torch.testing.assert_close(product(x, case.weight).double(), x.double() @ case.dense.T, rtol=1e-5, atol=1e-5)
        assert product(x[:0], case.weight).shape == (0, 32)
        assert product(x[0], case.weight).shape == (32,)
