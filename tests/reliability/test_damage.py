"""Ten thousand damages to a published artifact: each is refused before anything is served or restored from it.

The damages are random and seeded: a bit flipped, the end cut off, bytes appended, in any file of the artifact, its
``manifest.json`` included. Each goes through both ways of reading: the store, as a server loads, and the folder, as
``restore`` reads. ``DAMAGES`` and ``DAMAGE_SEED`` in the environment ask for more, or for others.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from compression_worker.artifact import MANIFEST, Artifact, restore, write_folder
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError
from compression_worker.serving.loading import Loader
from compression_worker.store import Store
from tests.compression_worker.serving.stored import Models, make_models

DAMAGES = int(os.environ.get("DAMAGES", "10000"))
SEED = int(os.environ.get("DAMAGE_SEED", "3"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("published"))


@pytest.fixture
def files(models: Models) -> dict[str, str]:
    """File name -> digest, of all that was published."""
    return {str(name): str(digest) for name, digest in models.artifact.blobs.items()}


def damages(chance: random.Random, files: dict[str, bytes]) -> Iterator[tuple[str, str, bytes]]:
    """File, what was done to it, and its bytes after that."""
    names = sorted(files)
    for number in range(DAMAGES):
        name = names[number % len(names)]
        broken = bytearray(files[name])
        kind = ("flip", "cut", "append")[(number // len(names)) % 3]
        match kind:
            case "flip":
                bit = chance.randrange(8 * len(broken))
                broken[bit // 8] ^= 1 << bit % 8
            case "cut":
                del broken[chance.randrange(len(broken)) :]
            case "append":
                broken += chance.choice([b"\0", b"\n", b" ", b"}", chance.randbytes(chance.randrange(1, 64))])
        yield name, kind, bytes(broken)


def test_every_damage_is_refused_before_it_is_served_or_restored(
    models: Models, files: dict[str, str], tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    store = Store(shutil.copytree(models.store.root, tmp_path / "store", symlinks=True))
    folder = tmp_path / "folder"
    write_folder(folder, store, files)
    sound = {name: (folder / name).read_bytes() for name in files}
    loader, out, accepted = Loader(store), tmp_path / "restored", []
    refusals: dict[str, int] = {}
    with Checkpoint.open(store, models.base_digest) as base:
        for name, kind, broken in damages(random.Random(SEED), sound):
            blob = store.path(files[name])
            for place in (blob, folder / name):
                place.unlink()
                place.write_bytes(broken)
            for read in (
                lambda: loader.compressed(models.artifact_digest, models.base_digest, lambda: False),
                lambda: restore(base, Artifact.open_folder(folder), out, lambda done, total, unit: None),
            ):
                try:
                    read()
                except CompressionError as error:
                    refusals[error.code] = refusals.get(error.code, 0) + 1
                else:
                    accepted.append((name, kind))
            for place in (blob, folder / name):
                place.unlink()
                place.write_bytes(sound[name])
        assert accepted == []
        assert sum(refusals.values()) == 2 * DAMAGES
        assert not out.exists()
        # The same ways take it once it is whole again.
        assert loader.compressed(models.artifact_digest, models.base_digest, lambda: False).model is not None
        restore(base, Artifact.open_folder(folder), out, lambda done, total, unit: None)
        assert (out / "config.json").is_file()
    record_property("refusals", refusals)


def test_the_damages_reach_every_file_and_are_the_same_for_a_seed(files: dict[str, str]) -> None:
    assert MANIFEST in files
    assert any(name.endswith(".safetensors") for name in files)
    whole = {name: name.encode() * 50 for name in files}
    first = list(damages(random.Random(SEED), whole))
    assert {name for name, _kind, _bytes in first} == set(files)
    assert {kind for _name, kind, _bytes in first} == {"flip", "cut", "append"}
    assert all(broken != whole[name] for name, _kind, broken in first)
    assert first == list(damages(random.Random(SEED), whole))
