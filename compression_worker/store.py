"""The content-addressed store: blobs named by their SHA-256, in a folder here or in a bucket (``bucket.py``).

A blob appears only when it is whole: write to a temporary file beside its place, fsync, rename, fsync the folder.
Names that people chose never become paths here; the only path parts are hexadecimal digests. Nothing but this module
and ``bucket.py`` removes a blob.
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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from compression_worker.contracts import CompressionError, canonical_json, sha256
from compression_worker.faults import failpoint

CHUNK = 1 << 20
DIGEST = re.compile(r"[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9][A-Za-z0-9._-]*)*/?")


class NoRoom(Exception):
    """The disk (or the quota) is full. The job waits for room; nothing is lost."""


STORE_AWAY = "store_away"
"""The code of an attempt that broke because its worker could not use the store: the step is not at fault."""
AWAY = frozenset(
    {errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM}
)


class StoreAway(OSError):
    """The store did not answer, or would not let us in. Nothing is known to be wrong with any blob."""


@dataclass(frozen=True)
class Blob:
    """One blob as a listing shows it; ``modified`` is when it was last written, in seconds of the epoch."""

    digest: str
    size: int
    modified: float


def open_store(address: str | os.PathLike[str], cache: str | os.PathLike[str] = "", *, durable: bool = True) -> Store:
    """The store at ``address``: a folder, or ``s3://bucket/prefix``.

    A bucket is read through the folder ``cache`` (by default below the home folder); endpoint and keys come from the
    environment, as every S3 client reads them (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID`` …).
    """
    text = os.fspath(address)
    if "://" not in text:
        return Store(text, durable=durable)
    if not BUCKET.fullmatch(text):
        raise CompressionError("bad_store", f"'{text}' is no store: give a folder or s3://bucket/prefix")
    from compression_worker.bucket import BucketStore  # S3 libraries load only where a bucket is used

    return BucketStore(text, cache or Path.home() / ".cache" / "deltaworks")


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(str(error)) from error
        if error.errno in AWAY:
            raise StoreAway(error.errno, f"the store cannot be written: {error}") from error
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
        self.address = str(self.root)
        self.durable = durable
        self._blobs = self.root / "sha256"
        self._views = self.root / "views"

    def path(self, digest: str) -> Path:
        """Where the blob ``digest`` lies (it may not be there). Raises ValueError for what is no digest."""
        return self._place(digest)

    def _place(self, digest: str) -> Path:
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
            with os.fdopen(handle, "wb") as file:
                with _room():
                    failpoint("store.open")
                blob = BlobWriter(file)
                yield blob
                with _room():
                    failpoint("store.written")
                    file.flush()
                    if self.durable:
                        os.fsync(file.fileno())
                    failpoint("store.synced")
            with _room():
                os.chmod(temporary, 0o444)
                self._publish(temporary, blob.finish())
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, temporary: Path, digest: str) -> None:
        """Give the whole, synchronised file ``temporary`` the name by which the blob is found."""
        target = self._place(digest)
        self._make_folder(target.parent)
        # Also over a blob that is there: what the disk damaged is whole again when it is written again.
        os.replace(temporary, target)
        failpoint("store.renamed")
        if self.durable:
            _fsync_folder(target.parent)
        failpoint("store.settled")

    def _make_folder(self, folder: Path) -> None:
        """Make ``folder``, so that a power cut does not take it away again with what lies in it."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        if self.durable:
            _fsync_folder(folder.parent)

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
            raise missing(digest) from None
        if sha256(data) != digest:
            raise damaged(digest)
        return data

    def open(self, digest: str) -> BinaryIO:
        """The blob as a file, not verified: call :meth:`verify` first where damage must be found."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise missing(digest) from None

    def verify(self, digest: str) -> None:
        """Hash the blob again. Raises :class:`CompressionError` (``missing_blob``, ``damaged_blob``)."""
        failpoint("store.verify")
        hasher = hashlib.sha256()
        with self.open(digest) as file:
            while chunk := file.read(CHUNK):
                hasher.update(chunk)
        if hasher.hexdigest() != digest:
            raise damaged(digest)

    def verified_path(self, digest: str) -> Path:
        """Where the blob can be read from, hashed just now. Raises as :meth:`verify` does."""
        self.verify(digest)
        return self.path(digest)

    def document(self, digest: str, limit: int) -> bytes | None:
        """The bytes of a JSON object of at most ``limit`` bytes, re-hashed; None for any other blob."""
        try:
            if self.size(digest) > limit:
                return None
        except FileNotFoundError:
            raise missing(digest) from None
        with self.open(digest) as file:
            if file.read(1) != b"{":
                return None
        return self.read_bytes(digest)

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

    def blobs(self, after: str = "") -> Iterator[Blob]:
        """All blobs whose digest comes after ``after``, in the order of their digests."""
        for number in range(int(after[:2] or "0", 16), 256):
            for digest in sorted(_names(self._blobs / f"{number:02x}")):
                if digest > after and DIGEST.fullmatch(digest):
                    with contextlib.suppress(FileNotFoundError):
                        status = (self._blobs / digest[:2] / digest).stat()
                        yield Blob(digest, status.st_size, status.st_mtime)

    def remove(self, digests: Collection[str]) -> int:
        """Delete blobs, and the views that show one of them. Returns the bytes freed; missing blobs count nothing."""
        return sum(self.discard(digests).values())

    def discard(self, digests: Collection[str], *, before: float = float("inf")) -> dict[str, int]:
        """As :meth:`remove`, but only what was last written before ``before``: digest -> bytes, of what went."""
        freed = {digest: size for digest in digests if (size := self._unlink(digest, before)) is not None}
        for view in self._views.glob("*"):
            if any(link.is_symlink() and not link.exists() for link in view.iterdir()):
                shutil.rmtree(view, ignore_errors=True)
        return freed

    def _unlink(self, digest: str, before: float) -> int | None:
        path = self._place(digest)
        aside = self.root / "tmp" / f"condemned-{digest}"
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_mtime >= before:
                return None
            aside.parent.mkdir(exist_ok=True)
            # Aside first: what a writer puts in its place from now on is another file, and stays.
            os.rename(path, aside)
            status = aside.lstat()
            if status.st_mtime >= before:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, path, follow_symlinks=False)
                aside.unlink()
                return None
            aside.unlink()
            return status.st_size
        return None

    def leftovers(self, before: float) -> list[tuple[str, int]]:
        """Name and size of each temporary file last written before ``before``: a writer was killed."""
        found = []
        for name in _names(self.root / "tmp"):
            with contextlib.suppress(FileNotFoundError):
                status = (self.root / "tmp" / name).lstat()
                if status.st_mtime < before:
                    found.append((name, status.st_size))
        return found

    def discard_leftovers(self, before: float) -> tuple[int, int]:
        """Delete them. Returns how many files and bytes that were."""
        count = freed = 0
        for name, size in self.leftovers(before):
            with contextlib.suppress(FileNotFoundError):
                (self.root / "tmp" / name).unlink()
                count, freed = count + 1, freed + size
        for view in self._views.glob("tmp*"):  # a view that was being made; whole ones have a digest for a name
            if view.stat().st_mtime < before:
                shutil.rmtree(view, ignore_errors=True)
        return count, freed

    def free_bytes(self) -> int:
        self.root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def missing(digest: str) -> CompressionError:
    return CompressionError("missing_blob", f"the store has no blob {digest}; restore it from a backup or run again")


def damaged(digest: str) -> CompressionError:
    return CompressionError("damaged_blob", f"blob {digest} does not match its digest: the disk changed it; run again")
