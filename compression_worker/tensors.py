"""Safetensors files as streams: read rows into a buffer that is used again, write tensor by tensor.

The safetensors library maps a file into memory, and every page touched counts as the process's own; here a file of any
size is read and written through buffers of a few megabytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch

from compression_worker import gate
from compression_worker.contracts import CompressionError, Json

if TYPE_CHECKING:
    from compression_worker.checkpoints import Checkpoint

CHUNK = 1 << 20
DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ITEM_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class Sink(Protocol):
    """Where a written file goes: a blob of the store or a plain file."""

    def write(self, data: bytes | memoryview, /) -> int: ...


@dataclass(frozen=True)
class Spec:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes begin, counted from the end of the header."""

    spec: Spec
    begin: int


class TensorFile:
    """A safetensors file open for reading; ``entries`` knows its tensors by name. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._start, self.entries = self._read_header(path)
        except BaseException:
            os.close(self._handle)
            raise

    def _read_header(self, path: Path) -> tuple[int, dict[str, Entry]]:
        facts = os.fstat(self._handle)
        length = gate.header_length(path.name, os.pread(self._handle, 9, 0), facts.st_size)
        raw = os.pread(self._handle, length, 8)
        return 8 + length, parse_header(path.name, raw, facts.st_size - 8 - length)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def read_into(self, name: str, buffer: memoryview, position: int = 0) -> None:
        """Fill ``buffer`` with the tensor's bytes from ``position`` on."""
        offset, done = self._start + self.entries[name].begin + position, 0
        while done < len(buffer):
            count = os.preadv(self._handle, [buffer[done:]], offset + done)
            if not count:
                raise CompressionError("truncated_file", f"the file ends inside tensor '{name}': copy it again")
            done += count

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, a buffer at a time; each is valid until the next is asked for."""
        size = self.entries[name].spec.size
        buffer = memoryview(bytearray(min(CHUNK, size)))
        for position in range(0, size, CHUNK):
            chunk = buffer[: min(CHUNK, size - position)]
            self.read_into(name, chunk, position)
            yield chunk

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor in memory of its own."""
        spec = self.entries[name].spec
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        if spec.size:
            self.read_into(name, raw_bytes(tensor))
        return tensor

    def rows(self, name: str, rows: range) -> torch.Tensor:
        """Some rows of a matrix, in memory of their own."""
        spec = self.entries[name].spec
        tile = torch.empty((len(rows), *spec.shape[1:]), dtype=DTYPES[spec.dtype])
        if tile.numel():
            self.read_into(name, raw_bytes(tile), rows.start * (spec.size // spec.shape[0]))
        return tile

    def row_tiles(self, name: str, rows: int, memory: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """A matrix, ``rows`` rows at a time, in a buffer used again for each (in ``memory``, uint8, if enough)."""
        spec = self.entries[name].spec
        height, width = spec.shape
        shape, dtype = (min(rows, height), width), DTYPES[spec.dtype]
        needed = shape[0] * width * dtype.itemsize
        if memory is None or memory.numel() < needed:
            memory = torch.empty(needed, dtype=torch.uint8)
        buffer = memory[:needed].view(dtype).view(shape)
        for start in range(0, height, rows):
            tile = buffer[: min(rows, height - start)]
            self.read_into(name, raw_bytes(tile), start * width * buffer.element_size())
            yield tile


class TensorFiles:
    """Tensors spread over several files, opened when first asked for. ``where`` maps a tensor to its path."""

    def __init__(self, where: Mapping[str, Path]) -> None:
        self._where = where
        self._stack = contextlib.ExitStack()
        self._open: dict[Path, TensorFile] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    def file(self, name: str) -> TensorFile:
        """The open file that holds tensor ``name``."""
        path = self._where[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(TensorFile(path))
        return self._open[path]

    def spec(self, name: str) -> Spec:
        return self.file(name).entries[name].spec


def checkpoint_files(checkpoint: Checkpoint) -> TensorFiles:
    """The tensors of a checkpoint in the store."""
    manifest, store = checkpoint.manifest, checkpoint.store
    paths = {file: store.path(entry["sha256"]) for file, entry in manifest["files"].items()}
    return TensorFiles({name: paths[tensor["file"]] for name, tensor in manifest["tensors"].items()})


@lru_cache(maxsize=64)
def parse_header(file: str, raw: bytes, data_size: int) -> dict[str, Entry]:
    """The tensors that a header names, in dtypes of ours; they cover ``data_size`` bytes without a hole.

    Remembered by its bytes: each step of a job opens the same files again. Callers do not change the result.
    """
    header = gate.parse_json(file, raw, max_objects=gate.MAX_TENSORS + 2)
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, info) for name, info in header.items()}
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.spec.size)):
        if entry.begin != position:
            raise CompressionError("bad_header", f"the tensors of '{file}' overlap or leave a hole")
        position += entry.spec.size
    if position != data_size:
        raise CompressionError("truncated_file", f"'{file}' has {data_size:,} bytes of data, not {position:,}")
    return entries


def _entry(file: str, name: str, info: object) -> Entry:
    try:
        spec = Spec(info["dtype"], tuple(info["shape"]))  # type: ignore[index]
        begin, end = info["data_offsets"]  # type: ignore[index]
        fits = end - begin == spec.size and all(type(size) is int and size >= 0 for size in (*spec.shape, begin))
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise CompressionError("bad_header", f"the header of '{file}' is wrong about tensor {name!r}")
    return Entry(spec, begin)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def whole(tensor: torch.Tensor) -> tuple[Spec, list[memoryview]]:
    """A tensor in memory as :func:`write_file` takes it."""
    own = tensor.detach().cpu().contiguous()
    return Spec(_NAMES[own.dtype], tuple(own.shape)), [raw_bytes(own)]


def header_bytes(tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON header of a file that holds ``tensors`` in this order, padded to eight bytes."""
    header: Json = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, spec in tensors.items():
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.size],
        }
        position += spec.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(
    sink: Sink,
    tensors: Mapping[str, tuple[Spec, Iterable[memoryview]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file; the data of a tensor is asked for when its turn comes, and may be made then."""
    sink.write(header_bytes({name: spec for name, (spec, _) in tensors.items()}, metadata))
    for name, (spec, data) in tensors.items():
        written = sum(sink.write(chunk) for chunk in data)
        if written != spec.size:
            raise ValueError(f"tensor {name} has {written} bytes, not the {spec.size} its header says")
