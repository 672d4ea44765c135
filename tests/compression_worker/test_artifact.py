"""The artifact on disk: whole or refused, restored or left alone, and nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compression_worker import artifact as artifacts
from compression_worker import commands
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint, attach_folder, load_folder
from compression_worker.contracts import CompressionError, Json, canonical_json
from compression_worker.store import NoRoom, Store
from tests.tiny import make_tiny_pair

CONFIG: Json = {"distill_steps": 0}


def silent(event: Json) -> None:
    """Nobody watches."""


@pytest.fixture(name="made", scope="module")
def fixture_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, variant and the artifact of both. Tests do not change it."""
    folder = tmp_path_factory.mktemp("made")
    base, variant = make_tiny_pair(folder, shards=2)
    commands.compress(
        "bitdelta",
        base=base,
        model=variant,
        out=folder / "artifact",
        config=CONFIG,
        data=None,
        seed=0,
        device="cpu",
        watch=silent,
    )
    return folder


@pytest.fixture(name="copy")
def fixture_copy(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The artifact once more, to be damaged."""
    shutil.copytree(made / "artifact", tmp_path / "artifact")
    return tmp_path / "artifact"


def test_a_flipped_byte_anywhere_is_found(copy: Path) -> None:
    assert commands.verify(copy, None) == {"ok": True, "problems": []}
    for path in sorted(copy.iterdir()):
        raw = path.read_bytes()
        step = 7 if path.name == "manifest.json" else max(1, len(raw) // 20)
        for position in {*range(0, len(raw), step * (len(raw) // (20 * step) + 1)), len(raw) - 1}:
            path.chmod(0o644)
            path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
            found = commands.verify(copy, None)
            assert not found["ok"], (path.name, position)
            assert found["problems"][0]
        path.write_bytes(raw)
    assert commands.verify(copy, None)["ok"]


@pytest.mark.parametrize("name", ["codes-00000.safetensors", "raw.safetensors", "scales.safetensors", "config.json"])
def test_a_missing_or_shortened_file_is_named(copy: Path, name: str) -> None:
    path = copy / name
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"'{name}' has" in commands.verify(copy, None)["problems"][0]
    path.unlink()
    assert commands.verify(copy, None)["problems"] == [f"'{name}' is missing"]


def test_a_damaged_artifact_is_neither_restored_nor_loaded(made: Path, copy: Path, tmp_path: Path) -> None:
    path = copy / "raw.safetensors"
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CompressionError, match=r"'raw\.safetensors' does not match its digest") as refused:
        commands.restore(copy, base=made / "base", out=tmp_path / "out", watch=silent)
    assert refused.value.code == "damaged_artifact"
    assert not (tmp_path / "out").exists()
    store = Store(tmp_path / "store")
    base = Checkpoint.open(store, attach_folder(store, made / "base"))
    with pytest.raises(CompressionError, match="does not match its digest"):
        artifacts.load_model(base, Artifact.open_folder(copy))


def test_a_file_that_is_not_of_the_artifact_is_reported(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert commands.verify(copy, None)["problems"] == ["'notes.txt' is no file of this artifact"]


def rewritten(copy: Path, **changes: object) -> Path:
    """The manifest with other values and a matching digest of itself."""
    path = copy / "manifest.json"
    value = {key: item for key, item in json.loads(path.read_bytes()).items() if key != "self_sha256"} | changes
    path.chmod(0o644)
    path.write_bytes(canonical_json(value | {"self_sha256": artifacts.sha256(canonical_json(value))}))
    return copy


def test_a_format_of_the_future_is_refused(copy: Path) -> None:
    with pytest.raises(CompressionError, match="deltaworks-artifact-2"):
        Artifact.open_folder(rewritten(copy, format="deltaworks-artifact-2"))


def test_a_manifest_with_a_key_that_nobody_knows_is_refused(copy: Path) -> None:
    with pytest.raises(CompressionError, match="damaged"):
        Artifact.open_folder(rewritten(copy, encryption="none"))


def test_a_layout_that_nobody_knows_is_refused(made: Path, copy: Path, tmp_path: Path) -> None:
    rewritten(copy, layout={"name": "signs-along-n", "version": 1})
    with pytest.raises(CompressionError, match="layout that this version does not know"):
        commands.restore(copy, base=made / "base", out=tmp_path / "out", watch=silent)


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", ""])
def test_a_file_name_that_is_a_path_is_refused(copy: Path, name: str) -> None:
    files = Artifact.open_folder(copy).manifest["files"]
    with pytest.raises(CompressionError, match="no plain file name") as refused:
        Artifact.open_folder(rewritten(copy, files=files | {name: {"sha256": "0" * 64, "size": 0}}))
    assert refused.value.code == "bad_path"


def test_an_unknown_method_is_refused(copy: Path) -> None:
    with pytest.raises(CompressionError, match="no method 'zipdelta'"):
        Artifact.open_folder(rewritten(copy, method="zipdelta"))


def test_a_folder_without_a_manifest_is_no_artifact(made: Path) -> None:
    with pytest.raises(CompressionError, match="did not finish") as refused:
        Artifact.open_folder(made / "base")
    assert refused.value.code == "no_artifact"


def test_another_base_is_refused_with_both_fingerprints(made: Path, tmp_path: Path) -> None:
    wanted = Artifact.open_folder(made / "artifact").manifest["base"]["fingerprint"]
    given = Artifact.open_folder(made / "artifact").manifest["variant"]["fingerprint"]
    with pytest.raises(CompressionError, match=f"{wanted}.*{given}") as refused:
        commands.restore(made / "artifact", base=made / "variant", out=tmp_path / "out", watch=silent)
    assert refused.value.code == "base_mismatch"
    found = commands.verify(made / "artifact", made / "variant")
    assert not found["ok"]
    assert wanted in found["problems"][0]
    assert given in found["problems"][0]
    assert commands.verify(made / "artifact", made / "base")["ok"]


def test_a_restored_folder_loads_and_answers_as_the_artifact_does(made: Path, tmp_path: Path) -> None:
    found = commands.restore(made / "artifact", base=made / "base", out=tmp_path / "out", watch=silent)
    assert found["tensors"] == 20
    assert not list(tmp_path.glob(".*"))
    restored = load_folder(tmp_path / "out")
    store = Store(tmp_path / "store")
    base = Checkpoint.open(store, attach_folder(store, made / "base"))
    loaded = artifacts.load_model(base, Artifact.open_folder(made / "artifact"))
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(restored(tokens).logits, loaded(tokens).logits)
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    tokenizer = artifacts.load_artifact_tokenizer(Artifact.open_folder(made / "artifact").with_base(base))
    assert tokenizer.decode(tokenizer("The fox")["input_ids"]) == "The fox"


def test_a_large_model_is_restored_in_shards(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_folder(restored(made, tmp_path / "whole")).state_dict()
    monkeypatch.setattr(artifacts, "SHARD_BYTES", 40_000)
    folder = restored(made, tmp_path / "sharded")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    for name, tensor in load_folder(folder).state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def restored(made: Path, out: Path) -> Path:
    commands.restore(made / "artifact", base=made / "base", out=out, watch=silent)
    return out


def compress(made: Path, out: Path) -> None:
    commands.compress(
        "bitdelta",
        base=made / "base",
        model=made / "variant",
        out=out,
        config=CONFIG,
        data=None,
        seed=0,
        device="cpu",
        watch=silent,
    )


def test_the_same_input_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    compress(made, tmp_path / "again")
    for path in (made / "artifact").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_place_that_is_taken_is_left_alone(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CompressionError, match="exists and is not empty") as refused:
        compress(made, tmp_path / "out")
    assert refused.value.code == "out_exists"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_an_empty_folder_may_be_given(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    compress(made, tmp_path / "out")
    assert commands.verify(tmp_path / "out", None)["ok"]


def test_a_refused_compression_leaves_nothing(made: Path, tmp_path: Path) -> None:
    other, _ = make_tiny_pair(tmp_path / "other", hidden=32)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CompressionError, match="tuned from"):
        commands.compress(
            "bitdelta",
            base=other,
            model=made / "variant",
            out=tmp_path / "out",
            config=CONFIG,
            data=None,
            seed=0,
            device="cpu",
            watch=silent,
        )
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_said_and_leaves_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, data: bytes) -> str:
        raise NoRoom("No space left on device")

    monkeypatch.setattr(Store, "write_bytes", full)
    with pytest.raises(CompressionError, match="nothing was left behind") as refused:
        compress(made, tmp_path / "out")
    assert refused.value.code == "disk_full"
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_the_folder_is_written_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def no_links(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(CompressionError, match="no room left") as refused:
        compress(made, tmp_path / "out")
    assert refused.value.code == "disk_full"
    assert not list(tmp_path.iterdir())
