"""The binary product: kernel and twin against dense matrices in double, for every scale kind, map, dtype and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels.binary_matmul import kernel, reference
from kernels.binary_matmul.operands import Segments, segments_of
from kernels.packing import pack_bits, unpack_signs
from kernels.registry import OPS
from tests.kernels.device import DEVICE, ON_GPU

OP = OPS["binary_matmul"]
MODULES = (reference, kernel)
KINDS = ("tensor", "row", "column", "group 32", "group 64", "group 24")
MAPS = {
    "one tenant repeated": [1, 1, 1, 1, 1],
    "any order and repeats": [2, -1, 0, 2, 0],
    "an empty segment": [0, 2, 0, 2, -1],
    "all on the base": [-1] * 5,
    "every slot": [0, 1, 2, -1, 1],
}


class Case:
    """Random operands of T deltas of some masks, and the product in double."""

    def __init__(
        self,
        tokens: int,
        outputs: int,
        inputs: int,
        kind: str,
        *,
        deltas: int = 1,
        masks: int = 1,
        dtype: str = "float32",
    ) -> None:
        generator = torch.Generator().manual_seed(1000 * outputs + inputs)
        self.x = torch.randn((tokens, inputs), generator=generator).to(getattr(torch, dtype)).to(DEVICE)
        self.dy = torch.randn((tokens, outputs), generator=generator).to(self.x)
        self.weight = (0.1 * torch.randn((outputs, inputs), generator=generator)).to(self.x)
        self.bias = torch.randn((deltas + 1, outputs), generator=generator).to(self.x)
        bits = torch.rand((deltas * masks, outputs, inputs), generator=generator) < 0.5
        self.packed = torch.stack([pack_bits(matrix) for matrix in bits]).unflatten(0, (deltas, masks)).to(DEVICE)
        self.group_size = {"tensor": inputs, "row": inputs, "column": 1}.get(kind) or int(kind.split()[1])
        rows, groups = 1 if kind in ("tensor", "column") else outputs, -(-inputs // self.group_size)
        self.scale = (0.5 + torch.rand((deltas, masks, rows, groups), generator=generator)).to(DEVICE)
        self.signs = torch.stack([unpack_signs(words, inputs, torch.float64) for words in self.packed.flatten(0, 1)])
        self.signs = self.signs.unflatten(0, (deltas, masks))

    def dense(self, delta: int, scale: torch.Tensor | None = None) -> torch.Tensor:
        """``W + sum_masks c * S`` of a delta in double; -1 is the base."""
        weight = self.weight.double()
        if delta < 0:
            return weight
        scales = (self.scale if scale is None else scale)[delta].double()
        wide = scales.repeat_interleave(self.group_size, dim=2)[:, :, : weight.shape[1]]
        return weight + (self.signs[delta] * wide).sum(dim=0)

    def expected(self, x: torch.Tensor, delta_of: list[int], scale: torch.Tensor | None = None) -> torch.Tensor:
        rows = [
            x[token].double() @ self.dense(delta, scale).T + self.bias[delta].double()
            for token, delta in enumerate(delta_of)
        ]
        return torch.stack(rows)

    def segments(self, delta_of: list[int]) -> Segments:
        return segments_of(torch.tensor(delta_of, device=DEVICE), len(self.packed))


def close(found: torch.Tensor, expected: torch.Tensor, dtype: str = "float32", size: int = 32) -> None:
    """Within the table's tolerance; an absolute one for sums of ``size`` numbers of about 1."""
    relative, absolute = OP.tolerances[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=relative, atol=absolute * size**0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("masks", "shape"), [(1, (3, 7, 33)), (2, (2, 65, 63)), (4, (1, 1, 130))])
def test_each_scale_kind_and_mask_equals_the_dense_product(kind: str, masks: int, shape: tuple[int, int, int]) -> None:
    case = Case(*shape, kind, masks=masks)
    for module in MODULES:
        y = module.binary_matmul(
            case.x, case.packed[0], case.scale[0], weight=case.weight, bias=case.bias[0], group_size=case.group_size
        )
        close(y, case.expected(case.x, [0] * shape[0]), size=shape[2])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_dense_product(kind: str) -> None:
    delta_of = [1, -1, 0, 1, 1]
    case = Case(5, 9, 70, kind, deltas=3, masks=2)
    x, scale = case.x.double().requires_grad_(), case.scale.double().requires_grad_()
    case.expected(x, delta_of, scale).backward(case.dy.double())
    assert x.grad is not None
    assert scale.grad is not None
    assert not scale.grad[2].any()
    for module in MODULES:
        own_x, own_scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
        y = module.binary_matmul(
            own_x,
            case.packed,
            own_scale,
            weight=case.weight,
            bias=case.bias,
            segments=case.segments(delta_of),
            group_size=case.group_size,
        )
        y.backward(case.dy)
        assert own_x.grad is not None
        assert own_scale.grad is not None
        close(own_x.grad, x.grad)
        close(own_scale.grad, scale.grad, size=400)


def test_the_twin_passes_gradcheck_in_double() -> None:
    case = Case(3, 4, 33, "group 24", masks=2)
    x, scale = case.x.double().requires_grad_(), case.scale[0].double().requires_grad_()
    bias = case.bias[0].double().requires_grad_()

    def product(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return reference.binary_matmul(x, case.packed[0], scale, weight=case.weight.double(), bias=bias, group_size=24)

    assert torch.autograd.gradcheck(product, (x, scale, bias))


def test_the_bias_of_all_tokens_gets_its_gradient() -> None:
    case = Case(3, 7, 33, "tensor")
    for module in MODULES:
        bias = case.bias[0].clone().requires_grad_()
        module.binary_matmul(case.x, case.packed[0, 0], 0.5, bias=bias).backward(case.dy)
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad, case.dy.sum(dim=0))


@pytest.mark.parametrize("name", MAPS)
def test_any_map_of_tokens_gives_each_its_own_delta(name: str) -> None:
    delta_of = MAPS[name]
    case = Case(len(delta_of), 7, 33, "row", deltas=3)
    for module in MODULES:
        y = module.binary_matmul(
            case.x,
            case.packed,
            case.scale,
            weight=case.weight,
            bias=case.bias,
            segments=case.segments(delta_of),
        )
        close(y, case.expected(case.x, delta_of))


def test_one_resident_delta_takes_a_map_too() -> None:
    case = Case(3, 7, 33, "tensor")
    for module in MODULES:
        y = module.binary_matmul(
            case.x, case.packed, case.scale, weight=case.weight, bias=case.bias, segments=case.segments([0, -1, 0])
        )
        close(y, case.expected(case.x, [0, -1, 0]))


def test_more_tokens_and_more_inputs_than_a_tile_hold_take_other_paths_to_the_same_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "SPAN", 64)
    delta_of = [token % 4 - 1 for token in range(20)]
    case = Case(20, 7, 150, "group 64", deltas=3)
    found = []
    for few in (64, 0):
        monkeypatch.setattr(kernel, "FEW_TOKENS", few)
        for invariant in (True, False):
            y = kernel.binary_matmul(
                case.x,
                case.packed,
                case.scale,
                weight=case.weight,
                bias=case.bias,
                segments=case.segments(delta_of),
                group_size=64,
                invariant=invariant,
            )
            close(y, case.expected(case.x, delta_of), size=150)
            found.append(y)
    # Spans over programs and spans in a loop are the same sums in the same order.
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("dtype", OP.tolerances)
@pytest.mark.parametrize("kind", ["row", "column"])
def test_half_input_gives_half_output(dtype: str, kind: str) -> None:
    case = Case(3, 7, 65, kind, deltas=2, dtype=dtype)
    for module in MODULES:
        y = module.binary_matmul(
            case.x,
            case.packed,
            case.scale,
            weight=case.weight,
            bias=case.bias,
            segments=case.segments([1, 0, -1]),
            group_size=case.group_size,
        )
        assert y.dtype == case.x.dtype
        close(y, case.expected(case.x, [1, 0, -1]), dtype, size=65)


@pytest.fixture
def _rows_of_a_tile_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor's BLAS adds up the last rows of a tile in another order than the first; a GPU's matrix units do not."""
    product = np.matmul

    def row_by_row(left: np.ndarray, right: np.ndarray, **kwargs: Any) -> np.ndarray:
        return np.concatenate([product(row[None], right, **kwargs) for row in left])

    if not ON_GPU:
        monkeypatch.setattr(np, "matmul", row_by_row)


@pytest.mark.usefixtures("_rows_of_a_tile_alike")
def test_a_mixed_batch_equals_each_token_alone_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # The batch is too long for spans on programs of their own, a token alone is not.
    monkeypatch.setattr(kernel, "SPAN", 64)
    monkeypatch.setattr(kernel, "FEW_TOKENS", 16)
    delta_of = [2, -1, 0, 2, 1, 0, -1, 1, 2, 0, 1, 1, 0, -1, 2, 2, 0, 1, -1]
    case = Case(len(delta_of), 7, 65, "row", deltas=3)
    arguments = {"weight": case.weight, "bias": case.bias}
    mixed = kernel.binary_matmul(case.x, case.packed, case.scale, segments=case.segments(delta_of), **arguments)
    for token, delta in enumerate(delta_of):
        alone = kernel.binary_matmul(
            case.x[token : token + 1], case.packed, case.scale, segments=case.segments([delta]), **arguments
        )
        assert torch.equal(mixed[token], alone[0])


def test_a_neighbour_that_is_not_finite_reaches_nobody() -> None:
    case = Case(3, 7, 33, "row", deltas=2)
    spoilt = case.x.clone()
    spoilt[1] = float("nan")
    y = kernel.binary_matmul(spoilt, case.packed, case.scale, weight=case.weight, segments=case.segments([0, 1, -1]))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_a_delta_that_is_not_resident_answers_nobody() -> None:
    with pytest.raises(ValueError, match=r"the map names deltas 0 .. 3; 3 are resident"):
        segments_of(torch.tensor([0, 3]), 3)
    case = Case(2, 7, 33, "row", deltas=3)
    # What a map on a GPU looks like, where nobody looked.
    unseen = Segments(
        *(torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in ([0, 1], [0, 3], [0, 1, 1, 1]))
    )
    for invariant in (True, False):
        y = kernel.binary_matmul(
            case.x,
            case.packed,
            case.scale,
            weight=case.weight,
            bias=case.bias,
            segments=unseen,
            invariant=invariant,
        )
        assert y[0].isfinite().all()
        assert y[1].isnan().all()


def test_segments_group_tokens_and_find_each_start() -> None:
    segments = segments_of(torch.tensor([2, -1, 0, 2, 0], device=DEVICE), 4)
    assert segments.order.tolist() == [1, 2, 4, 0, 3]
    assert segments.ids.tolist() == [-1, 0, 0, 2, 2]
    assert segments.starts.tolist() == [1, 3, 3, 5, 5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": torch.ones(2)}, "scales of 1 axes"),
        ({"scale": torch.ones((1, 2))}, r"scales of shape \(1, 1, 1, 2\) do not fit"),
        ({"scale": torch.ones((7, 2)), "group_size": 32}, "scales of shape"),
        ({"group_size": 0}, "groups of 0 inputs"),
        ({"weight": torch.zeros((33, 7))}, "a base of"),
        ({"weight": torch.zeros((7, 65), dtype=torch.float16)}, "a base of"),
        ({"weight": torch.zeros((7, 65), requires_grad=True)}, "the base is frozen"),
        ({"bias": torch.zeros(6)}, "a bias of"),
        ({"bias": torch.zeros((2, 7), requires_grad=True)}, "a bias for each delta"),
        ({"packed": torch.zeros((2, 1, 3, 7), dtype=torch.int32), "scale": torch.ones((2, 1))}, "say by segments"),
        ({"segments": segments_of(torch.zeros(3, dtype=torch.int32), 1)}, "segments of 3 tokens"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changed: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros((1, 65)), "packed": torch.zeros((3, 7), dtype=torch.int32), "scale": 1.0} | changed
    for module in MODULES:
        with pytest.raises(ValueError, match=message):
            module.binary_matmul(**arguments)  # type: ignore[arg-type]


def test_a_map_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="one whole number a token"):
        segments_of(torch.zeros((2, 2), dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="one whole number a token"):
        segments_of(torch.zeros(2), 1)


def test_no_tokens_make_no_rows() -> None:
    case = Case(1, 7, 33, "row", deltas=2)
    for module in MODULES:
        y = module.binary_matmul(
            case.x[:0],
            case.packed,
            case.scale,
            segments=segments_of(torch.zeros(0, dtype=torch.int32, device=DEVICE), 2),
        )
        assert y.shape == (0, 7)
