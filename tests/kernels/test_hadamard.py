"""The orthogonal transforms: exact matrices, what a plan chooses, and the transform against its dense matrix in double."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kernels.hadamard import kernel, reference
from kernels.hadamard.factors import Plan, hadamard_matrix, paley, plan, plan_from
from kernels.hadamard.fields import character_of_differences, prime_power, quadratic_character
from kernels.hadamard.signs import phases, random_signs
from kernels.registry import OPS, load
from tests.kernels.device import DEVICE

OP = OPS["hadamard"]
PATHS = (OP.reference, OP.kernel)

PALEY_ORDERS = {
    12: ("I", 11), 20: ("I", 19), 28: ("I", 27), 36: ("II", 17), 44: ("I", 43), 52: ("II", 25), 60: ("I", 59),
    68: ("I", 67), 76: ("II", 37), 84: ("I", 83), 100: ("II", 49), 108: ("I", 107), 124: ("II", 61), 140: ("I", 139),
    148: ("II", 73), 244: ("I", 243), 312: ("I", 311), 344: ("I", 343), 368: ("I", 367), 464: ("I", 463),
    684: ("I", 683), 924: ("II", 461),
}  # fmt: skip
MODEL_SIZES = {
    576: 36, 1536: 12, 2048: 1, 3072: 12, 4096: 1, 4864: 76, 5120: 20, 5632: 44, 6656: 52, 8192: 1, 8960: 140,
    9728: 76, 10944: 684, 11008: 344, 12288: 12, 13824: 108, 14336: 28, 17408: 68, 17920: 140, 18944: 148,
    21504: 84, 22016: 344, 25600: 100, 28672: 28, 29568: 924, 18432: 36, 27648: 108, 7168: 28, 53248: 52,
}  # fmt: skip
"""Sizes of released models, and the order of the dense factor of each."""
SMALL = {
    "one": plan(1),
    "two": plan(2),
    "sylvester": plan(64),
    "two pieces": plan(512),
    "paley one": plan(24),
    "paley two": plan(36),
    "paley alone": plan(12),
    "kronecker": Plan("kronecker", 480, (20, 12), 2),
    "fourier": plan(46),
    "fourier of three": plan(6),
    "block": plan(46 * 4, fourier=False),
    "identity": plan(7),
}


def dense(chosen: Plan) -> torch.Tensor:
    """Q of a plan in double, from the definition."""
    if chosen.kind == "fourier":
        return dense_fourier(chosen)
    matrix = np.eye(1)
    for order in (*chosen.factors, chosen.sylvester):
        matrix = np.kron(matrix, hadamard_matrix(order))
    return torch.tensor(np.kron(np.eye(chosen.copies), matrix) / len(matrix) ** 0.5)


def dense_fourier(chosen: Plan) -> torch.Tensor:
    half = chosen.n // 2
    place = np.arange(half)
    complex_matrix = (
        phases(half, chosen.seed)[:, None] * np.exp(-2j * np.pi * np.outer(place, place) / half) / half**0.5
    )
    matrix = np.zeros((half, 2, half, 2))
    matrix[:, 0, :, 0] = matrix[:, 1, :, 1] = complex_matrix.real
    matrix[:, 0, :, 1], matrix[:, 1, :, 0] = complex_matrix.imag, -complex_matrix.imag
    return torch.tensor(matrix.reshape(chosen.n, chosen.n))


@pytest.mark.parametrize("order", [*PALEY_ORDERS, 1, 2, 4, 32, 256])
def test_each_matrix_is_a_hadamard_matrix_exactly(order: int) -> None:
    matrix = hadamard_matrix(order).astype(np.float64)
    assert set(np.unique(np.abs(matrix))) == {1.0}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))
    if order in PALEY_ORDERS:
        assert paley(order) == PALEY_ORDERS[order]


def test_the_matrix_of_order_twelve_is_that_of_the_reference() -> None:
    matrix = hadamard_matrix(12)
    assert (matrix[0] == 1).all()
    assert "".join("+" if value > 0 else "-" for value in matrix[1]) == "-+-+---+++-+"


@pytest.mark.parametrize("q", [3, 9, 25, 27, 49, 125, 243, 343, 11, 13])
def test_a_field_has_as_many_squares_as_other_elements_and_a_character_of_its_sign(q: int) -> None:
    character = quadratic_character(q).astype(int)
    assert (np.count_nonzero(character == 1), np.count_nonzero(character == -1)) == (q // 2, q // 2)
    difference = character_of_differences(q).astype(int)
    assert np.array_equal(difference, difference.T if q % 4 == 1 else -difference.T)
    # The rows of the character matrix are orthogonal but for the all-ones part: Jacobsthal's identity.
    assert np.array_equal(difference @ difference.T, q * np.eye(q, dtype=int) - 1)


def test_prime_powers_are_told_from_other_numbers() -> None:
    assert [q for q in range(33) if prime_power(q)] == [
        2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29, 31, 32,
    ]  # fmt: skip
    assert prime_power(343) == (7, 3)
    with pytest.raises(ValueError, match="no odd prime power"):
        quadratic_character(15)


@pytest.mark.parametrize("order", [0, 3, 92, 116, 156, 172])
def test_orders_without_a_construction_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match="no Sylvester or Paley matrix"):
        hadamard_matrix(order)


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_sizes_of_released_models_have_a_direct_transform(n: int) -> None:
    chosen = plan(n)
    assert chosen.kind == "direct"
    assert (chosen.factors or (1,)) == (MODEL_SIZES[n],)
    x = torch.randn((2, n), generator=torch.Generator().manual_seed(n))
    signs = torch.from_numpy(random_signs(n, 1))
    y = reference.hadamard(x, chosen, signs)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(reference.hadamard(y, chosen, signs, transpose=True), x, rtol=1e-5, atol=1e-5)
    # A unit vector is spread over all entries alike: that is what the transform is for.
    spread = reference.hadamard(torch.eye(1, n), chosen).abs()
    torch.testing.assert_close(spread, torch.full((1, n), n**-0.5), rtol=1e-5, atol=0.0)


def test_multiples_of_64_are_covered_as_the_reference_counts() -> None:
    kinds = [plan(n, largest=n).kind for n in range(64, 32769, 64)]
    assert (512 - kinds.count("direct"), kinds.count("fourier"), len(kinds)) == (58, 41, 512)


def test_every_dimension_has_a_plan_that_survives_a_manifest() -> None:
    for n in range(1, 600):
        chosen = plan(n)
        assert chosen.n == n
        assert (chosen.kind == "block") == (n % 2 == 1 and n > 1)
        assert plan_from(json.loads(json.dumps(chosen.as_dict()))) == chosen
        other = plan(n, fourier=False)
        assert other.kind != "fourier"
        assert other.copies * other.sylvester * int(np.prod(other.factors)) == n


def test_a_large_factor_is_left_to_another_transform() -> None:
    assert plan(9344, largest=1 << 20).factors == (9344,)
    assert plan(9344).kind == "fourier"
    assert plan(4160) == Plan("kronecker", 4160, (52, 20), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "wavelet"}, "unknown"),
        ({"factors": [92]}, "is not 48"),
        ({"factors": [3], "sylvester": 16}, "no Paley matrix has order 3"),
        ({"sylvester": 4.0}, "whole numbers"),
        ({"factors": None}, "whole numbers"),
        ({"copies": True}, "whole numbers"),
        ({"sylvester": 3, "factors": [16]}, "do not fit"),
        ({"kind": "fourier"}, "and no factors"),
        ({"seed": -1}, "64 bits"),
        ({"extra": 1}, "has the fields"),
    ],
)
def test_a_foreign_plan_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_from(plan(48).as_dict() | change)


def test_a_dimension_below_one_has_no_plan() -> None:
    with pytest.raises(ValueError, match="1 at least"):
        plan(0)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("transpose", [False, True])
def test_the_twin_equals_the_dense_matrix(name: str, transpose: bool) -> None:
    chosen = SMALL[name]
    matrix = dense(chosen)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(chosen.n, dtype=torch.float64))
    x = torch.randn((2, 3, chosen.n), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    signs = torch.from_numpy(random_signs(chosen.n, 5)).double()
    expected = (x @ matrix.T) * signs if transpose else (x * signs) @ matrix
    torch.testing.assert_close(reference.hadamard(x, chosen, signs, transpose), expected)
    bare = x @ (matrix.T if transpose else matrix)
    torch.testing.assert_close(reference.hadamard(x, chosen, transpose=transpose), bare)


@pytest.mark.parametrize("name", [name for name, chosen in SMALL.items() if chosen.n <= 64])
@pytest.mark.parametrize("transpose", [False, True])
def test_the_gradients_of_x_and_of_trained_signs_pass_gradcheck_twice(name: str, transpose: bool) -> None:
    chosen = SMALL[name]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn((2, chosen.n), dtype=torch.float64, generator=generator).requires_grad_()
    signs = torch.randn(chosen.n, dtype=torch.float64, generator=generator).requires_grad_()

    def rotated(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        return reference.hadamard(x, chosen, signs, transpose)

    assert torch.autograd.gradcheck(rotated, (x, signs))
    if chosen.n < 40:
        assert torch.autograd.gradgradcheck(rotated, (x, signs))


@pytest.mark.parametrize("shape", OP.shapes)
@pytest.mark.parametrize("transpose", [False, True])
def test_kernel_and_twin_agree_with_the_dense_matrix_forward_and_backward(
    shape: tuple[int, int], transpose: bool
) -> None:
    check_against_dense(plan(shape[1]), shape[0], transpose)


@pytest.mark.parametrize("name", ["kronecker", "block", "two", "paley one"])
def test_the_kernel_takes_plans_of_every_kind(name: str) -> None:
    for transpose in (False, True):
        check_against_dense(SMALL[name], 3, transpose)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernel, "LARGEST_ROW", 16)
    monkeypatch.setattr(kernel, "LARGEST_INNER", 8)
    monkeypatch.setattr(kernel, "LARGEST_JOINED", 64)
    kernel._stages.cache_clear()
    yield
    kernel._stages.cache_clear()


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("chosen", "passes"),
    [
        (plan(64), [((8,), 8, 8)]),
        (plan(12 * 32), [((12, 4), 8, 8)]),
        (plan(12 * 64), [((12,), 64, 1), ((8,), 8, 8)]),
        (Plan("kronecker", 12 * 20 * 4, (20, 12), 4), [((20,), 48, 1), ((12,), 4, 4)]),
        (Plan("block", 3 * 64, (), 64, 3), [((8,), 8, 8)]),
    ],
)
def test_rows_beyond_a_tile_take_dense_factors_and_several_passes(
    chosen: Plan, passes: list[tuple[tuple[int, ...], int, int]]
) -> None:
    assert [(stage.orders, stage.inner, stage.power) for stage in kernel._stages(chosen)] == passes
    for transpose in (False, True):
        check_against_dense(chosen, 3, transpose)


def check_against_dense(chosen: Plan, rows: int, transpose: bool) -> None:
    """Values and the gradients of x and trained signs, by both codes."""
    generator = torch.Generator().manual_seed(chosen.n)
    x, dy = (torch.randn((rows, chosen.n), generator=generator).to(DEVICE) for _ in range(2))
    signs = torch.from_numpy(random_signs(chosen.n, 1)).to(DEVICE) * 0.75
    matrix = dense(chosen).to(DEVICE)
    wide, factor = x.double().requires_grad_(), signs.double().requires_grad_()
    expected = (wide @ matrix.T) * factor if transpose else (wide * factor) @ matrix
    expected.backward(dy.double())
    relative, absolute = OP.tolerances["float32"]
    for path in PATHS:
        own, own_signs = x.clone().requires_grad_(), signs.clone().requires_grad_()
        y = load(path)(own, chosen, own_signs, transpose)
        y.backward(dy)
        torch.testing.assert_close(y.double(), expected.detach(), rtol=relative, atol=absolute)
        for found, wanted in ((own.grad, wide.grad), (own_signs.grad, factor.grad)):
            assert found is not None
            torch.testing.assert_close(found.double(), wanted, rtol=relative, atol=10 * absolute)


def test_nothing_but_the_signs_is_kept_for_backward() -> None:
    chosen, kept = plan(48), []
    x, signs = torch.randn(5, 48, requires_grad=True), torch.from_numpy(random_signs(48, 1))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        reference.hadamard(x, chosen, signs)
    assert kept == [48]


def test_a_rotated_layer_equals_the_layer() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((4, 48), (36, 48)))
    s_in, s_out = (torch.from_numpy(random_signs(n, 7, tensor)).double() for tensor, n in enumerate((48, 36)))
    into, out = plan(48), plan(36)
    turned = reference.hadamard(weight, into, s_in)
    turned = reference.hadamard(turned.T, out, s_out).T
    y = reference.hadamard(reference.hadamard(x, into, s_in) @ turned.T, out, s_out, transpose=True)
    torch.testing.assert_close(y, x @ weight.T)


def test_rows_beyond_one_tile_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn((7, 24), generator=torch.Generator().manual_seed(1))
    whole = reference.hadamard(x, plan(24))
    monkeypatch.setattr(reference, "TILE", 48)
    torch.testing.assert_close(reference.hadamard(x, plan(24)), whole)


@pytest.mark.parametrize("dtype", [name for name in OP.tolerances if name != "float32"])
@pytest.mark.parametrize("n", [46, 48, 512])
def test_half_input_gives_half_output_with_sums_in_fp32(dtype: str, n: int) -> None:
    x = torch.randn((3, n), generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype)).to(DEVICE)
    expected = x.double() @ dense(plan(n)).to(DEVICE)
    relative, absolute = OP.tolerances[dtype]
    for path in PATHS:
        y = load(path)(x, plan(n))
        assert y.dtype == x.dtype
        torch.testing.assert_close(y.double(), expected, rtol=relative, atol=absolute)


def test_large_half_values_do_not_overflow_on_the_way() -> None:
    x = torch.full((1, 512), 1000.0, dtype=torch.float16, device=DEVICE)
    for path in PATHS:
        y = load(path)(x, plan(512)).float()
        torch.testing.assert_close(y[0, 0].item(), 1000.0 * 512**0.5, rtol=1e-3, atol=0.0)
        assert y[0, 1:].abs().max() < 30


def test_no_rows_and_strided_rows() -> None:
    x = torch.randn((6, 96), generator=torch.Generator().manual_seed(1)).to(DEVICE)[::2, ::2]
    expected = x.double() @ dense(plan(48)).to(DEVICE)
    for path in PATHS:
        transform = load(path)
        torch.testing.assert_close(transform(x, plan(48)).double(), expected, rtol=1e-5, atol=1e-5)
        assert transform(x[:0], plan(48)).shape == (0, 48)
        assert transform(x[0], plan(48)).shape == (48,)


def test_operands_that_do_not_fit_are_refused() -> None:
    for path in PATHS:
        with pytest.raises(ValueError, match="does not fit a transform of dimension 48"):
            load(path)(torch.zeros(2, 47), plan(48))
        with pytest.raises(ValueError, match="signs of shape"):
            load(path)(torch.zeros(2, 48), plan(48), torch.ones(47))
    with pytest.raises(ValueError, match="does not fit a transform of dimension 48"):
        reference.hadamard(torch.zeros((2, 48), dtype=torch.int64), plan(48))
    with pytest.raises(ValueError, match="float64 is not computed"):
        kernel.hadamard(torch.zeros((2, 48), dtype=torch.float64), plan(48))


def test_random_signs_and_phases_are_the_same_on_every_machine() -> None:
    signs = random_signs(4096, 1, 2)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.05
    assert np.array_equal(random_signs(10, 1, 2), signs[:10])
    assert not np.array_equal(random_signs(4096, 1, 3), signs)
    assert not np.array_equal(random_signs(4096, 2, 2), signs)
    turn = phases(1000, 3)
    assert np.allclose(np.abs(turn), 1.0)
    assert abs(turn.mean()) < 0.1
    with pytest.raises(ValueError, match="64 and 32 bits"):
        random_signs(4, 1 << 64)
