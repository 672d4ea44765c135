"""Nothing is believed before it is hashed: damage anywhere is refused by file name; later damage cannot reach memory."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression_worker.checkpoints import attach_folder
from compression_worker.contracts import CompressionError
from compression_worker.serving.generation import Sampling
from compression_worker.serving.loading import LoadAbandoned, Loader, finished, own_memory
from compression_worker.serving.variants import Resident
from compression_worker.store import Store
from tests.compression_worker.serving.conftest import resident_from
from tests.compression_worker.serving.stored import Models
from tests.compression_worker.serving.test_generation import text_of

FAULTS = 120


def never() -> bool:
    return False


def load(models: Models, store: Store, what: str) -> Resident:
    loader = Loader(store)
    if what == "variant":
        return loader.full_precision(models.variant_digest, never)
    return loader.compressed(models.artifact_digest, models.base_digest, never)


@pytest.fixture
def store(models: Models, tmp_path: Path) -> Store:
    """A copy that a test may damage."""
    shutil.copytree(models.store.root, tmp_path / "store", symlinks=True)
    return Store(tmp_path / "store")


def overwrite(store: Store, digest: str, raw: bytes) -> None:
    path = store.path(digest)
    path.chmod(0o644)
    path.write_bytes(raw)


def named_files(models: Models, what: str) -> dict[str, str]:
    """File name -> digest of all that loading ``what`` has to believe, the manifests included."""
    manifests = {"variant": [models.variant_digest], "compressed": [models.artifact_digest, models.base_digest]}[what]
    found = {}
    for digest in manifests:
        found[f"manifest of {digest[:12]}"] = digest
        found |= {name: entry["sha256"] for name, entry in json.loads(models.store.read_bytes(digest))["files"].items()}
    return found


@pytest.mark.parametrize("what", ["variant", "compressed"])
def test_random_damage_to_any_file_is_refused(models: Models, store: Store, what: str) -> None:
    chance, files = random.Random(7), sorted(named_files(models, what).items())
    for _ in range(FAULTS):
        _, digest = chance.choice(files)
        sound = store.path(digest).read_bytes()
        broken = bytearray(sound)
        match chance.choice(["flip", "cut", "append"]):
            case "flip":
                broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
            case "cut":
                del broken[chance.randrange(len(broken)) :]
            case "append":
                broken += b"\x00"
        overwrite(store, digest, bytes(broken))
        with pytest.raises(CompressionError):
            load(models, store, what)
        overwrite(store, digest, sound)
    assert load(models, store, what).model is not None


@pytest.mark.parametrize("what", ["variant", "compressed"])
def test_a_refusal_names_the_file(models: Models, store: Store, what: str) -> None:
    for name, digest in named_files(models, what).items():
        sound = store.path(digest).read_bytes()
        store.path(digest).unlink()
        with pytest.raises(CompressionError) as refused:
            load(models, store, what)
        assert name in refused.value.message or (name.startswith("manifest") and digest[:12] in refused.value.message)
        store.path(digest).write_bytes(sound)


@pytest.mark.parametrize("what", ["variant", "compressed"])
def test_what_answers_lives_on_when_its_files_are_cut(models: Models, store: Store, what: str) -> None:
    resident = load(models, store, what)
    before = text_of(resident, models.prompt, Sampling(max_tokens=24, temperature=0.0))
    for blob in (store.root / "sha256").glob("*/*"):
        blob.chmod(0o644)
        blob.write_bytes(b"")
    assert text_of(resident, models.prompt, Sampling(max_tokens=24, temperature=0.0)) == before
    assert before == models.answers[resident.digest]


def test_tensors_leave_the_file_that_they_were_mapped_from(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(6.0).reshape(2, 3)}, tmp_path / "mapped.safetensors")
    mapped = load_file(tmp_path / "mapped.safetensors")["weight"]
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False))
    model[0].weight = torch.nn.Parameter(mapped)
    model[1].weight = torch.nn.Parameter(mapped)
    own_memory(model)
    assert model[0].weight.data_ptr() != mapped.data_ptr()
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr(), "tensors that shared memory still share it"
    assert torch.equal(model[0].weight, torch.arange(6.0).reshape(2, 3))


def test_another_base_is_refused_with_both_fingerprints(models: Models, store: Store, tmp_path: Path) -> None:
    """One weight of the base moved by one step of bf16: a sound checkpoint, and the wrong one."""
    folder = tmp_path / "other"
    shutil.copytree(store.view({n: d for n, d in named_files(models, "compressed").items() if n in BASE_FILES}), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].view(torch.int16)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    other = attach_folder(store, folder)
    with pytest.raises(CompressionError) as refused:
        Loader(store).compressed(models.artifact_digest, other, never)
    assert refused.value.code == "base_mismatch"
    ours = json.loads(store.read_bytes(models.base_digest))["fingerprint"]
    theirs = json.loads(store.read_bytes(other))["fingerprint"]
    assert ours in refused.value.message
    assert theirs in refused.value.message


BASE_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_an_abandoned_load_ends_early(models: Models) -> None:
    with pytest.raises(LoadAbandoned):
        Loader(models.store).full_precision(models.variant_digest, lambda: True)


def test_a_model_that_answers_with_nan_is_refused(tiny_folders: tuple[Path, Path]) -> None:
    broken = resident_from(tiny_folders[0], "d" * 64)
    with torch.no_grad():
        broken.model.model.norm.weight[0] = float("inf")
    with pytest.raises(CompressionError) as refused:
        finished(broken.digest, broken.model, broken.tokenizer, never)
    assert refused.value.code == "not_finite"
