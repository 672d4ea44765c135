"""One matrix of a delta by DeltaDQ: group-wise dropout, then separate quantization of what survived.

``D (N, K)``: of each group of ``group_size`` inputs of a row exactly one weight in ``alpha`` survives and is multiplied
by ``alpha`` (:mod:`kernels.group_mask` says which; a short last group keeps ``ceil(size / alpha)``). Survivors are
quantized uniformly over the matrix: ``s = (max - min) / (2^k - 1)``, ``z = -round(min / s)``,
``q = clip(round(w / s) + z, 0, 2^k - 1)``, ``w_hat = s (q - z)``.

Separate quantization splits codes by value into ``m`` parts: part ``j`` holds ``j 2^k / m <= q < (j + 1) 2^k / m`` and
stores ``q - j 2^k / m``. The split loses nothing and saves nothing, because membership has to be stored: here codes lie
in scan order with their ``k`` bits, entropy-coded where that pays, and the seed gives the positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import zstandard

from compression_worker.contracts import CompressionError
from compression_worker.making.threads import ahead
from compression_worker.methods.deltadq.config import UNQUANTIZED
from kernels.group_mask.reference import keep_factors, keep_positions, kept_per_row
from kernels.packing import pack_codes, unpack_codes

TILE_ELEMENTS = 1 << 20
LEVEL = 9
"""Of zstandard. Codes have no repeats to find, so its entropy coder is what counts."""


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Which weights of a matrix survive: everything that the mask is made from again."""

    seed: int
    tensor: int
    alpha: int
    group_size: int

    def kept(self, inputs: int) -> int:
        """Survivors of a row."""
        return kept_per_row(inputs, self.group_size, self.alpha)

    def positions(self, rows: range, inputs: int) -> torch.Tensor:
        """Their columns, int64 ``(rows, kept)``, ascending."""
        return torch.from_numpy(keep_positions(self.seed, self.tensor, rows, inputs, self.group_size, self.alpha))

    def kept_of(self, delta: torch.Tensor) -> torch.Tensor:
        """What survives of ``delta (N, K)``, as it is, ``(N, kept)``."""
        tiles = row_tiles(*delta.shape)
        return torch.cat(
            [delta[rows.start : rows.stop].gather(1, self.positions(rows, delta.shape[1])) for rows in tiles]
        )


@dataclass(frozen=True)
class Grid:
    """The uniform grid of a matrix: ``w_hat = scale (q - zero)``."""

    scale: float
    zero: float


@dataclass(frozen=True)
class Survivors:
    """Codes (uint8 ``(N, kept)``) on their grid, or values (bf16 ``(N, kept)``) where nothing is quantized."""

    codes: torch.Tensor
    grid: Grid

    def values(self) -> torch.Tensor:
        """What the survivors stand for, fp32 ``(N, kept)``."""
        if self.codes.dtype == torch.bfloat16:
            return self.codes.to(torch.float32)
        return self.codes.to(torch.float32).sub_(self.grid.zero).mul_(self.grid.scale)


def row_tiles(outputs: int, inputs: int) -> Iterator[range]:
    """The rows of a matrix, some at a time."""
    step = max(1, TILE_ELEMENTS // inputs)
    return (range(start, min(start + step, outputs)) for start in range(0, outputs, step))


def survivors(delta: torch.Tensor, dropout: Dropout, bits: int) -> Survivors:
    """Drop and quantize ``delta (N, K)`` fp32."""
    return coded(delta, dropout, bits)[0]


def coded(delta: torch.Tensor, dropout: Dropout, bits: int) -> tuple[Survivors, float]:
    """Drop and quantize ``delta (N, K)`` fp32; and what that changes in squares, ``|D - D_hat|^2 - |D|^2``.

    Only survivors count there: ``sum (d - d_hat)^2 - d^2``.
    """
    kept = dropout.kept_of(delta)
    factors = torch.from_numpy(keep_factors(delta.shape[1], dropout.group_size, dropout.alpha))
    made = quantize(kept * factors, bits)
    return made, squares(kept - made.values()) - squares(kept)


def squares(values: torch.Tensor) -> float:
    """Their sum."""
    return float(values.square().sum(dtype=torch.float64))


def quantize(values: torch.Tensor, bits: int) -> Survivors:
    """``values`` fp32 on a uniform grid of ``2^bits`` steps over their range."""
    if bits == UNQUANTIZED:
        return Survivors(values.to(torch.bfloat16), Grid(1.0, 0.0))
    low, high = (float(end) for end in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
    most = (1 << bits) - 1
    scale = float(np.float32((high - low) / most))
    if scale == 0.0:
        # All alike: the grid has one point, and code 1 stands for it (0 where the delta is zero).
        return Survivors(
            torch.full_like(values, float(high != 0), dtype=torch.uint8), Grid(float(np.float32(high)), 0.0)
        )
    zero = -round(low / scale)
    return Survivors((values / scale).round_().add_(zero).clamp_(0, most).to(torch.uint8), Grid(scale, float(zero)))


def separate(codes: torch.Tensor, bits: int, parts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each part the places of its codes (in scan order) and the codes within the part, as the paper stores them."""
    width = (1 << bits) // parts
    flat = codes.reshape(-1)
    member = flat // width
    places = [(member == part).nonzero().view(-1) for part in range(parts)]
    return [(at, flat[at] - part * width) for part, at in enumerate(places)]


def joined(parts: list[tuple[torch.Tensor, torch.Tensor]], bits: int, count: int) -> torch.Tensor:
    """The codes again from their parts."""
    width = (1 << bits) // len(parts)
    codes = torch.zeros(count, dtype=torch.uint8)
    for part, (at, within) in enumerate(parts):
        codes[at] = within + part * width
    return codes


def stored(made: Survivors, bits: int) -> tuple[str, bytes]:
    """The bytes of the survivors and how they are coded: ``plain``, or ``zstd`` where that is smaller."""
    if made.codes.dtype == torch.bfloat16:
        return "plain", made.codes.contiguous().view(torch.uint8).numpy().tobytes()
    flat = made.codes.reshape(-1)
    plain = pack_codes(flat, bits).numpy().tobytes()
    # A code that straddles bytes hides its entropy from a coder of bytes: 3 bits are packed as two codes a byte here.
    pair = pack_codes(flat, 4).numpy().tobytes() if bits in (3, 4) else flat.numpy().tobytes() if bits > 4 else plain
    coded = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(pair)
    return ("zstd", coded) if len(coded) < len(plain) else ("plain", plain)


def loaded(data: bytes, coding: str, bits: int, outputs: int, kept: int) -> torch.Tensor:
    """The codes or values of :func:`stored`, ``(N, kept)``. Raises ``damaged_artifact`` where they do not fit."""
    count = outputs * kept
    try:
        if bits == UNQUANTIZED:
            return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(outputs, kept)
        if coding == "plain":
            return unpack_codes(torch.frombuffer(bytearray(data), dtype=torch.uint8), count, bits).view(outputs, kept)
        width = 4 if bits in (3, 4) else 8 if bits > 4 else bits
        size = -(-count * width // 8)
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        return unpack_codes(torch.frombuffer(bytearray(raw), dtype=torch.uint8), count, width).view(outputs, kept)
    except (ValueError, RuntimeError, zstandard.ZstdError) as error:
        raise CompressionError("damaged_artifact", f"the codes of a matrix cannot be read: {error}") from error


def delta_tiles(codes: torch.Tensor, grid: Grid, dropout: Dropout, inputs: int) -> Iterator[torch.Tensor]:
    """``D_hat`` in fp32, some rows at a time, from the first to the last."""
    return ahead(partial(delta_rows, codes, grid, dropout, inputs), row_tiles(len(codes), inputs))


def delta_rows(codes: torch.Tensor, grid: Grid, dropout: Dropout, inputs: int, rows: range) -> torch.Tensor:
    """Some rows of ``D_hat`` in fp32."""
    values = Survivors(codes[rows.start : rows.stop], grid).values()
    return torch.zeros((len(rows), inputs)).scatter_(1, dropout.positions(rows, inputs), values)
