"""Mixtures whose experts lie stacked on disk are taken in with a matrix for each expert, the same to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression_worker.checkpoints import Checkpoint, attach_folder, import_step, load_model, read_manifest
from compression_worker.contracts import CompressionError, StepContext, StepSpec
from compression_worker.store import Store
from tests.families import MIXTURES, VOCAB, edit_weights, make_model
from tests.tiny import write_tokenizer


def saved(folder: Path, family: str, *, stacked: bool, shard_size: str = "5GB") -> Path:
    make_model(family).save_pretrained(folder, save_original_format=not stacked, max_shard_size=shard_size)
    write_tokenizer(folder, VOCAB)
    return folder


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"], ids=["one file", "shards"])
def test_both_ways_of_saving_give_one_fingerprint(tmp_path: Path, family: str, shard_size: str) -> None:
    folders = [saved(tmp_path / str(way), family, stacked=way, shard_size=shard_size) for way in (False, True)]
    store = Store(tmp_path / "store")
    plain, other = (Checkpoint.open(store, attach_folder(store, folder)) for folder in folders)
    assert any(name.endswith("experts.gate_up_proj") for name in all_names(folders[1]))
    assert other.fingerprint == plain.fingerprint
    other.verify()
    model = load_model(other)
    for name, tensor in make_model(family).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def all_names(folder: Path) -> list[str]:
    return [name for file in folder.glob("*.safetensors") for name in load_file(file)]


def test_an_import_writes_the_same_as_an_attached_folder(tmp_path: Path) -> None:
    saved(tmp_path / "roots" / "mix", "mixtral", stacked=True)
    store = Store(tmp_path / "store")
    spec = StepSpec(kind="checkpoint.import", params={"root": "r", "folder": "mix"}, inputs={})
    output = import_step(
        StepContext(
            store=store,
            spec=spec,
            progress=lambda done, total, unit: None,
            log=lambda text, level: None,
            measure=lambda name, value: None,
            import_roots={"r": tmp_path / "roots"},
        )
    )
    other = Store(tmp_path / "other")
    attached = read_manifest(other, attach_folder(other, tmp_path / "roots" / "mix"))
    assert read_manifest(store, output.data["checkpoint"]) == attached
    sizes = {name: entry["size"] for name, entry in attached["files"].items()}
    assert sizes == {name: store.size(entry["sha256"]) for name, entry in attached["files"].items()}


def test_a_stack_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mix", "mixtral", stacked=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(CompressionError, match=r"not what config\.json promises") as refused:
        attach_folder(Store(tmp_path / "store"), folder)
    assert refused.value.code == "shape_mismatch"


def test_experts_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mix", "mixtral", stacked=True)
    extra = {"model.layers.0.block_sparse_moe.experts.0.w1.weight": torch.zeros(40, 32)}
    edit_weights(folder, lambda state: state | extra)
    with pytest.raises(CompressionError, match="keep one of them"):
        attach_folder(Store(tmp_path / "store"), folder)


def test_three_dimensions_of_another_kind_are_left_as_they_are(tmp_path: Path) -> None:
    folder = saved(tmp_path / "plain", "llama", stacked=False)
    before = {**load_file(folder / "model.safetensors"), "extra": torch.ones(2, 3, 4)}
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    store = Store(tmp_path / "store")
    manifest = read_manifest(store, attach_folder(store, folder))
    assert manifest["tensors"]["extra"]["shape"] == [2, 3, 4]
    assert store.path(manifest["files"]["model.safetensors"]["sha256"]).resolve() == folder / "model.safetensors"
