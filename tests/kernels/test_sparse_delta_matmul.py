"""The sparse product: the kernel and its twin against a dense matrix in double, forward and backward, at odd shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.group_mask.reference import keep_factors, keep_positions, kept_per_row
from kernels.packing import pack_code_rows
from kernels.registry import OPS, load
from kernels.sparse_delta_matmul.reference import SparseDelta, dense_delta
from tests.kernels.device import DEVICE

OP = OPS["sparse_delta_matmul"]
PATHS = (OP.reference, OP.kernel)


def random_delta(
    outputs: int, inputs: int, group_size: int, ratio: int, bits: int, zero: int | None = None
) -> tuple[SparseDelta, torch.Tensor]:
    """A delta of random codes, and D_hat in double made from it by hand."""
    generator = torch.Generator().manual_seed(inputs)
    codes = torch.randint(0, 1 << bits, (outputs, kept_per_row(inputs, group_size, ratio)), generator=generator)
    zero = (1 << bits) // 2 if zero is None else zero
    words = pack_code_rows(codes, bits).to(DEVICE)
    delta = SparseDelta(words, bits, 0.03125, zero, 77, 5, inputs, group_size, ratio)
    expected = torch.zeros((outputs, inputs), dtype=torch.float64)
    columns = keep_positions(77, 5, range(outputs), inputs, group_size, ratio)
    factors = keep_factors(inputs, group_size, ratio)
    for row in range(outputs):
        for rank, column in enumerate(columns[row]):
            expected[row, int(column)] = 0.03125 * (int(codes[row, rank]) - zero) * float(factors[rank])
    return delta, expected.to(DEVICE)


@pytest.mark.parametrize(("shape", "fused"), [(OP.shapes[1], False), *((shape, True) for shape in OP.shapes)])
def test_it_agrees_with_a_dense_product_forward_and_backward(shape: tuple[int, ...], fused: bool) -> None:
    rows, outputs, inputs, group_size, ratio, bits = shape
    delta, dense = random_delta(outputs, inputs, group_size, ratio, bits)
    generator = torch.Generator().manual_seed(1)
    base = 0.1 * torch.randn((outputs, inputs), generator=generator).to(DEVICE) if fused else None
    x = torch.randn((rows, inputs), generator=generator).to(DEVICE)
    dy = torch.randn((rows, outputs), generator=generator).to(DEVICE)
    weight = dense if base is None else dense + base.double()
    relative, absolute = OP.tolerances["float32"]
    for path in PATHS:
        own = x.clone().requires_grad_()
        y = load(path)(own, delta, base)
        y.backward(dy)
        assert own.grad is not None
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=relative, atol=absolute * 10)
        torch.testing.assert_close(own.grad.double(), dy.double() @ weight, rtol=relative, atol=absolute * 10)


@pytest.mark.parametrize("dtype", [name for name in OP.tolerances if name != "float32"])
@pytest.mark.parametrize("group_size", [16, 130])
def test_half_input_gives_half_output_with_sums_in_fp32(dtype: str, group_size: int) -> None:
    delta, dense = random_delta(7, 140, group_size, 4, 5)
    x = torch.randn((3, 140), generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype)).to(DEVICE)
    base = torch.randn((7, 140), generator=torch.Generator().manual_seed(2)).to(x)
    relative, absolute = OP.tolerances[dtype]
    for path in PATHS:
        y = load(path)(x, delta, base)
        assert y.dtype == x.dtype
        expected = x.double() @ (dense + base.double()).T
        torch.testing.assert_close(y.double(), expected, rtol=relative, atol=absolute * 10)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_width_of_code_is_read(bits: int) -> None:
    delta, dense = random_delta(5, 40, 16, 2, bits)
    torch.testing.assert_close(dense_delta(delta, torch.float64), dense)
    y = load(OP.kernel)(torch.eye(40, device=DEVICE), delta)
    torch.testing.assert_close(y.T.double(), dense, rtol=1e-6, atol=1e-7)


def test_a_zero_point_far_outside_the_codes_does_not_overflow_half_precision() -> None:
    delta, dense = random_delta(4, 40, 8, 4, 4, zero=-200_000)
    delta, dense = replace(delta, scale=2.0**-20), dense * 2.0**-15
    x = torch.ones((2, 40), dtype=torch.float16, device=DEVICE)
    for path in PATHS:
        torch.testing.assert_close(load(path)(x, delta).double(), x.double() @ dense.T, rtol=2e-3, atol=0.0)


def test_the_kernel_reads_strided_input_and_takes_no_rows() -> None:
    delta, dense = random_delta(5, 48, 16, 8, 4)
    x = torch.randn((6, 96), generator=torch.Generator().manual_seed(1)).to(DEVICE)[::2, ::2]
    y = load(OP.kernel)(x, delta)
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)
    assert load(OP.kernel)(x[:0], delta).shape == (0, 5)


def test_operands_that_do_not_fit_are_refused() -> None:
    delta, _ = random_delta(5, 48, 16, 8, 4)
    for path in PATHS:
        with pytest.raises(ValueError, match="does not fit a delta of 48 inputs"):
            load(path)(torch.zeros((1, 47), device=DEVICE), delta)
        with pytest.raises(ValueError, match="a base of shape"):
            load(path)(torch.zeros((1, 48), device=DEVICE), delta, torch.zeros((48, 5), device=DEVICE))
        with pytest.raises(ValueError, match="the base is frozen"):
            load(path)(
                torch.zeros((1, 48), device=DEVICE), delta, torch.zeros((5, 48), device=DEVICE, requires_grad=True)
            )
    with pytest.raises(ValueError, match="float64 is not computed"):
        load(OP.kernel)(torch.zeros((1, 48), dtype=torch.float64, device=DEVICE), delta)
    with pytest.raises(ValueError, match="a row of this delta is 2 words"):
        replace(delta, bits=8)
    with pytest.raises(ValueError, match="codes of 9 bits"):
        replace(delta, bits=9)
