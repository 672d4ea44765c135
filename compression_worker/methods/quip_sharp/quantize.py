"""One stack of matrices from weights and Hessian to code words: scale, rotate, round with feedback, refine.

Matrices ``W_i (N_i, K)`` that read one input, each divided by ``s_i = RMS(W_i)`` and stacked, are rotated to ``Wt (N',
K')`` and rounded as ``Wt rho / RMS(Wt)`` by block LDLQ with 8 columns at a time (QuIP#, arXiv 2402.04396, sections 3 to
4 and F.5). ``W_i = scale_i diag(s_out) M diag(s_in)`` with ``M`` the rotated points turned back, in units of the
codebook, and ``scale_i = s_i RMS(Wt) / rho``. Beyond the paper, which has one rho for each number of bits, a stack
takes the one of least loss unless rho is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compression_worker.methods.quip_sharp.codebook import RESIDUAL_SCALE, E8PRounder, planes
from compression_worker.methods.quip_sharp.config import RHO, QuipSharpConfig
from compression_worker.methods.quip_sharp.rotation import WORD, Rotation
from compression_worker.quantization.rounding import Factor, factor, ldlq, proxy_loss
from kernels.e8p_matmul.reference import E8PWeight

SAMPLE_ROWS = 64
"""Rows of a stack on which the width is chosen."""
SHARES = (0.95, 1.03, 1.11, 1.19)
"""Widths that are tried, over the published one."""


class Lattice:
    """The codebook as the solver asks for it: ``WORD`` columns of all rows at once, a code word for each row."""

    block = WORD

    def __init__(self, bits: int, *, joint: bool = False) -> None:
        self._round = E8PRounder(bits, joint=joint)

    def __call__(self, targets: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        values, codes = self._round(targets.T.contiguous())
        return values.T, codes[None]


@dataclass(frozen=True)
class Piece:
    """What became of one matrix of a stack: its loss on the Hessian over that of nothing at all, and squared norms."""

    proxy_loss: float
    error: float
    energy: float


@dataclass(frozen=True)
class Coded:
    """``planes``: ``(N', K'/8)`` each, the first code words and, at 3 and 4 bits, the second. ``scales (pieces,)``.

    ``turned (N, K)`` is ``M``. ``rho`` is the width that was used, ``damping`` what the factor of the Hessian needed,
    ``feedback`` whether there is such a factor.
    """

    planes: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    turned: torch.Tensor
    pieces: tuple[Piece, ...]
    rho: float
    damping: float
    feedback: bool


def quantize(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    rotation: Rotation,
    config: QuipSharpConfig,
    signs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Coded:
    """Code ``weights``, each ``(N_i, K)`` fp32, on ``hessian (K, K)``; all on one device.

    ``signs`` are ``s_in (K,)`` and ``s_out (N,)`` in the place of the rotation's own.
    """
    s_in, s_out = (sign.to(hessian.device) for sign in signs or rotation.signs())
    spreads = torch.stack([weight.square().mean().sqrt() for weight in weights])
    whole = spreads.where(spreads > 0, 1.0)
    stack = torch.cat([weight / spread for weight, spread in zip(weights, whole, strict=True)])
    rotated = rotation.weight(stack, s_in, s_out)
    spread = rotated.square().mean().sqrt()
    spread = spread.where(spread > 0, 1.0)
    found = factor(rotation.hessian(hessian, s_in), WORD, config.damping)
    rounding = Lattice(config.num_bits, joint=config.joint_search)
    rho = config.rho or best_width(rotated / spread, found, config)
    unit = spread / rho
    rounded = ldlq(rotated / unit, found, rounding, passes=config.passes)
    turned = rotation.back(rounded.values.T)
    scales = spreads * unit
    pieces = compared(weights, turned, scales, (s_in, s_out), hessian)
    made = tuple(plane.contiguous().cpu() for plane in planes(rounded.codes.T.contiguous(), config.num_bits))
    return Coded(made, scales.cpu(), turned, pieces, rho, found.damping, found.upper is not None)


def best_width(rotated: torch.Tensor, found: Factor, config: QuipSharpConfig) -> float:
    """rho of least loss on :data:`SAMPLE_ROWS` rows of ``rotated (K', N')``, whose mean square is 1.

    Rows are rounded independently of each other, and rotated ones are alike, so that a few speak for all.
    """
    step = max(1, rotated.shape[1] // SAMPLE_ROWS)
    rows = rotated[:, ::step][:, :SAMPLE_ROWS]
    widths = [round(share * RHO[config.num_bits], 4) for share in SHARES]
    targets = torch.cat([rows * rho for rho in widths], dim=1)
    values = ldlq(targets, found, Lattice(config.num_bits)).values.split(rows.shape[1], dim=1)
    losses = [proxy_loss(rows, one / rho, found.hessian) for rho, one in zip(widths, values, strict=True)]
    return widths[losses.index(min(losses))]


def compared(
    weights: Sequence[torch.Tensor],
    turned: torch.Tensor,
    scales: torch.Tensor,
    signs: tuple[torch.Tensor, torch.Tensor],
    hessian: torch.Tensor,
) -> tuple[Piece, ...]:
    """What became of each of ``weights (N_i, K)``."""
    values = unscaled(turned, *signs).split([len(weight) for weight in weights])
    return tuple(
        _piece(weight, part * scale, hessian) for weight, part, scale in zip(weights, values, scales, strict=True)
    )


def unscaled(turned: torch.Tensor, s_in: torch.Tensor, s_out: torch.Tensor) -> torch.Tensor:
    """``diag(s_out) M diag(s_in)``."""
    return turned * s_in * s_out[:, None]


def code_words(planes: Sequence[torch.Tensor], bits: int) -> E8PWeight:
    """Planes ``(N', K'/8)`` as the product takes them: ``Wt_hat (N', K')`` in units of the codebook."""
    return E8PWeight(planes[0], planes[1] if bits > 2 else None, RESIDUAL_SCALE.get(bits, 1.0))


def _piece(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> Piece:
    loss = proxy_loss(weight.T, values.T, hessian)
    error = float((weight - values).square().sum(dtype=torch.float64))
    return Piece(loss, error, float(weight.square().sum(dtype=torch.float64)))
