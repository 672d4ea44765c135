"""``x Q`` with the orthogonal ``Q`` of a plan, and ``x Q^T``, with a vector of signs: a few small dense products.

Rows x ``(..., n)``, signs ``s (n,)`` real (+-1, or values trained from there). Two directions, each the transpose of
the other, and for signs of +-1 its inverse:

    forward       y = (x * s) Q        signs before:  the column Q^T (s * x), of inputs
    transposed    y = (x Q^T) * s      signs after:   the column s * (Q x), of outputs

so a linear layer with rotated weights ``Wt = Q_out^T diag(s_out) W diag(s_in) Q_in`` (QuIP#, arXiv 2402.04396) is
``hadamard(hadamard(x, plan_in, s_in) @ Wt.T, plan_out, s_out, transpose=True)``, and ``Wt`` itself is the forward
transform of W's rows with ``s_in``, then of its columns with ``s_out``. ``Q`` need not be symmetric.

``Q = H_h kron H_m1 kron H_m2 ... / sqrt(n)``: a row becomes ``(h, m1, m2)`` and each axis is multiplied by its small
matrix, a few rows at a time so that they stay in a core's cache. Sums are fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from kernels.hadamard.factors import Plan, hadamard_matrix
from kernels.hadamard.gradients import check_operands, differentiable
from kernels.hadamard.signs import phases

PIECE_POWER = 7
"""Sylvester's matrix is multiplied as pieces of order 2^7 at most."""
TILE = 1 << 18
"""Numbers transformed at a time: 1 MB in fp32."""
FEW_COLUMNS = 16
"""Products of fewer columns are slow one by one: their rows are gathered into one product instead."""


def hadamard(x: torch.Tensor, plan: Plan, signs: torch.Tensor | None = None, transpose: bool = False) -> torch.Tensor:
    """x ``(..., n)`` -> its shape and dtype: ``(x * signs) Q``, or with ``transpose`` ``(x Q^T) * signs``.

    Differentiable in x and signs. ValueError where x or signs do not fit ``plan.n``.
    """
    check_operands(x, plan, signs)
    return differentiable(transform, x, plan, signs, transpose)


def transform(x: torch.Tensor, plan: Plan, signs: torch.Tensor | None, transpose: bool) -> torch.Tensor:
    """The transform itself, tile by tile."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.reshape(-1, plan.n)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    factor = None if signs is None else signs.to(accumulator)
    step = max(1, TILE // plan.n) if x.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        tile = rows[start : start + step].to(accumulator)
        if factor is not None and not transpose:
            tile = tile * factor
        tile = _fourier(tile, plan, transpose) if plan.kind == "fourier" else _kronecker(tile, plan, transpose)
        y[start : start + step] = tile if factor is None or not transpose else tile * factor
    return y.reshape(x.shape)


def pieces(plan: Plan) -> tuple[int, ...]:
    """The orders that are multiplied one by one: the Paley factors, then Sylvester's in nearly equal pieces."""
    power = plan.sylvester.bit_length() - 1
    count = -(-power // PIECE_POWER)
    return (*plan.factors, *(1 << (power // count + (at < power % count)) for at in range(count)))


def _kronecker(rows: torch.Tensor, plan: Plan, transpose: bool) -> torch.Tensor:
    """``(R, n)`` -> ``(R, n)``: a product along each axis, the innermost first."""
    inner = 1
    for order in reversed(pieces(plan)):
        matrix = _unit_matrix(order, rows.dtype, rows.device)
        rows = rows.reshape(-1, order, inner)
        if inner < FEW_COLUMNS:
            turned = rows.transpose(1, 2)
            product = turned.reshape(-1, order) @ (matrix.T if transpose else matrix)
            rows = product.reshape(turned.shape).transpose(1, 2)
        else:
            rows = torch.matmul(matrix if transpose else matrix.T, rows)
        inner *= order
    return rows.reshape(-1, plan.n)


def _fourier(rows: torch.Tensor, plan: Plan, transpose: bool) -> torch.Tensor:
    """``(R, n)`` as ``(R, n/2)`` complex numbers: phases, then the unitary FFT; transposed, all that backwards."""
    turn = _phases(plan.n // 2, plan.seed, rows.dtype, rows.device)
    numbers = torch.view_as_complex(rows.reshape(-1, plan.n // 2, 2).contiguous())
    if transpose:
        numbers = torch.fft.ifft(numbers, norm="ortho") * turn.conj()
    else:
        numbers = torch.fft.fft(numbers * turn, norm="ortho")
    return torch.view_as_real(numbers.resolve_conj()).reshape(-1, plan.n)


@lru_cache(maxsize=64)
def _unit_matrix(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``H / sqrt(order)``."""
    matrix = torch.tensor(hadamard_matrix(order), dtype=torch.float64) / order**0.5
    return matrix.to(dtype).to(device)


@lru_cache(maxsize=16)
def _phases(count: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(phases(count, seed)).to(dtype.to_complex()).to(device)
