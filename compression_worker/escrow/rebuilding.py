"""From an escrow and its base back to the files of the checkpoint, chunk by chunk; nothing passes but what was stored.

Every tensor and every file is hashed on the way and compared with the digest that the checkpoint's manifest gives. What
is held: one chunk of a tensor with its base and their scratch, some twenty times the bytes of a chunk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from compression_worker.artifact import NewFolder
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json
from compression_worker.escrow import coding, layout
from compression_worker.escrow.files import COPY_BYTES, Sink, WeightFile, WeightFiles, tensor_file, weight_places

Advance = Callable[[int], None]


class Rebuilder:
    """Makes the files of a checkpoint out of its escrow and the base. Refuses another base and a damaged escrow."""

    def __init__(self, escrow: layout.Escrow, base: Checkpoint, advance: Advance = lambda count: None) -> None:
        """``advance`` hears of the bytes that were made."""
        escrow.require_base(base)
        escrow.require_whole()
        self._escrow, self._base, self._advance = escrow, base, advance
        self._weights, self._codes = WeightFiles(), WeightFiles(codes=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._weights.close()
        self._codes.close()

    def write(self, file: str, sink: Sink) -> None:
        """Write the weight file ``file``; raises ``damaged_escrow`` unless all of it is as it was."""
        headers = self._codes.at(self._escrow.paths[layout.HEADERS])
        begin, end = headers.spans[file]
        header = bytes(headers.read(file, 0, end - begin))
        size = self._escrow.checkpoint["files"][file]["size"]
        whole = hashlib.sha256(header)
        sink.write(header)
        self._advance(len(header))
        for name, _, _ in weight_places(file, header[8:], size - len(header)):
            for chunk in self._checked(name):
                whole.update(chunk)
                sink.write(chunk)
                self._advance(len(chunk))
        if whole.hexdigest() != self._escrow.checkpoint["files"][file]["sha256"]:
            raise _damaged(f"the rebuilt '{file}' does not match its digest")

    def _checked(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes; raises at their end unless they match the tensor's digest."""
        wanted, hasher = self._escrow.checkpoint["tensors"][name], hashlib.sha256()
        try:
            for chunk in self._tensor(name, wanted):
                hasher.update(chunk)
                yield chunk
            if hasher.hexdigest() != wanted["sha256"]:
                raise _damaged(f"the rebuilt tensor '{name}' does not match its digest")
        except CompressionError:
            self._blame_the_base(self._escrow.manifest["tensors"][name])
            raise

    def _tensor(self, name: str, facts: Json) -> Iterator[memoryview]:
        line = self._escrow.manifest["tensors"][name]
        if line["kind"] == layout.COPY:
            yield from self._tensor(line["of"], self._escrow.checkpoint["tensors"][line["of"]])
        elif line["kind"] == layout.BASE:
            source = self._base_file(line["of"])
            begin, end = source.spans[line["of"]]
            for start in range(0, end - begin, COPY_BYTES):
                yield source.read(line["of"], start, min(COPY_BYTES, end - begin - start))
        else:
            yield from self._decoded(name, line, facts)

    def _decoded(self, name: str, line: Json, facts: Json) -> Iterator[memoryview]:
        layout.check_dtype(name, facts["dtype"])
        width = coding.LAYOUTS[facts["dtype"]].width
        codes, at = self._codes.at(self._escrow.paths[line["file"]]), 0
        chunk_elements = self._escrow.manifest["chunk_elements"]
        for start, count, has_base in layout.pieces(layout.elements(facts), line.get("shared", 0), chunk_elements):
            header = codes.read(name, at, coding.HEADER.size)
            code = codes.read(name, at, coding.HEADER.size + coding.code_length(header))
            at += len(code)
            base = None
            if has_base:
                weights = self._base_file(line["of"]).read(line["of"], start * width, count * width)
                base = coding.patterns(weights, facts["dtype"])
            yield coding.decode(code, count, base, facts["dtype"]).data.cast("B")

    def _base_file(self, name: str) -> WeightFile:
        return tensor_file(self._weights, self._base, name)

    def _blame_the_base(self, line: Json) -> None:
        """Say so where it is the base that is damaged, and the escrow is as it was."""
        name = line.get("of") if line["kind"] in (layout.DIFFERENCE, layout.BASE) else None
        if name is None:
            return
        source, hasher = self._base_file(name), hashlib.sha256()
        begin, end = source.spans[name]
        for start in range(0, end - begin, COPY_BYTES):
            hasher.update(source.read(name, start, min(COPY_BYTES, end - begin - start)))
        if hasher.hexdigest() != self._base.manifest["tensors"][name]["sha256"]:
            raise CompressionError(
                "damaged_base", f"tensor '{name}' of the base does not match its digest: import the base again"
            ) from None


def restore_folder(
    escrow: layout.Escrow, base: Checkpoint, out: Path, progress: Callable[[int, int, str], None]
) -> None:
    """Write the checkpoint to the new folder ``out``, each file as it was; nothing is left behind when it fails."""
    done, total = 0, escrow.checkpoint["size_bytes"]

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, "bytes")

    with Rebuilder(escrow, base, advance) as rebuilder, NewFolder(out) as folder:
        for name, path in escrow.side_files.items():
            _write(folder / name, path.read_bytes())
            advance(path.stat().st_size)
        for name in escrow.weight_files:
            with (folder / name).open("wb") as file:
                rebuilder.write(name, file)
                file.flush()
                os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _damaged(what: str) -> CompressionError:
    return CompressionError("damaged_escrow", f"{what}: the escrow is damaged, or another version made it")
