"""Weights as entropy-coded differences of bit patterns: one chunk in, its code out, and back without a lost bit.

Bit patterns of one dtype, read as integers in the order of the numbers that they stand for (every pattern has its
place: NaN payloads, infinities, both zeros), differ by the number of steps between two floats. A fine-tune moves a
weight by about the same *amount* wherever it is, so by few steps where the base's exponent is high and by many where it
is low. The difference is folded (magnitude above, sign in the lowest bit), cut into byte planes, and each plane is
coded by the frequencies of its bytes among the weights whose base has one exponent.

The coder is the ANS coder of the library ``constriction``; the tables of frequencies are packed with zlib. Layout of a
code, integers little-endian::

    u32 bytes of packed tables | u32 bytes of coded words | u32 plain bytes | the three of them

A table is ``u8 highest byte | u16 frequency of each byte up to it``, for each plane from the highest down and in it for
each exponent that occurs, in ascending order. A highest byte 0 of frequency 0 stands for bytes that are kept plain.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import constriction
import numpy as np
import numpy.typing as npt

from compression_worker.contracts import CompressionError

CHUNK_ELEMENTS: Final = 1 << 19
"""Weights coded at once. What a step holds is a small multiple of this, whatever the size of a tensor."""
HEADER: Final = struct.Struct("<III")
MOST_FREQUENT: Final = 4095
FEW: Final = 40
WORTH: Final = 0.98
"""Bytes are kept plain unless coding takes 2 % off them: the mantissas of weights without a base are almost noise."""
PLAIN: Final = np.zeros(1, np.uint16)
"""The table of bytes that are kept as they are: no coding makes them smaller."""

Patterns = npt.NDArray[np.unsignedinteger[Any]]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How a float of one dtype is made: its pattern's integer type, and where its exponent lies."""

    unsigned: Any
    signed: Any
    mantissa_bits: int
    exponent_mask: int

    @property
    def width(self) -> int:
        """Bytes of a pattern: as many planes."""
        return int(np.dtype(self.unsigned).itemsize)

    @property
    def top(self) -> int:
        """The pattern whose only bit is the sign."""
        return 1 << (8 * self.width - 1)


LAYOUTS: Final = {
    "BF16": Layout(np.uint16, np.int16, 7, 0xFF),
    "F16": Layout(np.uint16, np.int16, 10, 0x1F),
    "F32": Layout(np.uint32, np.int32, 23, 0xFF),
}


def patterns(data: bytes | bytearray | memoryview, dtype: str) -> Patterns:
    """The bytes of weights as bit patterns."""
    found: Patterns = np.frombuffer(data, LAYOUTS[dtype].unsigned)
    return found


def encode(variant: Patterns, base: Patterns | None, dtype: str) -> bytes:
    """The code of a chunk; without ``base`` the patterns themselves are coded, plane by plane."""
    layout = LAYOUTS[dtype]
    values, counts = variant, [variant.size]
    if base is not None:
        order, counts = by_exponent(base, layout)
        values = folded(variant, base, layout)[order]
    runs = [run for plane in _planes(values, layout) for run in _cut(plane, counts)]
    tables = [_table(run) for run in runs]
    coder = constriction.stream.stack.AnsCoder()
    for run, table in zip(reversed(runs), reversed(tables), strict=True):  # what is coded last is decoded first
        if _is_coded(table):
            coder.encode_reverse(run.astype(np.int32), _model(table))
    packed = zlib.compress(b"".join(_written(table) for table in tables), 6)
    words = coder.get_compressed().astype("<u4").tobytes()
    plain = b"".join(run.tobytes() for run, table in zip(runs, tables, strict=True) if _is_plain(table))
    return HEADER.pack(len(packed), len(words), len(plain)) + packed + words + plain


def decode(code: memoryview, count: int, base: Patterns | None, dtype: str) -> Patterns:
    """The ``count`` patterns of a chunk. Raises :class:`CompressionError` (``damaged_escrow``) for what is no code.

    Damage inside a code can go unseen here: a caller compares the digest of what comes out.
    """
    try:
        return _decode(code, count, base, LAYOUTS[dtype])
    except (ValueError, IndexError, struct.error, zlib.error, AssertionError) as error:
        raise CompressionError("damaged_escrow", f"a chunk of {count:,} weights cannot be decoded: {error}") from error


def code_length(header: memoryview) -> int:
    """How many bytes follow the header of a code."""
    return sum(HEADER.unpack(header))


def _decode(code: memoryview, count: int, base: Patterns | None, layout: Layout) -> Patterns:
    sizes = HEADER.unpack(code[: HEADER.size])
    ends = [HEADER.size + sum(sizes[: at + 1]) for at in range(3)]
    order, counts = (None, [count]) if base is None else by_exponent(base, layout)
    tables = _read(zlib.decompress(code[HEADER.size : ends[0]]), layout.width * len(counts))
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(code[ends[0] : ends[1]], "<u4").astype(np.uint32))
    plain = np.frombuffer(code[ends[1] : ends[2]], np.uint8)
    values = np.zeros(count, layout.unsigned)
    for plane in reversed(range(layout.width)):
        start = 0
        for size in counts:
            table = next(tables)
            if _is_plain(table):
                run, plain = plain[:size], plain[size:]
            elif _is_coded(table):
                run = coder.decode(_model(table), size)
            else:
                run = np.full(size, table.size - 1)
            values[start : start + size] |= run.astype(layout.unsigned) << layout.unsigned(8 * plane)
            start += size
    if order is None or base is None:
        return values
    differences = np.empty_like(values)
    differences[order] = values
    return unfolded(differences, base, layout)


def by_exponent(base: Patterns, layout: Layout) -> tuple[npt.NDArray[np.intp], list[int]]:
    """The order that brings weights of one exponent together, and how many have each exponent that occurs."""
    exponents = ((base >> layout.unsigned(layout.mantissa_bits)) & layout.unsigned(layout.exponent_mask)).astype(
        np.uint8
    )
    counts = np.bincount(exponents)
    found = np.flatnonzero(counts)
    if found.size > FEW:
        return np.argsort(exponents, kind="stable"), counts[found].tolist()
    # The same order: of some twenty exponents, as weights have them, in half the time of a sort.
    return np.concatenate([np.flatnonzero(exponents == one) for one in found]), counts[found].tolist()


def _ordered(values: Patterns, layout: Layout) -> Patterns:
    """Integers in the order of the floats: negative ones are turned round below the others."""
    negative = (values.view(layout.signed) >> (8 * layout.width - 1)).view(layout.unsigned)
    ordered: Patterns = values ^ (negative | layout.unsigned(layout.top))
    return ordered


def _unordered(values: Patterns, layout: Layout) -> Patterns:
    negative = ~(values.view(layout.signed) >> (8 * layout.width - 1)).view(layout.unsigned)
    patterns: Patterns = values ^ (negative | layout.unsigned(layout.top))
    return patterns


def folded(variant: Patterns, base: Patterns, layout: Layout) -> Patterns:
    """The difference round the circle of all integers of this width: magnitude above, sign in the lowest bit.

    The one magnitude that has no room beside a sign falls on 1, which nothing else needs: there is no minus zero.
    """
    difference = (_ordered(variant, layout) - _ordered(base, layout)).view(layout.signed)
    magnitude = np.abs(difference).view(layout.unsigned)
    found: Patterns = (magnitude << layout.unsigned(1)) | (difference < 0)
    return found


def unfolded(values: Patterns, base: Patterns, layout: Layout) -> Patterns:
    """What :func:`folded` was made of."""
    magnitude = values >> layout.unsigned(1)
    difference = np.where(values & layout.unsigned(1), ~magnitude + layout.unsigned(1), magnitude)
    difference[values == 1] = layout.top
    return _unordered(_ordered(base, layout) + difference, layout)


def _planes(values: Patterns, layout: Layout) -> Iterator[Bytes]:
    """The bytes of each significance, the highest first."""
    for plane in reversed(range(layout.width)):
        yield (values >> layout.unsigned(8 * plane)).astype(np.uint8)


def _cut(plane: Bytes, counts: list[int]) -> list[Bytes]:
    return np.split(plane, np.cumsum(counts)[:-1])


def _table(run: Bytes) -> npt.NDArray[np.uint16]:
    """How often each byte occurs, the most frequent as :data:`MOST_FREQUENT`; :data:`PLAIN` where it gains nothing."""
    counts = np.bincount(run)
    found = counts[counts > 0]
    if found.size > 1:
        bits = float((found * np.log2(run.size / found)).sum())
        if bits / 8 + found.size >= WORTH * run.size:
            return PLAIN
    return (-(-counts * MOST_FREQUENT // counts.max())).astype(np.uint16)


def _is_plain(table: npt.NDArray[np.uint16]) -> bool:
    return table.size == 1 and not table[0]


def _is_coded(table: npt.NDArray[np.uint16]) -> bool:
    """Whether it takes more than the table to know the bytes."""
    return int(np.count_nonzero(table)) > 1


def _model(table: npt.NDArray[np.uint16]) -> Any:
    """Whole numbers below 2^24 are exact in float32, so that every machine makes the same model of them."""
    return constriction.stream.model.Categorical(table.astype(np.float32), perfect=False)


def _written(table: npt.NDArray[np.uint16]) -> bytes:
    return bytes([table.size - 1]) + table.astype("<u2").tobytes()


def _read(raw: bytes, count: int) -> Iterator[npt.NDArray[np.uint16]]:
    at = 0
    for _ in range(count):
        size = raw[at] + 1
        table = np.frombuffer(raw, "<u2", size, at + 1).astype(np.uint16)
        if not table[-1] and size > 1:
            raise ValueError("a table of frequencies has an end that never occurs")
        at += 1 + 2 * size
        yield table
    if at != len(raw):
        raise ValueError("there are more tables than runs")
