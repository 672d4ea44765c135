"""The product with code words of E8P: kernel and twin against a dense matrix in double, both ways, at odd shapes."""

from __future__ import annotations

import pytest
import torch

import kernels.e8p_matmul.reference as twin
from kernels.e8p_matmul.codebook import decode, decode_second_stage
from kernels.e8p_matmul.reference import E8PWeight, decode_matrix
from kernels.registry import OPS, load
from tests.kernels.device import DEVICE

OP = OPS["e8p_matmul"]
PATHS = (OP.reference, OP.kernel)
RESIDUAL_SCALE = {2: 1.0, 3: 2.04, 4: 3.45}


def random_weight(outputs: int, inputs: int, bits: int) -> tuple[E8PWeight, torch.Tensor]:
    """Random codes, and W_hat in double made from their points."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    first, second = (torch.randint(-(1 << 15), 1 << 15, (outputs, inputs // 8), generator=generator) for _ in range(2))
    points = decode(first).double()
    if bits > 2:
        points += (decode_second_stage if bits == 3 else decode)(second).double() / RESIDUAL_SCALE[bits]
    planes = {3: second.to(torch.uint8), 4: second.to(torch.int16)}
    codes = (first.to(torch.int16).to(DEVICE), planes[bits].to(DEVICE) if bits > 2 else None)
    return E8PWeight(*codes, RESIDUAL_SCALE[bits], 0.37), (0.37 * points).reshape(outputs, inputs).to(DEVICE)


def gaussian(rows: int, columns: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("shape", OP.shapes)
def test_it_agrees_with_a_dense_product_forward_and_backward(shape: tuple[int, ...]) -> None:
    rows, outputs, inputs, bits = shape
    weight, dense = random_weight(outputs, inputs, bits)
    relative, absolute = OP.tolerances["float32"]
    x, dy = gaussian(rows, inputs), gaussian(rows, outputs, seed=2)
    for path in PATHS:
        own = x.clone().requires_grad_()
        y = load(path)(own, weight)
        y.backward(dy)
        assert own.grad is not None
        torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=relative, atol=absolute * 10)
        torch.testing.assert_close(own.grad.double(), dy.double() @ dense, rtol=relative, atol=absolute * 10)


@pytest.mark.parametrize("dtype", [name for name in OP.tolerances if name != "float32"])
@pytest.mark.parametrize(("rows", "bits"), [(2, 2), (3, 3), (18, 3), (4, 4)])
def test_half_input_gives_half_output_with_sums_in_fp32(dtype: str, rows: int, bits: int) -> None:
    weight, dense = random_weight(40, 144, bits)
    x = gaussian(rows, 144).to(getattr(torch, dtype)).requires_grad_()
    dy = gaussian(rows, 40, seed=2).to(x.dtype)
    relative, absolute = OP.tolerances[dtype]
    for path in PATHS:
        x.grad = None
        y = load(path)(x, weight)
        y.backward(dy)
        assert y.dtype == x.dtype
        assert x.grad is not None
        torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=relative, atol=absolute * 10)
        torch.testing.assert_close(x.grad.double(), dy.double() @ dense, rtol=relative, atol=absolute * 10)


@pytest.mark.parametrize("path", PATHS)
def test_each_code_word_is_opened_exactly(path: str) -> None:
    """One-hot rows read single weights of a matrix that holds many code words, as they are."""
    first = torch.arange(0, 1 << 16, 61).to(torch.int16)[:1024].reshape(64, 16).to(DEVICE)
    x = torch.eye(128, dtype=torch.float16, device=DEVICE)[::7]
    y = load(path)(x, E8PWeight(first))
    assert torch.equal(y.float(), decode(first).reshape(64, 128).T[::7])


@pytest.mark.parametrize("path", PATHS)
def test_each_point_of_the_second_stage_is_opened_exactly(path: str) -> None:
    second = torch.arange(256, dtype=torch.uint8).reshape(32, 8).to(DEVICE)
    weight = E8PWeight(torch.zeros((32, 8), dtype=torch.int16, device=DEVICE), second, residual_scale=2.0)
    x = torch.eye(64, dtype=torch.float16, device=DEVICE)[3::5]
    expected = 0.75 + decode_second_stage(second).reshape(32, 64).T[3::5] / 2
    assert torch.equal(load(path)(x, weight).float(), expected)


def test_a_row_has_the_same_bits_alone_and_among_others_and_on_each_run() -> None:
    weight, _ = random_weight(70, 528, 2)
    x = gaussian(9, 528).to(torch.float16)
    y = load(OP.kernel)(x, weight)
    assert torch.equal(load(OP.kernel)(x, weight), y)
    assert torch.equal(load(OP.kernel)(x[4:5], weight), y[4:5])


def test_rows_and_inputs_are_taken_in_an_order_that_leaves_none_out() -> None:
    weight, dense = random_weight(256, 256, 4)
    y = load(OP.kernel)(torch.eye(256, device=DEVICE)[::31], weight)
    torch.testing.assert_close(y.double(), dense.T[::31], rtol=1e-6, atol=1e-7)


def test_the_twin_decodes_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, dense = random_weight(37, 40, 3)
    monkeypatch.setattr(twin, "TILE_ELEMENTS", 200)
    assert [len(tile) for _, tile in twin._tiles(weight, torch.float32)] == [5] * 7 + [2]
    x = gaussian(3, 40).requires_grad_()
    y = load(OP.reference)(x, weight)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), dense.sum(0).expand(3, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_matrix_is_decoded_whole(dtype: torch.dtype) -> None:
    weight, dense = random_weight(5, 24, 4)
    whole = decode_matrix(weight, dtype)
    assert whole.dtype == dtype
    torch.testing.assert_close(whole, dense.to(dtype), rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-7)


def test_strided_input_and_an_expanded_gradient_are_read_and_no_rows_are_taken() -> None:
    weight, dense = random_weight(5, 48, 2)
    x = gaussian(6, 96)[::2, ::2].detach().requires_grad_()
    y = load(OP.kernel)(x, weight)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(y.double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), dense.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
    for path in PATHS:
        assert load(path)(x[:0], weight).shape == (0, 5)


def test_nothing_but_codes_is_kept_for_the_gradient() -> None:
    weight, _ = random_weight(16, 32, 2)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    for path in PATHS:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            load(path)(gaussian(2, 32).requires_grad_(), weight)
    assert kept == []


def test_operands_that_do_not_fit_are_refused() -> None:
    weight, _ = random_weight(6, 48, 3)
    for path in PATHS:
        with pytest.raises(ValueError, match="does not fit code words for 48 inputs"):
            load(path)(torch.zeros((1, 40), device=DEVICE), weight)
    with pytest.raises(ValueError, match="float64 is not computed"):
        load(OP.kernel)(torch.zeros((1, 48), dtype=torch.float64, device=DEVICE), weight)
    with pytest.raises(ValueError, match="make them contiguous"):
        load(OP.kernel)(torch.zeros((1, 24), device=DEVICE), E8PWeight(weight.first[:, ::2]))
    with pytest.raises(ValueError, match="code words are int16"):
        E8PWeight(torch.zeros((3, 2), dtype=torch.int32))
    with pytest.raises(ValueError, match="the second stage is uint8 or int16"):
        E8PWeight(weight.first, torch.zeros((6, 5), dtype=torch.uint8))
    with pytest.raises(ValueError, match="is positive"):
        E8PWeight(weight.first, weight.second, 0.0)
