"""The table of operations and the choice between twin and kernel; and the binary product's short call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kernels
from kernels.packing import pack_bits, unpack_signs
from kernels.registry import OPS, choose, load
from tests.kernels.device import DEVICE

OP = OPS["binary_matmul"]
CASES = [(shape, dtype) for shape in OP.shapes for dtype in OP.tolerances]


def operands(shape: tuple[int, ...], dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, packed signs, scale."""
    rows, outputs, inputs = shape
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((rows, inputs), generator=generator).to(getattr(torch, dtype))
    packed = pack_bits(torch.rand((outputs, inputs), generator=generator) < 0.5)
    return x.to(DEVICE), packed.to(DEVICE), torch.tensor(0.125, device=DEVICE)


@pytest.mark.parametrize("name", OPS)
def test_each_operation_names_a_twin_a_kernel_and_odd_shapes(name: str) -> None:
    op = OPS[name]
    assert load(op.reference) is not load(op.kernel)
    assert any(size % 2 for shape in op.shapes for size in shape)
    assert (Path(__file__).parent / f"test_{name}.py").exists()


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_one_delta_alone_agrees_with_a_dense_product_in_double(shape: tuple[int, ...], dtype: str) -> None:
    x, packed, scale = operands(shape, dtype)
    expected = 0.125 * x.double() @ unpack_signs(packed, shape[-1], torch.float64).T
    relative, absolute = OP.tolerances[dtype]
    for path in (OP.reference, OP.kernel):
        y = load(path)(x, packed, scale)
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), expected, rtol=relative, atol=absolute)


def test_the_kernel_reads_strided_input() -> None:
    x, packed, scale = operands((6, 7, 33), "float32")
    kernel, reference = load(OPS["binary_matmul"].kernel), load(OPS["binary_matmul"].reference)
    torch.testing.assert_close(kernel(x[::2], packed, scale), reference(x[::2], packed, scale))


def test_large_bf16_values_do_not_overflow_on_the_way() -> None:
    x = torch.full((2, 33), 1e5, dtype=torch.bfloat16, device=DEVICE)
    packed = pack_bits(torch.ones((7, 33), dtype=torch.bool)).to(DEVICE)
    for path in (OPS["binary_matmul"].reference, OPS["binary_matmul"].kernel):
        y = load(path)(x, packed, 1.0)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), torch.full((2, 7), 3.3e6, device=DEVICE), rtol=0.01, atol=0.0)


def test_the_kernel_refuses_words_of_another_width() -> None:
    with pytest.raises(ValueError, match="no matrix of 65 inputs"):
        load(OPS["binary_matmul"].kernel)(torch.zeros(1, 65), torch.zeros((2, 3), dtype=torch.int32), 1.0)


def test_the_choice_follows_the_device_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, kernel = (load(path) for path in (OPS["binary_matmul"].reference, OPS["binary_matmul"].kernel))
    monkeypatch.delenv("DELTAWORKS_KERNELS", raising=False)
    assert choose("binary_matmul", "cpu") is reference
    assert choose("binary_matmul", "cuda:0") is kernel
    monkeypatch.setenv("DELTAWORKS_KERNELS", "reference")
    assert choose("binary_matmul", "cuda") is reference
    monkeypatch.setenv("DELTAWORKS_KERNELS", "triton")
    assert choose("binary_matmul", "cpu") is kernel
    monkeypatch.setenv("DELTAWORKS_KERNELS", "fastest")
    with pytest.raises(ValueError, match="reference, triton, auto"):
        choose("binary_matmul", "cpu")


def test_the_package_does_not_look_like_the_kernels_distribution_of_others() -> None:
    assert not hasattr(kernels, "__version__")
