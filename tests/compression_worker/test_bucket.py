"""The store in a bucket, against a real S3 server: made once, re-hashed, and back after the server was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compression_worker import bucket
from compression_worker.bucket import BucketStore
from compression_worker.contracts import CompressionError, StepOutput, StepSpec, sha256
from compression_worker.launcher import Launcher, child_command, child_environment
from compression_worker.store import StoreAway, open_store
from tests.seaweed import BUCKET, Seaweed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    one = Seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        one.start()
        yield one
    finally:
        one.kill()


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{sha256(request.node.name.encode())[:16]}"


@pytest.fixture
def store(server: Seaweed, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BucketStore:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket, "FIRST_PAUSE", 0.2)
    made = open_store(address, tmp_path / "cache")
    assert isinstance(made, BucketStore)
    return made


def another(store: BucketStore, tmp_path: Path) -> BucketStore:
    """The same bucket from another machine: its own copies."""
    return BucketStore(store.address, tmp_path / "elsewhere")


def overwrite(server: Seaweed, store: BucketStore, digest: str, data: bytes) -> None:
    server.client().call_s3("put_object", Bucket=BUCKET, Key=store._key(digest), Body=data)


def test_what_one_machine_writes_another_reads(store: BucketStore, tmp_path: Path) -> None:
    for data in (b"", b"abc", os.urandom(3_000_000)):
        digest = store.write_bytes(data)
        other = another(store, tmp_path)
        assert digest == sha256(data)
        assert (other.has(digest), other.size(digest), other.read_bytes(digest)) == (True, len(data), data)
        assert other.path(digest).read_bytes() == data
        with other.open(digest) as file:
            assert file.read() == data
        other.verify(digest)
    assert not store.has("0" * 64)
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


def test_a_large_blob_goes_up_in_parts(store: BucketStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "UPLOAD_PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(os.urandom(1 << 20) * 11)
    digest = store.write_file(tmp_path / "large")
    assert store.write_file(tmp_path / "large") == digest, "made once, also in parts"
    another(store, tmp_path).verify(digest)
    assert store.remove([digest]) == 11 << 20


def test_a_missing_blob_has_its_own_code(store: BucketStore) -> None:
    for look in (store.verify, store.read_bytes, store.open, store.verified_path):
        with pytest.raises(CompressionError) as error:
            look("0" * 64)
        assert error.value.code == "missing_blob"
    assert not store.path("0" * 64).exists()
    with pytest.raises(ValueError, match="not a SHA-256"):
        store.has("../../etc/passwd")


def test_a_view_shows_blobs_that_only_the_bucket_had(store: BucketStore, tmp_path: Path) -> None:
    names = {"config.json": store.write_bytes(b"{}"), "model.safetensors": store.write_bytes(b"weights")}
    other = another(store, tmp_path)
    folder = other.view(names)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    other.path(names["config.json"]).unlink()
    assert (other.view(names) / "config.json").read_bytes() == b"{}", "a copy that was thrown away comes back"


def test_many_writers_of_one_blob_make_it_once(server: Seaweed, store: BucketStore, tmp_path: Path) -> None:
    """Whoever comes second finds it whole and is content; the object is not written twice."""
    stores = [BucketStore(store.address, tmp_path / f"machine-{n}") for n in range(4)]
    made: list[tuple[str, object]] = []

    def counted(real: Any) -> Any:
        def put_file(path: str, where: str, **options: Any) -> None:
            real.put_file(path, where, **options)
            made.append((where.rpartition("/")[2], options.get("mode")))

        return _With(real, put_file=put_file)

    for one in stores:
        one._client = (os.getpid(), counted(one._fs))
    blobs = [os.urandom(200_000) for _ in range(10)]
    start = threading.Barrier(len(stores))

    def write(one: BucketStore) -> None:
        for data in blobs:
            start.wait()
            one.write_bytes(data)

    threads = [threading.Thread(target=write, args=(one,)) for one in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted((sha256(data), "create") for data in blobs)
    for data in blobs:
        store.verify(sha256(data))


class _With:
    """A client with some of its functions exchanged."""

    def __init__(self, client: Any, **functions: Any) -> None:
        self._inner = client
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def test_an_upload_whose_answer_was_lost_is_looked_at_and_counts(store: BucketStore) -> None:
    real, answers = store._fs, []

    def lose_the_first(*args: Any, **options: Any) -> None:
        real.put_file(*args, **options)
        if not answers:
            answers.append("lost")
            raise ConnectionResetError("the connection was closed")

    store._client = (os.getpid(), _With(real, put_file=lose_the_first))
    digest = store.write_bytes(b"arrived")
    assert answers == ["lost"]
    store.verify(digest)


def test_damage_in_the_bucket_is_found_and_a_second_write_repairs_it(
    server: Seaweed, store: BucketStore, tmp_path: Path
) -> None:
    digest = store.write_bytes(b"whole")
    overwrite(server, store, digest, b"whOle")
    other = another(store, tmp_path)
    for look in (store.verify, other.verify, other.read_bytes, other.path, other.verified_path):
        with pytest.raises(CompressionError) as error:
            look(digest)
        assert error.value.code == "damaged_blob"
    assert not (tmp_path / "elsewhere" / "sha256" / digest[:2] / digest).exists(), "damage is never kept as a copy"
    store.write_bytes(b"whole")
    assert other.read_bytes(digest) == b"whole"


def test_a_blob_that_only_a_copy_still_has_is_missing(server: Seaweed, store: BucketStore) -> None:
    digest = store.write_bytes(b"gone")
    server.client().call_s3("delete_object", Bucket=BUCKET, Key=store._key(digest))
    with pytest.raises(CompressionError) as error:
        store.verify(digest)
    assert error.value.code == "missing_blob"
    assert store.read_bytes(digest) == b"gone"


def test_a_damaged_copy_is_fetched_again(store: BucketStore, tmp_path: Path) -> None:
    digest = store.write_bytes(b"whole")

    def damage() -> None:
        store.path(digest).chmod(0o644)
        store.path(digest).write_bytes(b"whOle")

    for look in (store.read_bytes, store.verified_path, store.path, store.verify):
        damage()
        look(digest)
        assert store.path(digest).read_bytes() == b"whole", look.__name__
    status = store.path(digest).stat()  # the disk changes bytes without a new date
    damage()
    os.utime(store._place(digest), ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.read_bytes(digest) == b"whole"


def test_the_list_is_whole_and_in_order(store: BucketStore) -> None:
    sizes = {store.write_bytes(os.urandom(20) * (n + 1)): 20 * (n + 1) for n in range(12)}
    listed = list(store.blobs())
    assert [(blob.digest, blob.size) for blob in listed] == sorted(sizes.items())
    assert all(abs(blob.modified - time.time()) < 120 for blob in listed)
    middle = listed[5].digest
    assert [blob.digest for blob in store.blobs(after=middle)] == sorted(sizes)[6:]


def test_only_what_is_old_enough_is_discarded(store: BucketStore, monkeypatch: pytest.MonkeyPatch) -> None:
    old = store.write_bytes(b"old")
    time.sleep(2.1)  # dates in a bucket are whole seconds
    middle = time.time() - 1
    young = store.write_bytes(b"young")
    assert store.discard([old, young, "0" * 64], before=middle) == {old: 3}
    assert not store.has(old)
    assert not store.path(old).exists()
    assert store.has(young)


def test_what_is_written_again_looks_new_again(store: BucketStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.write_bytes(b"again")
    before = store._info(digest).modified
    time.sleep(1.1)
    store.write_bytes(b"again")
    assert store._info(digest).modified == before
    monkeypatch.setattr(bucket, "TOUCH_SECONDS", 0.0)
    time.sleep(1.1)
    store.write_bytes(b"again")
    assert store._info(digest).modified > before
    store.verify(digest)


def test_uploads_that_nobody_finished_are_left_overs(server: Seaweed, store: BucketStore) -> None:
    key = store._key(sha256(b"never finished"))
    server.client().call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
    assert store.leftovers(before=time.time() - 3600) == []
    assert len(store.leftovers(before=time.time() + 60)) == 1
    assert store.discard_leftovers(before=time.time() + 60) == (1, 0)
    assert store.leftovers(before=time.time() + 60) == []


def test_documents_are_told_from_weights_without_fetching_them(store: BucketStore, tmp_path: Path) -> None:
    document, weights = store.write_bytes(b'{"a":1}'), store.write_bytes(b"\x00" * 100)
    other = another(store, tmp_path)
    assert other.document(document, limit=100) == b'{"a":1}'
    assert other.document(weights, limit=1000) is None
    assert other.document(document, limit=3) is None
    assert not other._place(weights).exists()


def test_copies_make_room_for_others_oldest_use_first(store: BucketStore, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [store.write_bytes(os.urandom(1000)) for _ in range(3)]
    for age, digest in zip((9000, 7000, 10), digests, strict=True):
        os.utime(store._place(digest), (time.time() - age, time.time()))
    free = store.free_bytes()
    monkeypatch.setattr(bucket, "CACHE_RESERVE_BYTES", 0)
    store._make_room(0)
    assert all(store._place(digest).exists() for digest in digests), "there is room"
    store._make_room(free + 500)
    assert [store._place(digest).exists() for digest in digests] == [False, True, True]
    store._make_room(free << 4)
    assert [store._place(digest).exists() for digest in digests] == [False, False, True], "used just now"


def test_wrong_keys_and_a_missing_bucket_are_said(
    store: BucketStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreAway, match="'no-such-bucket' of s3://no-such-bucket does not exist"):
        open_store("s3://no-such-bucket", tmp_path / "cache").write_bytes(b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreAway, match="refuses our keys"):
        BucketStore(store.address, tmp_path / "cache").write_bytes(b"x")
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize(
    "address", ["s3://", "s3://Bucket", "s3://bucket/../x", "s3://bucket//x", "gs://bucket", "s3://b ucket"]
)
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="is no store"):
        open_store(address, tmp_path)


def test_a_folder_store_loads_no_s3_library() -> None:
    code = (
        "import sys; from compression_worker.store import open_store; open_store('/tmp/none');"
        "print({'s3fs', 'fsspec', 'botocore', 'aiobotocore', 'aiohttp'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_child_computes_a_whole_step_against_the_bucket(server: Seaweed, store: BucketStore, tmp_path: Path) -> None:
    """Through launcher, command line and runner: an import's blobs are in the bucket, and reuse hashes them there."""
    from tests.tiny import make_tiny_pair

    make_tiny_pair(tmp_path / "models", layers=1)
    environment = child_environment(
        {**os.environ, **server.environment, "ARTIFACT_ROOT": store.address, "SECRET": "of the parent"}
    )
    assert environment["AWS_SECRET_ACCESS_KEY"] == "secret-of-tests"
    assert "SECRET" not in environment
    command = child_command(store.address, {"models": tmp_path / "models"}, "cpu", str(tmp_path / "child"))
    launcher = Launcher(command, env=environment)
    spec = StepSpec(kind="checkpoint.import", params={"root": "models", "folder": "base"})
    try:
        first = launcher.run(spec)
        assert first.kind == "done", first
        output = StepOutput.from_bytes(store.read_bytes(first.output))
        for digest in output.blobs.values():
            another(store, tmp_path).verify(digest)
        assert launcher.run(spec, cached=first.output).reused
        overwrite(server, store, output.blobs["model.safetensors"], b"damaged")
        again = launcher.run(spec, cached=first.output)
        assert (again.kind, again.reused, again.output) == ("done", False, first.output)
        store.verify(output.blobs["model.safetensors"])
    finally:
        launcher.close()


def test_keys_of_a_bucket_stay_with_the_parent_of_a_folder_store() -> None:
    given = {"AWS_SECRET_ACCESS_KEY": "x", "ARTIFACT_ROOT": "/srv/store", "PATH": "/bin"}
    assert "AWS_SECRET_ACCESS_KEY" not in child_environment(given)


def test_a_write_survives_kill_9_of_the_server_and_what_was_stored_is_there_after_it(
    server: Seaweed, store: BucketStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "TRIES", 9)
    monkeypatch.setattr(bucket, "FIRST_PAUSE", 0.1)
    before, written = store.write_bytes(b"before"), list[str]()
    server.kill()
    # The server lives with the thread that starts it: the write is what goes into another.
    writer = threading.Thread(target=lambda: written.append(store.write_bytes(b"while it was away")))
    writer.start()
    time.sleep(1.0)
    assert written == []
    server.start()
    writer.join(60)
    for digest in (before, *written, sha256(b"while it was away")):
        another(store, tmp_path).verify(digest)


def test_a_server_that_stays_away_is_said_after_a_bounded_number_of_tries(
    server: Seaweed, store: BucketStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "FIRST_PAUSE", 0.01)
    digest = store.write_bytes(b"known")
    server.kill()
    try:
        assert store.read_bytes(digest) == b"known", "a copy answers while the bucket is away"
        for look in (store.verify, another(store, tmp_path).read_bytes, store.has):
            with pytest.raises(StoreAway, match="failed 5 times in a row"):
                look(digest)
        with pytest.raises(StoreAway, match="is its server up"):
            store.write_bytes(b"new")
        assert list((tmp_path / "cache" / "tmp").iterdir()) == []
    finally:
        server.start()
    store.verify(digest)


def test_another_server_never_meets_the_client_of_the_former(
    store: BucketStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = another(store, tmp_path)._fs
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    elsewhere = another(store, tmp_path)._fs
    assert elsewhere is not present
    assert elsewhere.client_kwargs.get("endpoint_url", elsewhere.endpoint_url) == "http://127.0.0.1:9"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-key")
    assert another(store, tmp_path)._fs.key == "another-key"
