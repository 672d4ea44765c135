"""Taking in a folder of a foreign checkpoint: each file is opened once, then checked, hashed and copied.

All of that happens on the one handle and nothing is opened twice by path, so that a file swapped between check and
read cannot slip in. Weights stream through in chunks: memory stays small whatever the size of a tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import resource
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from compression_worker import gate
from compression_worker.contracts import CompressionError, Json
from compression_worker.gate import ITEM_SIZE, TensorEntry

CHUNK = 4 << 20
SMALL = 1 << 18
MAX_TEXT_BYTES = 256_000_000
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
EXPONENT_BITS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}
"""A float whose exponent bits are all ones is infinite, or no number when its mantissa is not zero."""


class Sink(Protocol):
    """Where the bytes of a file go: into a blob of the store, or only through a hash."""

    digest: str

    def write(self, data: bytes | memoryview) -> int: ...


class Hasher:
    """A sink that keeps nothing but the digest, known when :meth:`finish` is called."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.digest = ""

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        return len(data)

    def finish(self) -> str:
        self.digest = self._hash.hexdigest()
        return self.digest


@dataclass(frozen=True)
class Source:
    """One regular file of the folder, opened."""

    name: str
    file: io.FileIO
    size: int
    changed_ns: int

    def read_start(self) -> bytes:
        """The first bytes, enough to tell a pickle or an archive."""
        return os.pread(self.file.fileno(), 512, 0)

    def read_text(self) -> bytes:
        """The whole of a small file."""
        if self.size > MAX_TEXT_BYTES:
            raise CompressionError("file_too_large", f"'{self.name}' has {self.size:,} bytes, too many for its kind")
        self.file.seek(0)
        data = self.file.read(self.size)
        self.check_unchanged(len(data))
        return data

    def check_unchanged(self, bytes_read: int) -> None:
        """Refuse a file that grew, shrank or was written to while it was read."""
        now = os.fstat(self.file.fileno())
        if bytes_read != self.size or now.st_size != self.size or now.st_mtime_ns != self.changed_ns:
            raise CompressionError("file_changed", f"'{self.name}' changed while it was read: import it again")


@dataclass(frozen=True)
class Shard:
    """One safetensors file whose header passed the gate; nothing of its data was read yet.

    ``header`` is what will be written; where that is not the source's own, ``start`` is where the source's data begins.
    """

    source: Source
    header: bytes
    tensors: list[TensorEntry]
    start: int = 0

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def data_start(self) -> int:
        """Where the data begins in the source."""
        return self.start or len(self.header)

    @property
    def size(self) -> int:
        """Bytes of the file as it will be written."""
        return len(self.header) + self.tensors[-1].end


@contextlib.contextmanager
def open_folder(root: Path, name: str) -> Iterator[int]:
    """The folder ``name`` directly under ``root`` as a descriptor; ``name`` is foreign, ``root`` is ours."""
    if not FOLDER_NAME.fullmatch(name) or ".." in name:
        raise CompressionError("bad_path", f"{name!r} is no plain folder name: letters, digits, '.', '_' and '-' only")
    try:
        root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CompressionError("unknown_root", f"the import root cannot be read: {error.strerror}") from None
    try:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root_fd)
    except FileNotFoundError:
        raise CompressionError("missing_folder", f"there is no folder '{name}' in the import root") from None
    except OSError:
        raise CompressionError("symlink", f"'{name}' is no real folder (a symbolic link is not followed)") from None
    finally:
        os.close(root_fd)
    try:
        yield folder
    finally:
        os.close(folder)


@contextlib.contextmanager
def open_path(folder: Path) -> Iterator[int]:
    """A folder that the person at the keyboard named, as a descriptor."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CompressionError("missing_folder", f"'{folder}' cannot be read: {error.strerror}") from None
    try:
        yield handle
    finally:
        os.close(handle)


def open_sources(
    folder: int, stack: contextlib.ExitStack, *, single_link: bool, also: Collection[str] = ()
) -> dict[str, Source]:
    """Every file of the folder that a checkpoint needs (and ``also``), opened; refuses whatever else lies there."""
    names = sorted(os.listdir(folder))
    folded: dict[str, str] = {}
    for name in names:
        gate.check_file_name(name)
        if (other := folded.setdefault(name.casefold(), name)) != name:
            raise CompressionError("unexpected_file", f"'{other}' and '{name}' differ in case only: remove one")
    _allow_open_files(len(names))
    wanted = [name for name in names if not gate.is_ignored(name) or name in ("README.md", *also)]
    return {name: _open_source(folder, name, stack, single_link=single_link) for name in wanted}


def read_header(source: Source) -> Shard:
    """The gated header of a safetensors file."""
    start = source.read_start()
    length = gate.header_length(source.name, start, source.size)
    source.file.seek(0)
    header = _read_exactly(source, 8 + length)
    return Shard(source, header, gate.parse_header(source.name, header[8:], source.size - 8 - length))


def check_shards(shards: list[Shard], weight_map: Mapping[str, str] | None) -> None:
    """Index and shards must agree exactly: no tensor twice, none missing, none that the index does not name."""
    found: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if other := found.get(tensor.name):
                raise CompressionError(
                    "duplicate_tensor", f"tensor '{tensor.name}' is in '{other}' and in '{shard.name}': keep one"
                )
            found[tensor.name] = shard.name
    if weight_map is None:
        _check_single(shards)
    else:
        _check_agreement(found, weight_map, {shard.name for shard in shards})


def take_shard(shard: Shard, sink: Sink, advance: Callable[[int], None]) -> dict[str, Json]:
    """Stream a shard into ``sink``; each tensor's digest by name. Refuses values that are not finite on the way."""
    sink.write(shard.header)
    advance(len(shard.header))
    shard.source.file.seek(shard.data_start)
    buffer = memoryview(bytearray(CHUNK))
    taken: dict[str, Json] = {}
    # Two cores of work: the file's hash and the write on one, the tensor's hash and the scan on the other.
    with ThreadPoolExecutor(1) as second:
        for tensor in shard.tensors:
            taken[tensor.name] = _take_tensor(shard, tensor, sink, advance, buffer, second)
    shard.source.check_unchanged(shard.data_start + shard.tensors[-1].end)
    return taken


def _take_tensor(
    shard: Shard,
    tensor: TensorEntry,
    sink: Sink,
    advance: Callable[[int], None],
    buffer: memoryview,
    second: ThreadPoolExecutor,
) -> Json:
    hasher = hashlib.sha256()
    left, nans, infinities = tensor.end - tensor.begin, 0, 0
    while left:
        chunk = buffer[: min(left, CHUNK)]
        _fill(shard.source, chunk)
        written = second.submit(sink.write, chunk) if len(chunk) > SMALL else None
        hasher.update(chunk)
        nan, infinity = count_not_finite(chunk, tensor.dtype)
        if written is None:
            sink.write(chunk)
        else:
            written.result()
        nans, infinities, left = nans + nan, infinities + infinity, left - len(chunk)
        advance(len(chunk))
    if nans or infinities:
        raise CompressionError(
            "not_finite",
            f"tensor '{tensor.name}' in '{shard.name}' holds {nans + infinities:,} values that are not finite "
            f"({nans:,} NaN, {infinities:,} infinite): the checkpoint is broken, train or export it again",
        )
    return {
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "file": shard.name,
        "sha256": hasher.hexdigest(),
    }


def count_not_finite(data: memoryview | bytes, dtype: str) -> tuple[int, int]:
    """How many elements of ``data`` are NaN, and how many infinite."""
    kind, exponent = EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, dtype=kind)
    special = (bits & exponent) == exponent
    if not special.any():
        return 0, 0
    mantissa = exponent & -exponent
    nans = int(np.count_nonzero(bits[special] & (mantissa - 1)))
    return nans, int(np.count_nonzero(special)) - nans


def licence_of(readme: bytes) -> str:
    """The ``license:`` of a model card's front matter, or nothing."""
    text = readme[:65_536].decode(errors="replace")
    front = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = front and re.search(r"^license:[ \t]*['\"]?([A-Za-z0-9][A-Za-z0-9 .+_-]{0,60})", front[1], re.MULTILINE)
    return found[1].strip() if found else ""


def total_bytes(tensors: Mapping[str, Json]) -> dict[str, int]:
    """Bytes of weights by dtype."""
    totals: dict[str, int] = {}
    for tensor in tensors.values():
        count = int(np.prod(tensor["shape"], dtype=np.int64))
        totals[tensor["dtype"]] = totals.get(tensor["dtype"], 0) + count * ITEM_SIZE[tensor["dtype"]]
    return totals


def _open_source(folder: int, name: str, stack: contextlib.ExitStack, *, single_link: bool) -> Source:
    # Looked at before opening, because opening a device can do something; looked at again on the open handle.
    _check_regular(name, os.stat(name, dir_fd=folder, follow_symlinks=False), single_link=single_link)
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise CompressionError("unreadable_file", f"'{name}' cannot be opened: {error.strerror}") from None
    file = stack.enter_context(io.FileIO(handle, "rb"))
    facts = os.fstat(handle)
    _check_regular(name, facts, single_link=single_link)
    return Source(name, file, facts.st_size, facts.st_mtime_ns)


def _check_regular(name: str, facts: os.stat_result, *, single_link: bool) -> None:
    if stat.S_ISLNK(facts.st_mode):
        raise CompressionError(
            "symlink", f"'{name}' is a symbolic link, which is not followed: copy the folder with 'cp -rL'"
        )
    if not stat.S_ISREG(facts.st_mode):
        raise CompressionError("unexpected_file", f"'{name}' is no regular file: remove it")
    if single_link and facts.st_nlink != 1:
        raise CompressionError("hard_link", f"'{name}' has a second name elsewhere (a hard link): copy the folder")


def _check_single(shards: list[Shard]) -> None:
    if not shards:
        raise CompressionError("no_weights", "the folder holds no .safetensors file")
    names = [shard.name for shard in shards]
    if names != ["model.safetensors"]:
        raise CompressionError(
            "missing_index",
            f"the weights are in {', '.join(names[:3])}{' …' if len(names) > 3 else ''}, and '{gate.INDEX_FILE}' is "
            "missing: copy it too (one file needs no index when it is called 'model.safetensors')",
        )


def _check_agreement(found: Mapping[str, str], weight_map: Mapping[str, str], files: set[str]) -> None:
    named = set(weight_map.values())
    if missing := sorted(named - files):
        raise CompressionError(
            "missing_shard", f"the index names {_some(missing)}, which the folder lacks: copy the whole folder"
        )
    if extra := sorted(files - named):
        raise CompressionError("extra_shard", f"the index does not name {_some(extra)}: remove it, or fix the index")
    if missing := sorted(weight_map.keys() - found.keys()):
        raise CompressionError("index_disagrees", f"the index names {_some(missing)}, which no shard holds")
    if extra := sorted(found.keys() - weight_map.keys()):
        raise CompressionError("index_disagrees", f"the shards hold {_some(extra)}, which the index does not name")
    for tensor, file in weight_map.items():
        if found[tensor] != file:
            raise CompressionError(
                "index_disagrees", f"the index places '{tensor}' in '{file}', but it is in '{found[tensor]}'"
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _read_exactly(source: Source, size: int) -> bytes:
    data = bytearray(size)
    _fill(source, memoryview(data))
    return bytes(data)


def _fill(source: Source, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = source.file.readinto(view[done:])
        if not count:
            raise CompressionError("file_changed", f"'{source.name}' shrank while it was read: import it again")
        done += count


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft < needed <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
