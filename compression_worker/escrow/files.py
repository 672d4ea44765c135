"""Safetensors files as streams of bytes, without torch: those of a checkpoint, and those that hold codes (U8)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from compression_worker import gate
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json

COPY_BYTES = 1 << 20


class Sink(Protocol):
    """Where written bytes go: a blob of the store, a plain file, or a hash."""

    def write(self, data: bytes | memoryview, /) -> int: ...


class WeightFile:
    """A safetensors file open for reading. ``header`` is its length and JSON, byte for byte; ``spans`` say where each
    tensor begins and ends in the file."""

    def __init__(self, path: Path, *, codes: bool = False) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(self._handle).st_size
            length = gate.header_length(path.name, os.pread(self._handle, 9, 0), size)
            self.header = os.pread(self._handle, 8 + length, 0)
            places = code_places if codes else weight_places
            self.spans = {
                name: (begin + 8 + length, end + 8 + length)
                for name, begin, end in places(path.name, self.header[8:], size - 8 - length)
            }
        except BaseException:
            os.close(self._handle)
            raise

    def read(self, name: str, start: int, count: int) -> memoryview:
        """``count`` bytes of the tensor ``name`` from its byte ``start`` on."""
        begin, end = self.spans[name]
        buffer = memoryview(bytearray(count))
        done = 0
        while done < count and begin + start + count <= end:
            got = os.preadv(self._handle, [buffer[done:]], begin + start + done)
            if not got:
                break
            done += got
        if done < count:
            raise CompressionError("truncated_file", f"the data of '{name}' ends too early: copy the file again")
        return buffer

    def close(self) -> None:
        os.close(self._handle)


class WeightFiles(contextlib.ExitStack):
    """Files of weights or codes, each opened when first asked for."""

    def __init__(self, *, codes: bool = False) -> None:
        super().__init__()
        self._codes = codes
        self._open: dict[Path, WeightFile] = {}

    def at(self, path: Path) -> WeightFile:
        if path not in self._open:
            self._open[path] = WeightFile(path, codes=self._codes)
            self.callback(self._open[path].close)
        return self._open[path]


def tensor_file(files: WeightFiles, checkpoint: Checkpoint, name: str) -> WeightFile:
    """The open file of ``checkpoint`` in which the tensor ``name`` lies."""
    manifest = checkpoint.manifest
    digest = manifest["files"][manifest["tensors"][name]["file"]]["sha256"]
    path = checkpoint.store.path(digest)
    if not path.is_file():
        raise CompressionError("missing_blob", f"the store lacks the weights {digest}: restore or import them first")
    return files.at(path)


@lru_cache(maxsize=64)
def weight_places(file: str, raw: bytes, data_size: int) -> tuple[tuple[str, int, int], ...]:
    """Name, begin and end of each tensor of a gated header, in the order of the file."""
    return tuple((entry.name, entry.begin, entry.end) for entry in gate.parse_header(file, raw, data_size))


def code_places(file: str, raw: bytes, data_size: int) -> Iterator[tuple[str, int, int]]:
    """As :func:`weight_places`, for a file that :func:`write_codes` wrote: one row of bytes a tensor, nothing else."""
    position = 0
    for name, info in gate.parse_json(file, raw, max_objects=gate.MAX_TENSORS + 2).items():
        end = position + (info["shape"][0] if info.get("dtype") == "U8" and len(info.get("shape", ())) == 1 else -1)
        if end < position or info.get("data_offsets") != [position, end]:
            raise CompressionError("unknown_format", f"'{file}' holds {name!r} in a way unknown to this version")
        yield name, position, end
        position = end
    if position != data_size:
        raise CompressionError("truncated_file", f"'{file}' has {data_size:,} bytes of codes, not {position:,}")


def write_codes(sink: Sink, sizes: Mapping[str, int], data: BinaryIO) -> int:
    """Write rows of bytes as a safetensors file, one after the other from ``data``; the bytes of its header."""
    header: Json = {}
    position = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    while chunk := data.read(COPY_BYTES):
        sink.write(chunk)
    return 8 + len(text)
