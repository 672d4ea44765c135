"""The same store in a bucket: objects named by their SHA-256 on any S3 server, through fsspec.

A blob is hashed while it is written to a local temporary file, then uploaded so that it is made once
(``If-None-Match: *``): no upload replaces a sound blob. Reading goes through a local folder of copies, each hashed when
it is fetched and when a process first uses it. :meth:`BucketStore.verify` asks the bucket itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from botocore.exceptions import BotoCoreError, ClientError

from compression_worker.contracts import sha256
from compression_worker.store import DIGEST, Blob, NoRoom, Store, StoreAway, damaged, missing

T = TypeVar("T")

TRIES = 5
FIRST_PAUSE = 0.5
READ_BYTES = 8 << 20
UPLOAD_PART_BYTES = 50 << 20
"""Twice this and more goes up in parts; S3 takes 10,000 of them."""
COPY_LIMIT_BYTES = 5_000_000_000
TOUCH_SECONDS = 3600.0
"""A blob that is written again and is older than this gets a new date: it must not look forgotten."""
CACHE_RESERVE_BYTES = 4 << 30
CACHE_REST_SECONDS = 3600.0
EXISTS = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
FULL = frozenset({"QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull", "507"})
WHO = {
    "endpoint_url": "AWS_ENDPOINT_URL",
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SESSION_TOKEN",
}


class BucketStore(Store):
    """Blobs under ``s3://bucket/prefix/sha256/ab/abcd…``; ``root`` is the local folder of copies."""

    def __init__(self, address: str, cache: str | os.PathLike[str]) -> None:
        super().__init__(cache)
        self.address = address.rstrip("/")
        self._bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        self._prefix = f"{prefix}/sha256/" if prefix else "sha256/"
        self._client: tuple[int, Any] = (0, None)
        self._known: dict[str, tuple[int, int, int]] = {}

    @property
    def _fs(self) -> Any:
        """A client of this process: connections do not survive a fork."""
        if self._client[0] != os.getpid():
            config = {"retries": {"max_attempts": 0}, "connect_timeout": 5, "read_timeout": 60}
            # Said aloud, though the environment says it too: fsspec gives one client for equal arguments, and another
            # server or other keys must not meet the client of the former.
            given = {name: os.environ.get(variable) for name, variable in WHO.items()}
            fs = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=config, **given)
            fs.retries = 1  # we count the tries ourselves
            self._client = (os.getpid(), fs)
        return self._client[1]

    def _key(self, digest: str) -> str:
        self._place(digest)  # refuses what is no digest
        return f"{self._prefix}{digest[:2]}/{digest}"

    def _object(self, digest: str) -> str:
        return f"{self._bucket}/{self._key(digest)}"

    def _tried(self, act: Callable[[], T]) -> T:
        """What ``act`` gives, tried again a few times while the network or the server fails."""
        for attempt in range(1, TRIES + 1):
            try:
                return act()
            except (OSError, BotoCoreError, ClientError) as error:
                self._final(error)
                if attempt == TRIES:
                    raise StoreAway(
                        errno.EIO, f"the store {self.address} failed {TRIES} times in a row: {error}; is its server up?"
                    ) from error
                time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        raise AssertionError("unreachable: the last try returns or raises")

    def _final(self, error: Exception) -> None:
        """Raise what another try would not change."""
        code = _code(error)
        if code in FULL or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise NoRoom(f"the store {self.address} has no room: {error}") from error
        if code == "NoSuchBucket":
            raise StoreAway(errno.ENOENT, f"the bucket '{self._bucket}' of {self.address} does not exist: make it")
        if isinstance(error, StoreAway | FileNotFoundError):
            raise error
        if isinstance(error, PermissionError) or type(error).__name__ in (
            "NoCredentialsError",
            "PartialCredentialsError",
        ):
            raise StoreAway(
                errno.EACCES,
                f"the store {self.address} refuses our keys ({error}): check AWS_ACCESS_KEY_ID and its rights",
            ) from error

    def has(self, digest: str) -> bool:
        try:
            self._info(digest)
        except FileNotFoundError:
            return False
        return True

    def size(self, digest: str) -> int:
        return self._info(digest).size

    def _info(self, digest: str) -> Blob:
        found = self._tried(lambda: self._fs.call_s3("head_object", Bucket=self._bucket, Key=self._key(digest)))
        return Blob(digest, found["ContentLength"], found["LastModified"].timestamp())

    def path(self, digest: str) -> Path:
        """A local copy, fetched where there is none; not there when the bucket lacks the blob."""
        place = self._place(digest)
        if not self._is_sound(digest, place):
            with contextlib.suppress(FileNotFoundError):
                self._fetch(digest, place)
        return place

    def _is_sound(self, digest: str, place: Path) -> bool:
        """Whether the copy is there and was hashed by this process as it is; a damaged one is thrown away."""
        try:
            status = place.stat()
        except FileNotFoundError:
            return False
        mark = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._known.get(digest) != mark:
            with place.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    place.unlink(missing_ok=True)
                    return False
            self._known[digest] = mark
        with contextlib.suppress(OSError):  # the last use, for the choice of what to throw away
            os.utime(place, ns=(time.time_ns(), status.st_mtime_ns))
        return True

    def _fetch(self, digest: str, place: Path) -> None:
        with _here():
            self._make_room(self.size(digest))
            (self.root / "tmp").mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.root / "tmp")
            os.close(handle)
        temporary = Path(name)
        try:
            self._tried(lambda: self._fs.get_file(self._object(digest), name))
            with temporary.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise damaged(digest)
            self._keep(temporary, digest)
        finally:
            temporary.unlink(missing_ok=True)

    def _keep(self, temporary: Path, digest: str) -> None:
        """Make the file, which was hashed, the local copy."""
        place = self._place(digest)
        with _here():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.chmod(temporary, 0o444)
            os.replace(temporary, place)
        status = place.stat()
        self._known[digest] = (status.st_ino, status.st_size, status.st_mtime_ns)

    def _make_room(self, needed: int) -> None:
        """Throw away the copies that were not used for longest, where the disk has too little room for one more."""
        disk = shutil.disk_usage(self._nearest())
        lacking = needed + min(CACHE_RESERVE_BYTES, disk.total // 10) - disk.free
        if lacking <= 0:
            return
        rested = time.time() - CACHE_REST_SECONDS
        copies = [(path.stat().st_atime, path) for path in self._blobs.glob("??/*")]
        for used, path in sorted(copies):
            if lacking <= 0 or used > rested:
                break
            lacking -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _publish(self, temporary: Path, digest: str) -> None:
        self._tried(lambda: self._upload(temporary, digest))
        self._keep(temporary, digest)

    def _upload(self, temporary: Path, digest: str) -> None:
        """Make the object once. One that is there already, perhaps from a try whose answer was lost, is looked at."""
        try:
            self._put(temporary, digest, mode="create")
        except (OSError, ClientError) as error:
            if _code(error) not in EXISTS:
                raise
            if self._remote_sha256(digest) != digest:
                self._put(temporary, digest)
            elif self._info(digest).modified < time.time() - TOUCH_SECONDS:
                self._touch(temporary, digest)

    def _put(self, temporary: Path, digest: str, **options: str) -> None:
        self._fs.put_file(str(temporary), self._object(digest), chunksize=UPLOAD_PART_BYTES, **options)

    def _touch(self, temporary: Path, digest: str) -> None:
        """Give a sound blob the present date."""
        if temporary.stat().st_size > COPY_LIMIT_BYTES:
            self._put(temporary, digest)
            return
        key = self._key(digest)
        source = {"Bucket": self._bucket, "Key": key}
        self._fs.call_s3("copy_object", Bucket=self._bucket, Key=key, CopySource=source, MetadataDirective="REPLACE")

    def link(self, digest: str, file: Path) -> None:
        raise ValueError("a bucket cannot show a local file: only a folder store links")

    def read_bytes(self, digest: str) -> bytes:
        data = self._copy_of(digest).read_bytes()
        if sha256(data) != digest:
            data = self.verified_path(digest).read_bytes()  # the copy went bad: fetched again
        if sha256(data) != digest:
            raise damaged(digest)
        return data

    def open(self, digest: str) -> BinaryIO:
        return self._copy_of(digest).open("rb")

    def _copy_of(self, digest: str) -> Path:
        place = self.path(digest)
        if not place.is_file():
            raise missing(digest)
        return place

    def verify(self, digest: str) -> None:
        """Hash what lies in the bucket, and the local copy where there is one: a bad copy is thrown away."""
        try:
            found = self._tried(lambda: self._remote_sha256(digest))
        except FileNotFoundError:
            raise missing(digest) from None
        if found != digest:
            raise damaged(digest)
        self._known.pop(digest, None)
        self._is_sound(digest, self._place(digest))

    def verified_path(self, digest: str) -> Path:
        """The local copy, hashed just now, or fetched (and hashed) where it is missing or damaged."""
        self._known.pop(digest, None)
        return self._copy_of(digest)

    def _remote_sha256(self, digest: str) -> str:
        hasher = hashlib.sha256()
        with self._fs.open(self._object(digest), "rb", block_size=READ_BYTES, cache_type="none") as file:
            while chunk := file.read(READ_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest()

    def document(self, digest: str, limit: int) -> bytes | None:
        """As in a folder; weights are not fetched to look at their first byte."""
        try:
            if not 0 < self.size(digest) <= limit:
                return None
            if self._tried(lambda: self._fs.cat_file(self._object(digest), start=0, end=1)) != b"{":
                return None
        except FileNotFoundError:
            raise missing(digest) from None
        return self.read_bytes(digest)

    def view(self, files: Mapping[str, str]) -> Path:
        for digest in files.values():
            self.path(digest)
        return super().view(files)

    def blobs(self, after: str = "") -> Iterator[Blob]:
        start = self._key(after) if after else self._prefix
        while True:
            page = self._tried(lambda: self._list(start))  # noqa: B023 - called at once
            for entry in page.get("Contents", []):
                digest = entry["Key"].rpartition("/")[2]
                if DIGEST.fullmatch(digest):
                    yield Blob(digest, entry["Size"], entry["LastModified"].timestamp())
                start = entry["Key"]
            if not page.get("IsTruncated"):
                return

    def _list(self, start: str) -> Any:
        return self._fs.call_s3("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix, StartAfter=start)

    def _unlink(self, digest: str, before: float) -> int | None:
        try:
            found = self._info(digest)
        except FileNotFoundError:
            return None
        if found.modified >= before:
            return None
        self._tried(lambda: self._fs.call_s3("delete_object", Bucket=self._bucket, Key=self._key(digest)))
        self._place(digest).unlink(missing_ok=True)
        self._known.pop(digest, None)
        return found.size

    def leftovers(self, before: float) -> list[tuple[str, int]]:
        """Uploads in parts that nobody finished, and this machine's temporary files. The server keeps their sizes."""
        return [*super().leftovers(before), *((upload["UploadId"], 0) for upload in self._unfinished(before))]

    def discard_leftovers(self, before: float) -> tuple[int, int]:
        count, freed = super().discard_leftovers(before)
        for upload in self._unfinished(before):
            names = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            with contextlib.suppress(FileNotFoundError):
                self._tried(lambda: self._fs.call_s3("abort_multipart_upload", **names))  # noqa: B023 - called at once
                count += 1
        return count, freed

    def _unfinished(self, before: float) -> list[Any]:
        page = self._tried(lambda: self._fs.call_s3("list_multipart_uploads", Bucket=self._bucket, Prefix=self._prefix))
        return [upload for upload in page.get("Uploads") or [] if upload["Initiated"].timestamp() < before]

    def free_bytes(self) -> int:
        """Of the disk that holds the local copies: a bucket has no limit that it would tell."""
        return shutil.disk_usage(self._nearest()).free

    def _nearest(self) -> Path:
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root


def _code(error: BaseException | None) -> str:
    """S3's own word for what went wrong; fsspec keeps it in the cause."""
    while error is not None:
        if isinstance(error, ClientError):
            return str(error.response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """A full disk under the local copies is said as such."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoom(f"the disk of the store's local copies is full: {error}") from error
        raise
