"""The store: whole blobs or none, found again by digest, and never a path from a name."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compression_worker.contracts import CompressionError, sha256
from compression_worker.store import BlobWriter, NoRoom, Store


@pytest.fixture(name="store")
def fixture_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def files(store: Store) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file()]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=5000))
def test_what_is_written_is_read_again_by_its_digest(store: Store, data: bytes) -> None:
    digest = store.write_bytes(data)
    assert digest == sha256(data)
    assert (store.has(digest), store.size(digest), store.read_bytes(digest)) == (True, len(data), data)
    store.verify(digest)
    with store.open(digest) as file:
        assert file.read() == data


def test_one_blob_lies_once_and_is_read_only(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 1_000_000)
    digests = {store.write_file(tmp_path / "file"), store.write_bytes(b"abc" * 1_000_000)}
    assert files(store) == [store.path(digests.pop())]
    assert files(store)[0].stat().st_mode & 0o777 == 0o444


def test_a_blob_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_counts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synchronise(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def rename(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    store.write_bytes(b"the folder is there already")
    monkeypatch.setattr(os, "fsync", synchronise)
    monkeypatch.setattr(os, "replace", rename)
    store.write_bytes(b"the folder is there already")
    assert done == ["file", "rename", "folder"]


def test_an_error_while_writing_leaves_nothing(store: Store) -> None:
    def write_half() -> None:
        with store.writer() as blob:
            blob.write(b"half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert files(store) == []


@pytest.mark.parametrize("when", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, when: str, number: int
) -> None:
    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(f"compression_worker.store.os.{when}", full)
    with pytest.raises(NoRoom):
        store.write_bytes(b"data")
    assert files(store) == []


def test_a_really_full_device_is_said() -> None:
    # /dev/full answers each write with "no space left", as a full disk does.
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(NoRoom):
        BlobWriter(full).write(b"data")


def test_damage_is_found_and_a_second_write_repairs_it(store: Store) -> None:
    digest = store.write_bytes(b"whole")
    store.path(digest).chmod(0o644)
    store.path(digest).write_bytes(b"whOle")
    for look in (store.verify, store.read_bytes):
        with pytest.raises(CompressionError) as error:
            look(digest)
        assert error.value.code == "damaged_blob"
    store.write_bytes(b"whole")
    assert store.read_bytes(digest) == b"whole"


def test_a_missing_blob_has_its_own_code(store: Store) -> None:
    for look in (store.verify, store.read_bytes, store.open):
        with pytest.raises(CompressionError) as error:
            look("0" * 64)
        assert error.value.code == "missing_blob"
    assert not store.has("0" * 64)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", "/" + "0" * 63])
def test_only_a_digest_becomes_a_path(store: Store, digest: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256"):
        store.path(digest)


def test_a_view_shows_blobs_under_names_and_is_made_once(store: Store) -> None:
    names = {"config.json": store.write_bytes(b"{}"), "model.safetensors": store.write_bytes(b"weights")}
    folder = store.view(names)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert store.view(dict(reversed(names.items()))) == folder
    assert [path for path in folder.parent.iterdir() if path != folder] == []


@pytest.mark.parametrize("name", ["..", "a/b", "/etc/passwd", ".hidden", "", "a\0b", "a\n"])
def test_a_view_takes_plain_names_only(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="not a plain file name"):
        store.view({name: store.write_bytes(b"")})


def test_a_linked_file_is_a_blob_without_a_copy(store: Store, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"many")
    store.link(sha256(b"many"), tmp_path / "weights")
    store.link(sha256(b"many"), tmp_path / "weights")
    assert store.read_bytes(sha256(b"many")) == b"many"
    assert store.path(sha256(b"many")).is_symlink()
    (tmp_path / "weights").unlink()
    assert not store.has(sha256(b"many"))
    (tmp_path / "elsewhere").write_bytes(b"many")
    store.link(sha256(b"many"), tmp_path / "elsewhere")
    store.verify(sha256(b"many"))


def test_free_room_is_known_before_the_folder_exists(tmp_path: Path) -> None:
    assert Store(tmp_path / "new").free_bytes() > 0
