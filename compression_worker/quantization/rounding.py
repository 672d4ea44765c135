"""One solver for every code: block LDLQ with a pluggable rounding, and greedy refinement after it.

Notation: ``W (N, K)``, its rounded form ``W^``, ``H (K, K)`` the Hessian, ``g`` the columns that are rounded at a time.
With ``H = U D U^T``, ``U`` unit upper triangular by blocks of ``g``, columns are rounded from the first to the last:

    T_k = W_k + (W_<k - W^_<k) U_<k,k        W^_k = Q(T_k)

(QuIP, arXiv:2307.13304, and BlockLDLQ of QuIP#, arXiv:2402.04396, section 4.1, up to the order of the columns). The
loss is ``sum_k tr((T_k - W^_k) D_k (T_k - W^_k)^T)``. With ``g = 1`` and a scalar grid this is GPTQ
(arXiv:2210.17323), whose recursion on the inverse Hessian gives the same numbers; here one Cholesky factor of ``H`` is
all that is needed.

Refinement rounds each block of columns once more with all others fixed:

    T_k = W^_k + (W - W^) H_:,k H_k,k^-1        W^_k = Q(T_k)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

COLUMNS = 128
"""Columns whose feedback is applied one block at a time; what comes after them gets it in one product."""
DAMPING, WORST_DAMPING = 0.01, 1.0


class Rounding(Protocol):
    """``Q``: how ``block`` columns are rounded, of all rows at once."""

    block: int

    def __call__(self, targets: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``targets (g, N)``, those of columns ``start`` on -> their values ``(g, N)`` and codes ``(any, N)``.

        ``g`` is ``block``. Called in the order of the columns, and again for each refinement.
        """


@dataclass(frozen=True)
class Factor:
    """``U`` (unit upper triangular by blocks) of a damped Hessian, or None where feedback is not possible.

    ``damping`` is what was added to the diagonal over its mean; ``dead`` says which inputs are always zero.
    """

    upper: torch.Tensor | None
    hessian: torch.Tensor
    damping: float
    dead: torch.Tensor


@dataclass(frozen=True)
class Rounded:
    """``values (K, N)`` and ``codes (any, N)`` in the order of the columns that were given."""

    values: torch.Tensor
    codes: torch.Tensor


def factor(hessian: torch.Tensor, block: int = 1, damping: float = DAMPING) -> Factor:
    """``U`` of ``hessian (K, K)``, damped by ``damping`` times the mean of its diagonal.

    Inputs that are always zero get 1 on the diagonal. A Hessian that has no Cholesky factor is tried in fp64, then with
    ten times the damping, up to 1; after that there is no feedback.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    mean = float(diagonal.mean())
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        for dtype in (hessian.dtype, torch.float64):
            if (upper := _block_upper(damped.to(dtype), block)) is not None:
                return Factor(upper.to(hessian.dtype), damped, damping, dead)
        if damping >= WORST_DAMPING:
            return Factor(None, damped, damping, dead)
        damping = min(WORST_DAMPING, max(damping, 1e-6) * 10)


def ldlq(weight: torch.Tensor, found: Factor, rounding: Rounding, *, passes: int = 0) -> Rounded:
    """Round ``weight (K, N)`` (transposed, so that a column lies in one run of memory) with feedback.

    ``passes`` of refinement follow. ``K`` need not be a multiple of the rounding's block only where that is 1.
    """
    inputs, step = len(weight), rounding.block
    if inputs % step:
        raise ValueError(f"{inputs} columns do not fall into blocks of {step}")
    errors = torch.zeros_like(weight)
    codes: list[torch.Tensor] = []
    upper = found.upper
    width = max(step, COLUMNS // step * step)
    for start in range(0, inputs, width):
        stop = min(inputs, start + width)
        targets = weight[start:stop].clone()
        if upper is not None and start:
            targets.addmm_(upper[:start, start:stop].T, errors[:start])
        for at in range(start, stop, step):
            target = targets[at - start : at - start + step]
            if upper is not None and at > start:
                feedback = upper[start:at, at : at + step]
                if step == 1:
                    target[0].addmv_(errors[start:at].T, feedback[:, 0])
                else:
                    target.addmm_(feedback.T, errors[start:at])
            values, code = rounding(target, at)
            codes.append(code)
            torch.sub(weight[at : at + step], values, out=errors[at : at + step])
    values = weight - errors
    for _ in range(passes if upper is not None else 0):
        _refine(weight, errors, codes, found.hessian, rounding)
        values = weight - errors
    return Rounded(values, torch.cat(codes))


def proxy_loss(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr((W - W^) H (W - W^)^T) / tr(W H W^T)``; both matrices ``(K, N)``."""
    return _trace(weight - values, hessian) / max(_trace(weight, hessian), 1e-30)


def _trace(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    return float(((hessian @ weight) * weight).sum(dtype=torch.float64))


def _refine(
    weight: torch.Tensor, errors: torch.Tensor, codes: list[torch.Tensor], hessian: torch.Tensor, rounding: Rounding
) -> None:
    """One pass of greedy refinement over all blocks of columns; changes ``errors`` and ``codes``."""
    inputs, step = len(weight), rounding.block
    width = max(step, COLUMNS // step * step)
    own = torch.stack([hessian[at : at + step, at : at + step] for at in range(0, inputs, step)])
    inverse = torch.linalg.inv(own.to(torch.float64)).to(weight.dtype)
    moved = torch.empty((width, weight.shape[1]), dtype=weight.dtype, device=weight.device)
    for start in range(0, inputs, width):
        stop = min(inputs, start + width)
        pulls = hessian[start:stop] @ errors
        for at in range(start, stop, step):
            rows, here = slice(at, at + step), slice(at - start, at - start + step)
            pull, before = pulls[here], moved[: at - start]
            # What the columns of this run have moved since the product was taken.
            if step == 1 and at > start:
                pull[0].addmv_(before.T, hessian[at, start:at])
            elif at > start:
                pull.addmm_(hessian[rows, start:at], before)
            # The block's own error is in the pull: H_kk^-1 takes it off again, and W^_k + E_k is W_k.
            target = torch.addmm(weight[rows] - errors[rows], inverse[at // step], pull)
            values, codes[at // step] = rounding(target, at)
            changed = weight[rows] - values
            torch.sub(changed, errors[rows], out=moved[here])
            errors[rows] = changed


def _block_upper(hessian: torch.Tensor, block: int) -> torch.Tensor | None:
    """``U`` with identity blocks on its diagonal, ``H = U D U^T``; None where there is no Cholesky factor."""
    # A Cholesky factor of H with its axes turned round, turned back, is upper triangular.
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) or not bool(lower.diagonal().isfinite().all()):
        return None
    upper = lower.flip(0, 1)
    if block == 1:
        return upper / upper.diagonal()
    count = len(upper)
    starts = range(0, count, block)
    own = torch.stack([upper[at : at + block, at : at + block] for at in starts])
    inverse = torch.linalg.inv(own)
    columns = upper.view(count, count // block, block)
    return torch.einsum("ikb,kbc->ikc", columns, inverse).reshape(count, count)
