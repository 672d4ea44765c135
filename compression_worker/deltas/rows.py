"""Embeddings and output head by changed row: a bitmap says which rows of the variant differ from the base's.

A changed row is the base's row plus its coded delta: ``sign`` stores one bit an element and ``scale = mean |d|`` a row;
``int4`` and ``int8`` store whole numbers ``-q .. q`` and a scale a row. Rows that the base does not have (a vocabulary
that grew) are stored as they are; rows that did not change cost one bit each.

A tensor ``name`` of ``V`` rows and width ``H`` of which ``n`` changed lies in ``rows.safetensors`` as
``name#changed`` (uint8, ``ceil(V/8)``, lowest bit first), ``name#codes`` (int32 ``(ceil(H/32), n)`` for signs, see
:mod:`kernels.packing`; uint8 ``(n, ceil(H/2))``, lower half first, or int8 ``(n, H)``), ``name#scales`` (bfloat16
``n``) and ``name#added`` (the variant's dtype).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compression_worker.contracts import CompressionError, Json
from compression_worker.deltas.moments import Moments
from compression_worker.tensors import DTYPES, ITEM_SIZES, Spec, TensorFile, raw_bytes
from kernels.packing import pack_bits, unpack_signs

CODINGS = ("raw", "sign", "int4", "int8")
"""What a person may choose; ``raw`` keeps the tensor as it is."""
TILE_ELEMENTS = 1 << 20
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of a row's largest delta that are tried as the end of the grid; the least squared error is taken."""
SUFFIXES = ("changed", "codes", "scales", "added")


@dataclass(frozen=True)
class CodedRows:
    """A tensor's pieces by suffix, and what coding it lost: squared error and energy of its delta."""

    pieces: dict[str, torch.Tensor]
    changed: int
    error: float
    energy: float


@dataclass(frozen=True)
class _Tile:
    """Some rows of both sides: which changed, their delta, its code, and what the code says the delta is."""

    start: int
    changed: torch.Tensor
    delta: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    decoded: torch.Tensor


def code_rows(coding: str, base: TensorFile, variant: TensorFile, name: str) -> CodedRows:
    """Code the tensor ``name`` of ``variant`` against that of ``base``, some rows at a time.

    Raises :class:`CompressionError` (``not_finite``) where a row's delta is not finite.
    """
    height, shared = variant.entries[name].spec.shape[0], _shared(base, variant, name)
    tiles = [(tile.changed, tile.codes, tile.scales, *_squares(tile)) for tile in _tiles(coding, base, variant, name)]
    changed, codes, scales, errors, energies = zip(*tiles, strict=True)
    flags = torch.cat([*changed, torch.ones(height - shared, dtype=torch.bool)])
    pieces = {
        "changed": torch.from_numpy(np.packbits(flags.numpy(), bitorder="little")),
        "codes": torch.cat(codes, dim=1 if coding == "sign" else 0).contiguous(),
        "scales": torch.cat(scales),
    }
    if height > shared:
        pieces["added"] = variant.tensor(name)[shared:].contiguous()
    return CodedRows(pieces, int(flags[:shared].sum()), sum(errors), sum(energies))


def rows_losses(
    codings: Sequence[str], base: TensorFile, variant: TensorFile, name: str, moments: Sequence[Moments]
) -> list[tuple[int, float]]:
    """Bytes of each coding, and its error under the sum of ``moments`` (embedding, tied head)."""
    found = []
    height, width = variant.entries[name].spec.shape
    added = (height - _shared(base, variant, name)) * width * ITEM_SIZES[variant.entries[name].spec.dtype]
    for coding in codings:
        size, lost = -(-height // 8) + added, 0.0
        for tile in _tiles(coding, base, variant, name):
            size += sum(piece.numel() * piece.element_size() for piece in (tile.codes, tile.scales))
            squares = (tile.delta - tile.decoded).square_()
            for one in moments:
                rows = one.outputs[tile.start : tile.start + len(tile.changed)][tile.changed]
                lost += float((rows.double() * (squares @ one.inputs).double()).sum())
        found.append((size, lost))
    return found


def merged_rows(coding: str, base: TensorFile, variant: TensorFile, name: str) -> torch.Tensor:
    """The whole tensor in fp32 as ``coding`` gives it back."""
    whole = variant.tensor(name).to(torch.float32)
    if coding == "raw":
        return whole
    for tile in _tiles(coding, base, variant, name):
        rows = whole[tile.start : tile.start + len(tile.changed)]
        rows[tile.changed] += tile.decoded - tile.delta
    return whole


def _shared(base: TensorFile, variant: TensorFile, name: str) -> int:
    """Rows that both sides have."""
    return min(file.entries[name].spec.shape[0] for file in (base, variant))


def _tiles(coding: str, base: TensorFile, variant: TensorFile, name: str) -> Iterator[_Tile]:
    width, shared = variant.entries[name].spec.shape[1], _shared(base, variant, name)
    rows = max(1, TILE_ELEMENTS // width)
    pairs = zip(range(0, shared, rows), base.row_tiles(name, rows), variant.row_tiles(name, rows), strict=False)
    for start, ours, theirs in pairs:
        size = min(rows, shared - start)
        delta = theirs[:size].to(torch.float32) - ours[:size].to(torch.float32)
        if not bool(delta.isfinite().all()):
            raise CompressionError("not_finite", f"the delta of '{name}' is not finite: base or variant is damaged")
        changed = (delta != 0).any(dim=1)
        delta = delta[changed]
        codes, scales = _CODERS[coding](delta)
        yield _Tile(start, changed, delta, codes, scales, _decode(coding, codes, scales, width))


def _squares(tile: _Tile) -> tuple[float, float]:
    """Squared error and energy of a tile."""
    lost = (tile.delta - tile.decoded).square_()
    return float(lost.sum(dtype=torch.float64)), float(tile.delta.square().sum(dtype=torch.float64))


def rows_entry(spec: Spec, part: str, coding: str, coded: CodedRows, sha256: str) -> Json:
    """The line of a tensor coded by row in the artifact's table; ``sha256`` is that of its pieces one after another."""
    size = sum(piece.numel() * piece.element_size() for piece in coded.pieces.values())
    return {
        "kind": "rows",
        "file": "rows.safetensors",
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "part": part,
        "coding": coding,
        "changed": coded.changed,
        "bytes": size,
        "sha256": sha256,
    }


def pieces_specs(name: str, coded: CodedRows) -> dict[str, tuple[Spec, list[memoryview]]]:
    """The pieces as tensors of a safetensors file."""
    names = {dtype: known for known, dtype in DTYPES.items()}
    return {
        f"{name}#{suffix}": (Spec(names[piece.dtype], tuple(piece.shape)), [raw_bytes(piece)])
        for suffix, piece in coded.pieces.items()
    }


def pieces_shapes(name: str, spec: Spec, coding: str) -> dict[str, Spec]:
    """The header's lines of a tensor of which every row changed: near enough to foretell a file's size."""
    height, width = spec.shape
    codes = {
        "sign": Spec("I32", (-(-width // 32), height)),
        "int4": Spec("U8", (height, -(-width // 2))),
        "int8": Spec("I8", (height, width)),
    }
    pieces = {"changed": Spec("U8", (-(-height // 8),)), "codes": codes[coding], "scales": Spec("BF16", (height,))}
    return {f"{name}#{suffix}": piece for suffix, piece in pieces.items()}


class RowsReader:
    """Coded rows back to tiles of the merged tensor."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def tiles(self, name: str, entry: Json, base: TensorFile) -> Iterator[torch.Tensor]:
        """fp32 tiles ``base + delta``, in the order of the rows; each row rounds to the variant's dtype later."""
        height, width = entry["shape"]
        pieces = {suffix: self._piece(name, suffix) for suffix in SUFFIXES if self._has(name, suffix)}
        changed = _flags(pieces["changed"], height)
        added = pieces.get("added")
        shared = height - (len(added) if added is not None else 0)
        _require_fit(name, entry, changed[:shared], pieces, base)
        rows, at = max(1, TILE_ELEMENTS // width), 0
        for start, tile in zip(range(0, shared, rows), base.row_tiles(name, rows), strict=False):
            size = min(len(tile), shared - start)
            merged = tile[:size].to(torch.float32)
            where = changed[start : start + size]
            count = int(where.sum())
            codes = pieces["codes"]
            part = codes[:, at : at + count] if entry["coding"] == "sign" else codes[at : at + count]
            merged[where] += _decode(entry["coding"], part, pieces["scales"][at : at + count], width)
            at += count
            yield merged
        if added is not None:
            yield added.to(torch.float32)

    def _has(self, name: str, suffix: str) -> bool:
        return f"{name}#{suffix}" in self._file.entries

    def _piece(self, name: str, suffix: str) -> torch.Tensor:
        return self._file.tensor(f"{name}#{suffix}")


def _require_fit(
    name: str, entry: Json, changed: torch.Tensor, pieces: dict[str, torch.Tensor], base: TensorFile
) -> None:
    height, width = base.entries[name].spec.shape
    if width != entry["shape"][1] or height < len(changed):
        raise CompressionError("base_mismatch", f"'{name}' has another shape in the base than in the artifact")
    count = int(changed.sum())
    shapes = {"sign": (-(-width // 32), count), "int4": (count, -(-width // 2)), "int8": (count, width)}
    if tuple(pieces["codes"].shape) != shapes[entry["coding"]] or len(pieces["scales"]) != count:
        raise CompressionError("damaged_artifact", f"the coded rows of '{name}' do not fit its shape")


def _flags(packed: torch.Tensor, height: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=height, bitorder="little").view(np.bool_))


def _signs(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pack_bits(delta >= 0), _mean_size(delta).to(torch.bfloat16)


def _mean_size(delta: torch.Tensor) -> torch.Tensor:
    return delta.abs().mean(dim=1) if delta.numel() else torch.zeros(len(delta))


def _grid(delta: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers of at most ``most`` either way, and the scale of each row (already rounded to bfloat16)."""
    largest = delta.abs().amax(dim=1) if delta.numel() else torch.zeros(len(delta))
    best = torch.full((len(delta),), torch.inf)
    numbers, scales = torch.zeros_like(delta), torch.zeros_like(largest)
    for clip in CLIPS if most < 100 else CLIPS[:1]:
        scale = (largest * (clip / most)).to(torch.bfloat16).to(torch.float32)
        tried = (delta / scale.where(scale > 0, 1.0)[:, None]).round_().clamp_(-most, most)
        error = (tried * scale[:, None] - delta).square_().sum(dim=1)
        better = error < best
        best = best.where(~better, error)
        numbers[better], scales[better] = tried[better], scale[better]
    return numbers, scales


def _int4(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numbers, scales = _grid(delta, 7)
    halves = (numbers.to(torch.int16) + 8).to(torch.uint8)
    if halves.shape[1] % 2:
        halves = torch.nn.functional.pad(halves, (0, 1), value=8)
    return (halves[:, 0::2] | (halves[:, 1::2] << 4)).contiguous(), scales.to(torch.bfloat16)


def _int8(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    numbers, scales = _grid(delta, 127)
    return numbers.to(torch.int8), scales.to(torch.bfloat16)


_CODERS = {"sign": _signs, "int4": _int4, "int8": _int8}


def _decode(coding: str, codes: torch.Tensor, scales: torch.Tensor, width: int) -> torch.Tensor:
    """Delta rows ``(n, width)`` in fp32."""
    factor = scales.to(torch.float32)[:, None]
    if coding == "sign":
        return unpack_signs(codes, width).mul_(factor)
    if coding == "int8":
        return codes.to(torch.float32).mul_(factor)
    low, high = (codes & 15).to(torch.float32), (codes >> 4).to(torch.float32)
    return torch.stack((low, high), dim=2).view(len(codes), -1)[:, :width].sub_(8).mul_(factor)
