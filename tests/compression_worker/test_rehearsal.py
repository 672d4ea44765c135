"""The rehearsal of a rollback: it proves what it says, and finds the damage that would make a rollback fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compression_worker.checkpoints import Checkpoint, attach_folder, load_model, load_tokenizer
from compression_worker.contracts import CompressionError, StepContext, StepOutput, StepSpec, canonical_json
from compression_worker.rehearsal import _compare_tensors, rehearse_step
from compression_worker.store import Store
from tests.tiny import make_tiny_pair

PROMPT = "The quick brown fox"


@pytest.fixture(name="store")
def fixture_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(name="digest", params=[(1, True), (2, False)], ids=["tied", "sharded, untied"])
def fixture_digest(tmp_path: Path, store: Store, request: pytest.FixtureRequest) -> str:
    shards, tied = request.param
    _, variant = make_tiny_pair(tmp_path, shards=shards, tied=tied)
    return attach_folder(store, variant)


def rehearse(store: Store, digest: str, prompt: str = PROMPT, measured: dict[str, float] | None = None) -> StepOutput:
    return rehearse_step(
        StepContext(
            store=store,
            spec=StepSpec(kind="release.rehearse", params={"prompt": prompt}, inputs={"variant": digest}),
            progress=lambda done, total, unit: None,
            log=lambda text, level: None,
            measure=(measured if measured is not None else {}).__setitem__,
        )
    )


def test_it_answers_as_the_full_precision_model_does(store: Store, digest: str) -> None:
    measured: dict[str, float] = {}
    data = rehearse(store, digest, measured=measured).data
    checkpoint = Checkpoint.open(store, digest)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    tokens = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    wanted: list[int] = []
    with torch.inference_mode():
        while len(wanted) < 32 and (not wanted or wanted[-1] != tokenizer.eos_token_id):
            wanted.append(
                int(model(torch.cat([tokens[0], torch.tensor(wanted, dtype=torch.long)])[None]).logits[0, -1].argmax())
            )
    assert data["answer"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert (data["files"], data["bytes"]) == (len(checkpoint.manifest["files"]), checkpoint.manifest["size_bytes"])
    assert data["tensors"] == len(checkpoint.names)
    assert measured["seconds"] > 0
    assert rehearse(store, digest).data == data


def test_it_finds_a_damaged_file(store: Store, digest: str) -> None:
    entry = next(
        entry
        for name, entry in Checkpoint.open(store, digest).manifest["files"].items()
        if name.endswith(".safetensors")
    )
    file = store.path(entry["sha256"]).resolve()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CompressionError) as refused:
        rehearse(store, digest)
    assert refused.value.code == "damaged_blob"


def test_it_finds_a_manifest_that_names_another_tensor(store: Store, digest: str) -> None:
    manifest = Checkpoint.open(store, digest).manifest
    manifest["tensors"]["model.norm.weight"]["sha256"] = "0" * 64
    with pytest.raises(CompressionError, match=r"model\.norm\.weight") as refused:
        rehearse(store, store.write_bytes(canonical_json(manifest)))
    assert refused.value.code == "damaged_tensor"


def test_it_finds_a_model_that_holds_other_values(store: Store, digest: str) -> None:
    checkpoint = Checkpoint.open(store, digest)
    model = load_model(checkpoint)
    _compare_tensors(checkpoint, model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(CompressionError, match="holds other values"):
        _compare_tensors(checkpoint, model)


def test_it_refuses_an_empty_prompt(store: Store, digest: str) -> None:
    with pytest.raises(CompressionError) as refused:
        rehearse(store, digest, prompt="")
    assert refused.value.code == "empty_prompt"
