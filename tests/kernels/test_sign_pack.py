"""The one pass in Triton: the same words as the twin, sums of each row as in double, the same bits on each run."""

from __future__ import annotations

import pytest
import torch

from kernels.packing import unpack_bits
from kernels.registry import OPS, load
from kernels.sign_pack import kernel, reference
from tests.kernels.device import DEVICE

OP = OPS["sign_pack"]
CASES = [(shape, dtype) for shape in OP.shapes for dtype in OP.tolerances]


def pair(shape: tuple[int, ...], dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A base and a variant that agree exactly in a third of their elements."""
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    moved = torch.rand(shape, generator=generator) > 1 / 3
    finetuned = base + (0.02 * moved * torch.randn(shape, generator=generator)).to(base.dtype)
    return base.to(DEVICE), finetuned.to(DEVICE)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_it_packs_the_signs_and_adds_up_each_row(shape: tuple[int, ...], dtype: str) -> None:
    base, finetuned = pair(shape, dtype)
    delta = finetuned.double() - base.double()
    relative, absolute = OP.tolerances[dtype]
    for path in (OP.reference, OP.kernel):
        found = load(path)(base, finetuned)
        assert torch.equal(unpack_bits(found.packed, shape[1]), ~(delta < 0))
        assert not unpack_bits(found.packed, len(found.packed) * 32)[:, shape[1] :].any()
        torch.testing.assert_close(found.sum_abs, delta.abs().sum(dim=1), rtol=relative, atol=absolute)
        torch.testing.assert_close(found.sum_squares, delta.square().sum(dim=1), rtol=relative, atol=absolute)


def test_the_kernel_gives_what_the_tiled_pass_on_a_cpu_gives() -> None:
    base, finetuned = pair((40, 300), "bfloat16")
    found, tiled = kernel.sign_pack(base, finetuned), reference.sign_pack(base.cpu(), finetuned.cpu())
    assert torch.equal(found.packed.cpu(), tiled.packed)
    assert found.sum_abs == pytest.approx(tiled.sum_abs, rel=1e-6)
    assert found.sum_squares == pytest.approx(tiled.sum_squares, rel=1e-6)


def test_two_runs_have_the_same_bits() -> None:
    base, finetuned = pair((40, 300), "float32")
    one, two = (kernel.sign_pack_rows(base, finetuned) for _ in range(2))
    assert torch.equal(one.packed, two.packed)
    assert torch.equal(one.sum_abs, two.sum_abs)
    assert torch.equal(one.sum_squares, two.sum_squares)


def test_it_reads_strided_and_mixed_input() -> None:
    base, finetuned = pair((33, 40), "float32")
    half = finetuned.half()
    found = kernel.sign_pack_rows(base.T, half.T)
    wanted = reference.sign_pack_rows(base.T, half.T)
    assert torch.equal(found.packed, wanted.packed)
    torch.testing.assert_close(found.sum_abs, wanted.sum_abs, rtol=1e-6, atol=0.0)


def test_zero_and_minus_zero_count_as_plus_one() -> None:
    base = torch.zeros((1, 32), device=DEVICE)
    assert int(kernel.sign_pack_rows(base, -base).packed[0, 0]) == -1


def test_matrices_of_two_shapes_are_refused() -> None:
    for module in (kernel, reference):
        with pytest.raises(ValueError, match=r"base \(2, 3\) and variant \(3, 2\)"):
            module.sign_pack_rows(torch.zeros((2, 3)), torch.zeros((3, 2)))
