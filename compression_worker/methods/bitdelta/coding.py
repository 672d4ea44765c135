"""One matrix of a delta as masks of signs with scales, and a low-rank part: ``D ~ U V + sum_i scale_i * S_i``.

The *scale* of a mask is one number for the matrix (the paper's), for each row (output), column (input), or group of
``group_size`` inputs of a row; the last group may be shorter. Masks are stacked: each codes what the ones before it
left. Scales are least squares: the mean of ``|D|`` over the weights that share one. Where inputs of the layer are
known, weights count by the second moment of their input, and rows are then fitted on the inputs themselves.
``U (N, r)`` and ``V (r, K)`` are the truncated SVD in the same weights, taken before the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from compression_worker.contracts import Json
from kernels.packing import pack_bits, unpack_signs, words_for

OVERSAMPLING, POWER_ITERATIONS = 8, 3
FINE_BYTES = 2
"""Scales that are finer than the matrix are bfloat16, and so are the factors of the low-rank part."""
TENSOR_BYTES = 4
FACTORS = (0.25, 4.0)
"""How far the fit on activations may move scales from those of least squares."""


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How one matrix is coded. ``masks`` 0 leaves the low-rank part alone, or the base as it is."""

    scale: str = "tensor"
    group_size: int = 0
    masks: int = 1
    rank: int = 0

    @property
    def plain(self) -> bool:
        """The published form: one mask, one scale."""
        return self == Coding()

    @property
    def label(self) -> str:
        """For people: ``tensor``, ``group 64``, ``2 masks, row``, ``row, rank 8``, ``dropped``."""
        words = [f"{self.masks} masks"] if self.masks > 1 else []
        if self.masks:
            words.append(f"group {self.group_size}" if self.scale == "group" else self.scale)
        if self.rank:
            words.append(f"rank {self.rank}")
        return ", ".join(words) or "dropped"

    def values(self, outputs: int, inputs: int) -> int:
        """Scales of one mask."""
        groups = -(-inputs // self.group_size) if self.scale == "group" else 0
        return {"tensor": 1, "row": outputs, "column": inputs, "group": outputs * groups}[self.scale]

    def fitting(self, outputs: int, inputs: int) -> Coding:
        """The same with a rank and a group that the matrix has."""
        rank = min(self.rank, outputs, inputs)
        group = min(self.group_size, inputs) if self.scale == "group" else 0
        return Coding(scale=self.scale, group_size=group, masks=self.masks, rank=rank)

    def sizes(self, outputs: int, inputs: int) -> dict[str, int]:
        """Bytes by part of the ledger."""
        width = TENSOR_BYTES if self.plain else FINE_BYTES
        codes = self.masks * 4 * words_for(inputs) * outputs + FINE_BYTES * self.rank * (outputs + inputs)
        return {"codes": codes, "scales": width * self.masks * self.values(outputs, inputs)}

    def to_json(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class Coded:
    """``packed (masks, ceil(K/32), N)`` int32, fp32 ``scales (masks, values)``, bf16 ``left (N, r)``, ``right (r, K)``.

    ``error`` and ``energy`` are ``|D - D_hat|^2`` and ``|D|^2``; ``loss`` is what the error costs, where it was asked.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    error: float
    energy: float
    loss: float


def encode(
    delta: torch.Tensor,
    coding: Coding,
    x: torch.Tensor | None = None,
    cost: Callable[[torch.Tensor], float] | None = None,
) -> Coded:
    """Code ``delta (N, K)`` fp32. ``x (T, K)`` fp32: inputs of the layer, on which scales are then fitted.

    ``cost`` says what an error ``(N, K)`` costs.
    """
    outputs, inputs = delta.shape
    weights = _usable(x.square().mean(dim=0)) if x is not None else None
    left, right = _low_rank(delta, coding.rank, weights)
    target = delta - left.float() @ right.float() if coding.rank else delta
    rest = target.clone()
    packed, scales = [], []
    for _ in range(coding.masks):
        scale = _stored(_fit(rest.abs(), coding, weights), coding)
        bits = rest >= 0
        rest -= torch.where(bits, 1.0, -1.0).mul_(expand(scale, coding, outputs, inputs))
        packed.append(pack_bits(bits))
        scales.append(scale)
    if x is not None and coding.masks:
        factor = _aligned(target, target - rest, x, coding)
        scales = [_stored(_scaled(scale, factor, coding), coding) for scale in scales]
        rest = target - _summed(packed, scales, coding, outputs, inputs)
    loss = cost(rest) if cost else 0.0
    error = float(rest.square_().sum(dtype=torch.float64))
    return Coded(
        packed=torch.stack(packed) if packed else torch.zeros((0, words_for(inputs), outputs), dtype=torch.int32),
        scales=torch.stack(scales) if scales else torch.zeros((0, coding.values(outputs, inputs))),
        left=left,
        right=right,
        error=error,
        energy=float(delta.square().sum(dtype=torch.float64)),
        loss=loss,
    )


def decode(
    packed: torch.Tensor, scales: torch.Tensor, left: torch.Tensor, right: torch.Tensor, coding: Coding, inputs: int
) -> torch.Tensor:
    """``D_hat (N, K)`` in fp32. ``scales (masks, values)`` in any dtype; the factors as stored."""
    outputs = packed.shape[2]
    delta = left.float() @ right.float() if coding.rank else torch.zeros((outputs, inputs))
    for mask, scale in zip(packed, scales, strict=True):
        delta += unpack_signs(mask, inputs).mul_(expand(scale.float(), coding, outputs, inputs))
    return delta


def expand(scale: torch.Tensor, coding: Coding, outputs: int, inputs: int) -> torch.Tensor:
    """The scales of one mask in a shape that broadcasts over ``(N, K)``."""
    if coding.scale == "row":
        return scale.view(outputs, 1)
    if coding.scale == "column":
        return scale.view(1, inputs)
    if coding.scale == "group":
        return scale.view(outputs, -1).repeat_interleave(coding.group_size, dim=1)[:, :inputs]
    return scale.view(1, 1)


def gather(values: torch.Tensor, coding: Coding) -> torch.Tensor:
    """The adjoint of :func:`expand`: sums of ``values (N, K)`` over the weights that share a scale."""
    outputs, inputs = values.shape
    if coding.scale == "row":
        return values.sum(dim=1)
    if coding.scale == "column":
        return values.sum(dim=0)
    if coding.scale == "group":
        short = -inputs % coding.group_size
        padded = torch.nn.functional.pad(values, (0, short)) if short else values
        return padded.view(outputs, -1, coding.group_size).sum(dim=2).view(-1)
    return values.sum().view(1)


def _fit(sizes: torch.Tensor, coding: Coding, weights: torch.Tensor | None) -> torch.Tensor:
    """The least-squares scale of each set of weights that shares one: the (weighted) mean of ``|D|``."""
    whole = torch.ones_like(sizes) if weights is None else weights.expand_as(sizes)
    total = gather(whole, coding).double()
    return (gather(sizes * whole, coding).double() / total.where(total > 0, 1.0)).float()


def _aligned(target: torch.Tensor, masks: torch.Tensor, x: torch.Tensor, coding: Coding) -> torch.Tensor:
    """What the masks are multiplied with, so that outputs on ``x`` are nearest to the target's.

    Signs with the scale of least squares have a smaller product with their delta than the delta itself, and a delta is
    aligned with the inputs that it was trained on; so the layer would move too little. One factor for each row, or one
    for all where rows share scales.
    """
    wanted, moved = x @ target.T, x @ masks.T
    products, squares = (wanted * moved).sum(dim=0).double(), moved.square_().sum(dim=0).double()
    if coding.scale in ("tensor", "column"):
        products, squares = products.sum().view(1), squares.sum().view(1)
    factor = products / squares.where(squares > 0, 1.0)
    return torch.where(squares > 0, factor, 1.0).clamp_(*FACTORS).float()


def _scaled(scale: torch.Tensor, factor: torch.Tensor, coding: Coding) -> torch.Tensor:
    if coding.scale == "group":
        return (scale.view(len(factor), -1) * factor[:, None]).view(-1)
    return scale * factor


def _summed(
    packed: list[torch.Tensor], scales: list[torch.Tensor], coding: Coding, outputs: int, inputs: int
) -> torch.Tensor:
    """All masks with their scales, ``(N, K)``."""
    whole = torch.zeros((outputs, inputs))
    for mask, scale in zip(packed, scales, strict=True):
        whole += unpack_signs(mask, inputs).mul_(expand(scale, coding, outputs, inputs))
    return whole


def _stored(scale: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Rounded as it will be stored, so that the masks after it code what is really left."""
    return scale if coding.plain else scale.to(torch.bfloat16).float()


def _usable(energy: torch.Tensor | None) -> torch.Tensor | None:
    """Weights of the columns; an input that was never seen keeps a thousandth of the mean, so that it is not free."""
    if energy is None:
        return None
    mean = float(energy.mean())
    return energy.clamp(min=mean / 1000) if mean > 0 else None


def _low_rank(delta: torch.Tensor, rank: int, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``U (N, r)``, ``V (r, K)`` in bf16: the truncated SVD of ``D diag(sqrt w)``, taken back to ``D``."""
    outputs, inputs = delta.shape
    if not rank:
        return torch.zeros((outputs, 0), dtype=torch.bfloat16), torch.zeros((0, inputs), dtype=torch.bfloat16)
    root = weights.sqrt() if weights is not None else None
    matrix = delta * root if root is not None else delta
    generator = torch.Generator().manual_seed(rank)
    width = min(rank + OVERSAMPLING, outputs, inputs)
    basis = matrix @ torch.randn((inputs, width), generator=generator)
    for _ in range(POWER_ITERATIONS):
        basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    half = values[:rank].sqrt()
    factors = (basis @ left[:, :rank]) * half, half[:, None] * right[:rank]
    right_back = factors[1] / root if root is not None else factors[1]
    return factors[0].to(torch.bfloat16), right_back.to(torch.bfloat16)
