"""The content-addressed store: blobs named by their SHA-256 under one folder.

A blob appears only when it is whole: write to a temporary file beside its place, fsync, rename, fsync the folder.
Names that people chose never become paths here; the only path parts are hexadecimal digests.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from compression_worker.contracts import CompressionError, canonical_json, sha256
from compression_worker.faults import failpoint

CHUNK = 1 << 20
DIGEST = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class NoRoom(Exception):
    """The disk (or the quota) is full. The job waits for room; nothing is lost."""


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(str(error)) from error
        raise


class BlobWriter:
    """Collects bytes for one blob; its digest is known once all are written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0
        self.digest = ""

    def write(self, data: bytes | memoryview) -> int:
        with _room():
            half = len(data) // 2
            self._file.write(data[:half])
            failpoint("store.half")
            self._file.write(data[half:])
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def finish(self) -> str:
        self.digest = self._hash.hexdigest()
        return self.digest


class Store:
    """Blobs under ``root/sha256/ab/abcd…``, and read-only folders of links to them under ``root/views``."""

    def __init__(self, root: str | os.PathLike[str], *, durable: bool = True) -> None:
        """``durable=False`` is for a store that one process throws away: nothing is synchronised to disk."""
        self.root = Path(root).absolute()
        self.durable = durable
        self._blobs = self.root / "sha256"
        self._views = self.root / "views"

    def path(self, digest: str) -> Path:
        """Where the blob ``digest`` lies (it may not be there). Raises ValueError for what is no digest."""
        if not DIGEST.fullmatch(digest):
            raise ValueError(f"not a SHA-256 digest: {digest!r}")
        return self._blobs / digest[:2] / digest

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        return self.path(digest).stat().st_size

    @contextlib.contextmanager
    def writer(self) -> Iterator[BlobWriter]:
        """Write one blob as a stream; ``digest`` of the writer is set when the block ends without an error."""
        with _room():
            (self.root / "tmp").mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.root / "tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file, _room():
                failpoint("store.open")
                blob = BlobWriter(file)
                yield blob
                failpoint("store.written")
                file.flush()
                if self.durable:
                    os.fsync(file.fileno())
                failpoint("store.synced")
            target = self.path(blob.finish())
            with _room():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.chmod(temporary, 0o444)
                # Also over a blob that is there: what the disk damaged is whole again when it is written again.
                os.replace(temporary, target)
                failpoint("store.renamed")
                if self.durable:
                    _fsync_folder(target.parent)
                failpoint("store.settled")
        finally:
            temporary.unlink(missing_ok=True)

    def write_bytes(self, data: bytes) -> str:
        """Store ``data``; returns its digest. Raises :class:`NoRoom` when the disk is full."""
        with self.writer() as blob:
            blob.write(data)
        return blob.digest

    def write_file(self, path: Path) -> str:
        """Store a copy of the file at ``path`` (a path of ours, never a user's); returns its digest."""
        with path.open("rb") as source, self.writer() as blob:
            while chunk := source.read(CHUNK):
                blob.write(chunk)
        return blob.digest

    def link(self, digest: str, file: Path) -> None:
        """Show the file at ``file``, hashed by the caller, as the blob ``digest``, without a copy.

        A symbolic link, so that it works across file systems. The blob lives only as long as the file stays as it
        is: for a store of one run, never for one that others rely on.
        """
        target = self.path(digest)
        if target.is_file() and not target.is_symlink():
            return  # a copy of its own is better than a link
        with _room():
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=target.parent))
            os.symlink(file.absolute(), temporary / digest)
            os.replace(temporary / digest, target)
            temporary.rmdir()

    def read_bytes(self, digest: str) -> bytes:
        """The blob's bytes, re-hashed. Raises :class:`CompressionError` when missing or damaged."""
        failpoint("store.read")
        try:
            data = self.path(digest).read_bytes()
        except FileNotFoundError:
            raise _missing(digest) from None
        if sha256(data) != digest:
            raise _damaged(digest)
        return data

    def open(self, digest: str) -> BinaryIO:
        """The blob as a file, not verified: call :meth:`verify` first where damage must be found."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise _missing(digest) from None

    def verify(self, digest: str) -> None:
        """Hash the blob again. Raises :class:`CompressionError` (``missing_blob``, ``damaged_blob``)."""
        failpoint("store.verify")
        hasher = hashlib.sha256()
        with self.open(digest) as file:
            while chunk := file.read(CHUNK):
                hasher.update(chunk)
        if hasher.hexdigest() != digest:
            raise _damaged(digest)

    def view(self, files: Mapping[str, str]) -> Path:
        """A folder that shows blobs under file names, for libraries that load folders. ``files``: name -> digest."""
        for name in files:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"not a plain file name: {name!r}")
        folder = self._views / sha256(canonical_json(dict(files)))
        if folder.is_dir():
            return folder
        with _room():
            self._views.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=self._views))
        try:
            for name, digest in files.items():
                os.symlink(os.path.relpath(self.path(digest), folder), temporary / name)
            failpoint("store.view")
            with contextlib.suppress(FileExistsError, OSError):
                os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if not folder.is_dir():
            raise OSError(f"could not make the view {folder}")
        return folder

    def remove(self, digests: Collection[str]) -> int:
        """Delete blobs, and the views that show one of them. Returns the bytes freed; missing blobs count nothing."""
        freed = 0
        for digest in digests:
            path = self.path(digest)
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                freed += size
        for view in self._views.glob("*"):
            if any(link.is_symlink() and not link.exists() for link in view.iterdir()):
                shutil.rmtree(view, ignore_errors=True)
        return freed

    def free_bytes(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _missing(digest: str) -> CompressionError:
    return CompressionError("missing_blob", f"the store has no blob {digest}; restore it from a backup or run again")


def _damaged(digest: str) -> CompressionError:
    return CompressionError("damaged_blob", f"blob {digest} does not match its digest: the disk changed it; run again")
