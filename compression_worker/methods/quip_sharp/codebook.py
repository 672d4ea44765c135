"""Rounding 8 weights at a time to 2, 3 or 4 bits each: E8P, and residual stages on top of it.

``x_hat = q1 + q2 / r``: q1 the nearest point of E8P (2 bits, nothing more), ``q2 = Q2((x - q1) r)`` with Q2 the nearest
of 256 points of E8 (3 bits) or of E8P again (4 bits). Both stages are greedy. With ``joint`` the first stage of 4 bits
offers its 16 best candidates and the pair with the least error wins, at twenty times the cost. Inputs are weights
divided by ``RMS(W) / rho``: rho is how wide a Gaussian suits the codebook. At 2 bits 1.03 suits it best, and 0.9 works
better under error feedback, which widens what is rounded. QuIP#, arXiv 2402.04396, sections 4.2, 4.3 and F.5.
"""

from __future__ import annotations

from functools import cache

import torch

from compression_worker.making.threads import one_thread_per_operation
from compression_worker.methods.quip_sharp.kinds import bits_of_signs, ternary, words_by_number
from compression_worker.methods.quip_sharp.nearest import nearest
from kernels.e8p_matmul.codebook import decode, decode_second_stage, second_stage

RHO = {2: 0.9, 3: 0.98, 4: 1.03}
"""Width of the inputs by bits a weight."""
RESIDUAL_SCALE = {3: 2.04, 4: 3.45}
"""r of the second stage by bits a weight."""
CANDIDATES = 16
"""First-stage points that the joint search tries."""
TILE = 1024
"""Vectors whose 256 scores are made together."""


class E8PRounder:
    """Rounds targets to the codebook of ``bits`` a weight; what a solver with error feedback calls for each block."""

    def __init__(self, bits: int, *, joint: bool = False) -> None:
        if bits not in RHO:
            raise ValueError(f"the codebooks have 2, 3 and 4 bits a weight, not {bits}")
        if joint and bits != 4:
            raise ValueError(f"the joint search is for 4 bits a weight, not {bits}")
        self.bits = bits
        self.joint = joint

    def __call__(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``targets (..., 8)`` float32, in units of the codebook -> rounded values ``(..., 8)``, and codes ``(...)``
        int32: the first stage in the low 16 bits, the second above them. Raises ``ValueError`` where not finite."""
        x = targets.reshape(-1, 8)
        codes, points = nearest(x)
        if self.joint:
            codes = _best_first_stage(x, codes, points)
            points = decode(codes)
        if self.bits > 2:
            second, residual = second_nearest((x - points).mul_(RESIDUAL_SCALE[self.bits]), self.bits)
            codes |= second << 16
            points += residual.div_(RESIDUAL_SCALE[self.bits])
        return points.reshape(targets.shape), codes.reshape(targets.shape[:-1])


def planes(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Codes of :class:`E8PRounder`, of any shape -> what is stored: the first stage as int16, and with it at 3 bits the
    second as uint8, at 4 bits as int16. Code words above 32767 are negative there."""
    first = codes.to(torch.int16)
    if bits == 2:
        return (first,)
    second = codes >> 16
    return first, second.to(torch.uint8 if bits == 3 else torch.int16)


def second_nearest(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x (n, 8)`` float32 -> codes ``(n,)`` int32 and points ``(n, 8)`` of the second stage of ``bits`` a weight."""
    if bits == 4:
        return nearest(x)
    codes = torch.empty(len(x), dtype=torch.int32, device=x.device)
    with one_thread_per_operation():
        for start in range(0, len(x), TILE):
            codes[start : start + TILE] = _of_256(x[start : start + TILE])
    return codes, decode_second_stage(codes)


def _of_256(x: torch.Tensor) -> torch.Tensor:
    """The lowest code of the second stage's points with the largest ``p . x - |p|^2 / 2``."""
    offset, points = _scoring(x.device)
    scores = torch.addmm(offset, x, points)
    # On a CPU by numpy, which looks at eight at a time.
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)


@cache
def _scoring(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Minus half the squared norm of each point ``(256,)``, and the points ``(8, 256)``."""
    points = second_stage().to(device)
    return -points.square().sum(1) / 2, points.T.contiguous()


def _best_first_stage(x: torch.Tensor, codes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The first stage that leaves the least error after the second, of the points near x; the earliest of equals."""
    return torch.cat(
        [_best_of_tile(*part) for part in zip(x.split(TILE), codes.split(TILE), points.split(TILE), strict=True)]
        or [codes]
    )


def _best_of_tile(x: torch.Tensor, codes: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """All points lie in one coset of E8, so neighbours of the nearest are a short vector away: itself, and 240 more."""
    steps = _short_vectors(x.device)
    closeness = torch.addmm(-steps.square().sum(1) / 2, x - points, steps.T)
    closest = closeness.topk(2 * CANDIDATES, dim=1).indices
    near = points[:, None] + steps[closest]
    words = code_words(near)
    # Stable: those in the codebook first, the closest of them first.
    order = (words < 0).to(torch.int8).argsort(dim=1, stable=True)[:, :CANDIDATES]
    words = words.gather(1, order)
    words = torch.where(words < 0, codes[:, None], words)
    near = decode(words)
    residual = (x[:, None] - near).mul_(RESIDUAL_SCALE[4])
    _, second = nearest(residual.view(-1, 8))
    error = (residual - second.view_as(residual)).square_().sum(2)
    return words.gather(1, error.argmin(1, keepdim=True))[:, 0]


@cache
def _short_vectors(device: torch.device) -> torch.Tensor:
    """``(241, 8)``: zero and the 240 vectors of E8 of squared norm 2."""
    points = second_stage()
    return points[points.square().sum(1) <= 2].to(device)


def code_words(points: torch.Tensor) -> torch.Tensor:
    """Points of E8 + 1/4 ``(..., 8)`` -> their code words ``(...)`` int32, -1 for those outside the codebook."""
    words, ternary, places = _words(points.device)
    shift = (4 * points[..., 0]).to(torch.int32) % 4 == 1
    half = points - torch.where(shift, -0.25, 0.25)[..., None]
    level = half.abs() - 0.5
    number = (level.clamp(max=2.0) @ ternary).to(torch.int64)
    signs = ((half < 0).to(torch.float32) @ places).to(torch.int32)
    word = words[number]
    return torch.where((word < 0) | (level.amax(-1) > 2), -1, word ^ signs ^ shift)


@cache
def _words(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Code words by the number of a pattern, and what makes that number and the sign bits."""
    return words_by_number().to(device), ternary().to(device), bits_of_signs().to(device)
