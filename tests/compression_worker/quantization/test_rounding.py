"""The solver against a straight GPTQ, against numbers on paper, and against plain rounding."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from compression_worker.quantization.rounding import Factor, factor, ldlq, proxy_loss


@dataclass
class Grid:
    """A uniform grid for each row: ``scale (N,)``, ``zero (N,)``, codes 0 to ``most``."""

    scale: torch.Tensor
    zero: torch.Tensor
    most: int
    block: int = 1

    def __call__(self, targets: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes = (targets / self.scale + self.zero).round().clamp(0, self.most)
        return (codes - self.zero) * self.scale, codes


@dataclass
class Halves:
    """Multiples of a half, eight columns at a time."""

    block: int = 8

    def __call__(self, targets: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        values = (targets * 2).round() / 2
        return values, values


def min_max(weight: torch.Tensor, bits: int) -> Grid:
    """The grid of each row of ``weight (N, K)`` from its least to its greatest weight."""
    least, greatest = weight.min(1).values.clamp(max=0), weight.max(1).values.clamp(min=0)
    scale = (greatest - least) / (2**bits - 1)
    return Grid(scale, (-least / scale).round(), 2**bits - 1)


def straight_gptq(weight: torch.Tensor, damped: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ as published: one column after another on the factor of the inverse Hessian. Codes ``(N, K)``, and the loss."""
    weight, codes = weight.clone(), torch.zeros_like(weight)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    loss = torch.zeros((), dtype=weight.dtype)
    for column in range(weight.shape[1]):
        values, codes[:, column] = grid(weight[:, column], column)
        error = (weight[:, column] - values) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
        loss += error.square().sum() / 2
    return codes, loss


def problem(inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random ``W (N, K)`` and a correlated ``H (K, K)``, fp64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inputs, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x.T @ x / len(x)


@pytest.mark.parametrize(("inputs", "outputs", "bits"), [(96, 40, 3), (300, 17, 2), (131, 5, 4), (1, 3, 4)])
def test_one_column_at_a_time_is_gptq(inputs: int, outputs: int, bits: int) -> None:
    weight, hessian = problem(inputs, outputs)
    grid, found = min_max(weight, bits), factor(hessian)
    codes, loss = straight_gptq(weight, found.hessian, grid)
    made = ldlq(weight.T.contiguous(), found, grid)
    assert torch.equal(made.codes.T, codes)
    error = weight - made.values.T
    torch.testing.assert_close(loss, (error @ found.hessian @ error.T).trace() / 2)


def test_the_step_that_was_done_on_paper() -> None:
    weight = torch.tensor([[0.9, 0.3, -0.4, 0.1], [-0.6, 0.7, 0.2, -0.35]], dtype=torch.float64)
    hessian = torch.tensor(
        [[2, 1.5, 0.5, 0.25], [1.5, 2, 1, 0.5], [0.5, 1, 1.5, 0.75], [0.25, 0.5, 0.75, 1]], dtype=torch.float64
    )
    grid = min_max(weight, 2)
    torch.testing.assert_close(grid.scale, torch.full((2,), 0.43333333, dtype=torch.float64))
    made = ldlq(weight.T.contiguous(), factor(hessian), grid)
    assert made.codes.T.tolist() == [[3, 2, 0, 1], [0, 2, 2, 0]]
    error = weight - made.values.T
    assert float((error @ hessian @ error.T).trace()) == pytest.approx(0.0752778, rel=1e-5)


def test_without_correlation_feedback_changes_nothing() -> None:
    weight, _ = problem(64, 8)
    grid = min_max(weight, 3)
    made = ldlq(weight.T.contiguous(), factor(torch.rand(64, dtype=torch.float64).add(0.1).diag()), grid)
    assert torch.equal(made.codes, torch.stack([grid(column, 0)[1] for column in weight.T]))


def test_blocks_of_columns_beat_plain_rounding_and_scaling_by_the_diagonal() -> None:
    weight, hessian = problem(96, 48)
    found = factor(hessian, block=8)
    columns = weight.T.contiguous()
    plain = proxy_loss(columns, Halves()(columns, 0)[0], hessian)
    # Rounding each column in a unit of its own importance, as scaling by the diagonal of H does.
    importance = hessian.diagonal().sqrt()[:, None]
    importance = importance / importance.mean()
    scaled = proxy_loss(columns, Halves()(columns * importance, 0)[0] / importance, hessian)
    losses = [proxy_loss(columns, ldlq(columns, found, Halves(), passes=n).values, hessian) for n in (0, 1, 10)]
    assert losses[0] < 0.7 * min(plain, scaled)
    assert losses[2] <= losses[1] < losses[0]


def test_feedback_of_blocks_is_that_of_the_definition() -> None:
    weight, hessian = problem(40, 6)
    found = factor(hessian, block=8)
    made = ldlq(weight.T.contiguous(), found, Halves())
    assert found.upper is not None
    rounded = torch.zeros_like(weight)
    for at in range(0, 40, 8):
        target = weight[:, at : at + 8] + (weight[:, :at] - rounded[:, :at]) @ found.upper[:at, at : at + 8]
        rounded[:, at : at + 8] = Halves()(target, at)[0]
    torch.testing.assert_close(made.values.T, rounded)


@pytest.mark.parametrize("block", [1, 8])
def test_the_factor_takes_the_hessian_apart(block: int) -> None:
    _, hessian = problem(48, 1)
    found = factor(hessian, block=block)
    assert found.upper is not None
    inverse = torch.linalg.inv(found.upper)
    middle = inverse @ found.hessian @ inverse.T
    for at in range(0, 48, block):
        own = slice(at, at + block)
        torch.testing.assert_close(found.upper[own, own], torch.eye(block, dtype=torch.float64))
        assert not found.upper[at + block :, own].any()
        middle[own, own] = 0
    assert float(middle.abs().max()) < 1e-9 * float(hessian.abs().max())


def test_many_columns_are_the_same_in_one_go_as_in_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(200, 9)
    grid, found = min_max(weight, 3), factor(hessian)
    codes = []
    for columns in (1, 32, 128, 1000):
        monkeypatch.setattr("compression_worker.quantization.rounding.COLUMNS", columns)
        codes.append(ldlq(weight.T.contiguous(), found, grid, passes=2).codes)
    assert all(torch.equal(codes[0], one) for one in codes)


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    weight, _ = problem(32, 4)
    x = torch.randn(2, 32, dtype=torch.float64)
    found = factor((x.T @ x).to(torch.float32) * 1e6, damping=0.0)
    assert found.upper is not None
    assert found.damping > 0
    made = ldlq(weight.T.to(torch.float32).contiguous(), found, min_max(weight.to(torch.float32), 4))
    assert bool(made.values.isfinite().all())


def test_without_a_factor_rounding_is_plain() -> None:
    weight, hessian = problem(32, 4)
    hessian[3, 3] = torch.inf
    found = factor(hessian)
    assert found.upper is None
    grid = min_max(weight, 3)
    made = ldlq(weight.T.contiguous(), found, grid, passes=3)
    assert torch.equal(made.codes, torch.cat([grid(column[None], 0)[1] for column in weight.T]))


def test_inputs_that_are_always_zero_are_named() -> None:
    _, hessian = problem(16, 1)
    hessian[5], hessian[:, 5] = 0, 0
    found = factor(hessian)
    assert found.dead.nonzero().flatten().tolist() == [5]
    assert found.upper is not None


def test_columns_that_fill_no_block_are_refused() -> None:
    with pytest.raises(ValueError, match="12 columns do not fall into blocks of 8"):
        ldlq(torch.zeros(12, 2), Factor(None, torch.eye(12), 0.01, torch.zeros(12)), Halves())
