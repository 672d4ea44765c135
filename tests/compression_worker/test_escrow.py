"""Escrow: whatever a checkpoint holds comes back bit for bit, and damage is never taken for weights."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compression_worker import catalog
from compression_worker.artifact import write_folder
from compression_worker.checkpoints import Checkpoint, attach_folder, make_manifest
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec, canonical_json
from compression_worker.escrow import coding, layout, steps
from compression_worker.escrow.estimate import escrow_estimate
from compression_worker.escrow.rebuilding import restore_folder
from compression_worker.preflight import Model
from compression_worker.runner import Runner, run_plan
from compression_worker.store import Store
from tests.tiny import make_tiny_pair, tiny_config, write_json, write_tokenizer

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SPECIAL = {
    "BF16": [0x7FC1, 0xFFFF, 0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x8001, 0x7F81, 0x3F80],
    "F16": [0x7E01, 0xFFFF, 0x7C00, 0xFC00, 0x8000, 0x0000, 0x0001, 0x83FF, 0x7C01, 0x3C00],
    "F32": [0x7FC00001, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x807FFFFF, 0x7F800001, 0x3F800000],
}
"""NaN with payloads, infinities, both zeros, denormals: what no gate lets in, and what no coder may touch."""


@pytest.fixture(name="store")
def fixture_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", durable=False)


def put(store: Store, folder: Path, state: Mapping[str, torch.Tensor], *, tied: bool = False, shards: int = 1) -> str:
    """A checkpoint in the store, past the gate, which lets no NaN in; the digest of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(tiny_config(tied=tied))
    write_json(folder / "config.json", config)
    write_tokenizer(folder)
    tensors: dict[str, Json] = {}
    for shard in range(shards):
        names = sorted(state)[shard::shards]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        for name in names:
            raw = state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            dtype = next(word for word, kind in DTYPES.items() if kind == state[name].dtype)
            facts = {"dtype": dtype, "shape": list(state[name].shape), "file": file}
            tensors[name] = facts | {"sha256": hashlib.sha256(raw).hexdigest()}
    files = {
        path.name: {"sha256": store.write_file(path), "size": path.stat().st_size} for path in sorted(folder.iterdir())
    }
    return store.write_bytes(canonical_json(make_manifest(files, tensors, config, "")))


def kept(store: Store, base: str, variant: str) -> StepOutput:
    """The output of an escrow's last step."""
    return run_plan(store, StepSpec(kind="escrow.plan", inputs={"base": base, "variant": variant}), device="cpu")


def restored(output: StepOutput, source: Store, target: Path, base: str) -> Store:
    """Another store, which holds the escrow and the base alone, after a restore."""
    other = Store(target, durable=False)
    base_files = [e["sha256"] for e in Checkpoint.open(source, base).manifest["files"].values()]
    for digest in (base, *base_files, *output.blobs.values()):
        other.write_file(source.path(digest))
    spec = StepSpec(kind="escrow.restore", inputs={"escrow": output.data["escrow"], "base": base})
    Runner(store=other, device="cpu").compute(spec, lambda event: None)
    return other


def check_restores(store: Store, tmp_path: Path, base: str, variant: str) -> StepOutput:
    output = kept(store, base, variant)
    other = restored(output, store, tmp_path / "other", base)
    manifest = Checkpoint.open(other, variant).manifest
    for name, entry in manifest["files"].items():
        assert other.path(entry["sha256"]).read_bytes() == store.path(entry["sha256"]).read_bytes(), name
    assert output.data["variant"] == variant
    return output


def random_state(seed: int, dtype: str, rows: int = 96) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (rows, 32),
        "model.layers.0.mlp.up_proj.weight": (64, 33),
        "model.norm.weight": (32,),
        "scalar": (),
        "empty": (0, 4),
    }
    return {
        name: (0.05 * torch.randn(shape, generator=generator)).to(DTYPES[dtype]).clone()
        for name, shape in shapes.items()
    }


def tuned(state: Mapping[str, torch.Tensor], seed: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (one.float() + 0.001 * torch.randn(one.shape, generator=generator)).to(one.dtype)
        for name, one in state.items()
    }


def salted(state: dict[str, torch.Tensor], dtype: str, shift: int) -> dict[str, torch.Tensor]:
    """``state`` with every special pattern in its norm; ``shift`` turns them, so that base and variant differ."""
    kind = coding.LAYOUTS[dtype].unsigned
    special = np.roll(np.array(SPECIAL[dtype], kind), shift)
    row = state["model.norm.weight"].view(torch.uint8).numpy().view(kind)
    row[: special.size] = special
    return state


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shards", [1, 2])
def test_every_bit_comes_back(store: Store, tmp_path: Path, dtype: str, shards: int) -> None:
    base_state = random_state(1, dtype)
    variant_state = salted(tuned(base_state), dtype, 3)
    base = put(store, tmp_path / "base", salted(base_state, dtype, 0))
    check_restores(store, tmp_path, base, put(store, tmp_path / "variant", variant_state, shards=shards))


def test_rows_that_were_added_cost_only_themselves(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "BF16")
    variant_state = tuned(base_state)
    more = torch.cat([variant_state["model.embed_tokens.weight"], torch.ones(7, 32, dtype=torch.bfloat16)])
    variant_state["model.embed_tokens.weight"] = more
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", variant_state)
    output = check_restores(store, tmp_path, base, variant)
    line = manifest_of(store, output)["tensors"]["model.embed_tokens.weight"]
    assert (line["kind"], line["shared"]) == ("difference", 96 * 32)


def test_rows_that_were_removed_are_no_trouble(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "F16")
    variant_state = tuned(base_state)
    variant_state["model.embed_tokens.weight"] = variant_state["model.embed_tokens.weight"][:50].clone()
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", variant_state)
    check_restores(store, tmp_path, base, variant)


def test_a_tensor_without_its_like_in_the_base_is_kept_without_it(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "BF16")
    variant_state = tuned(base_state)
    del base_state["model.norm.weight"]  # none of its name
    variant_state["model.layers.0.mlp.up_proj.weight"] = torch.ones(64, 20, dtype=torch.bfloat16)  # of another width
    variant_state["model.embed_tokens.weight"] = variant_state["model.embed_tokens.weight"].float()  # of another dtype
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", variant_state)
    output = check_restores(store, tmp_path, base, variant)
    kinds = {name: line["kind"] for name, line in manifest_of(store, output)["tensors"].items()}
    assert [name for name, kind in kinds.items() if kind == "plain"] == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
    ]


def test_what_is_kept_already_is_not_kept_again(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "BF16")
    variant_state = tuned(base_state) | {"model.norm.weight": base_state["model.norm.weight"]}
    variant_state["lm_head.weight"] = variant_state["model.embed_tokens.weight"].clone()
    base = put(store, tmp_path / "base", base_state, tied=True)
    variant = put(store, tmp_path / "variant", variant_state, tied=True)
    lines = manifest_of(store, check_restores(store, tmp_path, base, variant))["tensors"]
    assert lines["model.norm.weight"] == {"kind": "base", "of": "model.norm.weight"}
    assert {lines["lm_head.weight"]["kind"], lines["model.embed_tokens.weight"]["kind"]} == {"copy", "difference"}


def test_a_head_that_was_untied_is_a_difference_to_the_embeddings(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "BF16")
    variant_state = tuned(base_state)
    variant_state["lm_head.weight"] = tuned(base_state, 10)["model.embed_tokens.weight"]
    base, variant = put(store, tmp_path / "base", base_state, tied=True), put(store, tmp_path / "v", variant_state)
    lines = manifest_of(store, check_restores(store, tmp_path, base, variant))["tensors"]
    assert (lines["lm_head.weight"]["kind"], lines["lm_head.weight"]["of"]) == (
        "difference",
        "model.embed_tokens.weight",
    )


def test_equal_checkpoints_cost_nearly_nothing(store: Store, tmp_path: Path) -> None:
    base = put(store, tmp_path / "base", random_state(1, "BF16"))
    variant = put(store, tmp_path / "variant", random_state(1, "BF16"), shards=2)
    output = check_restores(store, tmp_path, base, variant)
    assert not [name for name in output.blobs if name.startswith("codes")]


def test_several_groups_and_chunks_make_one_escrow(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GROUP_BYTES", 5000)
    monkeypatch.setattr(coding, "CHUNK_ELEMENTS", 100)
    base_state = random_state(1, "F32")
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", tuned(base_state))
    output = check_restores(store, tmp_path, base, variant)
    assert len([name for name in output.blobs if name.startswith("codes")]) == 3


def test_the_ledger_counts_every_byte_and_the_same_input_gives_the_same_bytes(store: Store, tmp_path: Path) -> None:
    base, variant = (attach_folder(store, one) for one in make_tiny_pair(tmp_path))
    output = kept(store, base, variant)
    assert output.data["artifact_bytes"] == sum(store.size(digest) for digest in output.blobs.values())
    assert sum(part["bytes"] for part in output.data["parts"]) == output.data["artifact_bytes"]
    again = Store(tmp_path / "again", durable=False)
    for folder in ("base", "variant"):
        attach_folder(again, tmp_path / folder)
    assert kept(again, base, variant).data["escrow"] == output.data["escrow"]


def test_a_fine_tune_takes_a_fraction_of_a_second_copy(store: Store, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (0.02 * torch.randn(512, 1024, generator=generator)).bfloat16()
    moved = (weights.float() + 2e-5 * torch.randn(weights.shape, generator=generator)).bfloat16()
    base = put(store, tmp_path / "base", {"model.embed_tokens.weight": weights})
    variant = put(store, tmp_path / "variant", {"model.embed_tokens.weight": moved})
    codes = next(part["bytes"] for part in kept(store, base, variant).data["parts"] if part["name"] == "codes")
    assert codes < moved.nbytes / 4


@pytest.mark.parametrize("place", ["start", "middle", "end", "cut", "gone"])
def test_damage_is_refused_wherever_it_is(store: Store, tmp_path: Path, place: str) -> None:
    base_state = random_state(1, "BF16")
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", tuned(base_state))
    folder = tmp_path / "escrow"
    write_folder(folder, store, kept(store, base, variant).blobs)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.chmod(0o600)
        hurt(path, place)
        with pytest.raises(CompressionError) as caught:
            restore_to(folder, store, base, tmp_path / "out")
        assert caught.value.code == (
            "no_escrow" if (place, path.name) == ("gone", "manifest.json") else "damaged_escrow"
        )
        assert not (tmp_path / "out").exists()
        path.write_bytes(whole)
    restore_to(folder, store, base, tmp_path / "out")


def restore_to(folder: Path, store: Store, base: str, out: Path) -> None:
    restore_folder(layout.Escrow.open_folder(folder), Checkpoint.open(store, base), out, lambda *args: None)


def hurt(path: Path, place: str) -> None:
    if place == "gone":
        path.unlink()
        return
    raw = bytearray(path.read_bytes())
    if place == "cut":
        del raw[len(raw) // 2 :]
    else:
        raw[{"start": 0, "middle": len(raw) // 2, "end": -1}[place]] ^= 1
    path.write_bytes(raw)


def test_codes_that_were_replaced_together_with_their_digests_do_not_pass(store: Store, tmp_path: Path) -> None:
    """Someone who can write a manifest cannot pass other weights off: the checkpoint's own digests decide."""
    base_state = random_state(1, "BF16")
    base = put(store, tmp_path / "base", base_state)
    mine, other = (
        kept(store, base, put(store, tmp_path / name, tuned(base_state, seed))) for name, seed in (("a", 5), ("b", 6))
    )
    forged = rewritten(
        manifest_of(store, mine), lambda value: value["files"].update(codes_of(manifest_of(store, other)))
    )
    with pytest.raises(CompressionError, match="does not match its digest") as caught:
        restore(store, forged, base)
    assert caught.value.code == "damaged_escrow"


def codes_of(manifest: Json) -> Json:
    return {name: entry for name, entry in manifest["files"].items() if name.startswith("codes")}


def rewritten(manifest: Json, change: Callable[[Json], object]) -> bytes:
    """A manifest that fits its own digest after ``change``."""
    body = {key: value for key, value in json.loads(canonical_json(manifest)).items() if key != "self_sha256"}
    change(body)
    return canonical_json(body | {"self_sha256": hashlib.sha256(canonical_json(body)).hexdigest()})


def restore(store: Store, manifest: bytes, base: str) -> None:
    spec = StepSpec(kind="escrow.restore", inputs={"escrow": store.write_bytes(manifest), "base": base})
    variant = json.loads(manifest)["variant"]["checkpoint"]
    for name, entry in Checkpoint.open(store, variant).manifest["files"].items():
        if layout.is_weights(name):
            store.remove([entry["sha256"]])
    Runner(store=store, device="cpu").compute(spec, lambda event: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(format="deltaworks-escrow-2"),
        lambda value: value["tensors"]["model.norm.weight"].update(kind="hashed"),
        lambda value: value["tensors"]["model.norm.weight"].update(extra=1),
        lambda value: value["tensors"]["model.norm.weight"].update(file="gone.safetensors"),
        lambda value: value.update(chunk_elements=1 << 40),
    ],
)
def test_a_reader_refuses_what_it_does_not_know(store: Store, tmp_path: Path, change: Callable[[Json], object]) -> None:
    base_state = random_state(1, "BF16")
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", tuned(base_state))
    with pytest.raises(CompressionError) as caught:
        layout.parse_manifest(rewritten(manifest_of(store, kept(store, base, variant)), change))
    assert caught.value.code == "unknown_format"


def test_another_base_is_refused(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "BF16")
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", tuned(base_state))
    other = put(store, tmp_path / "other", random_state(2, "BF16"))
    manifest = store.read_bytes(kept(store, base, variant).data["escrow"])
    with pytest.raises(CompressionError, match="fingerprint") as caught:
        restore(store, manifest, other)
    assert caught.value.code == "base_mismatch"


def test_a_damaged_base_is_named_as_what_is_damaged(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "BF16")
    base, variant = put(store, tmp_path / "base", base_state), put(store, tmp_path / "variant", tuned(base_state))
    manifest = store.read_bytes(kept(store, base, variant).data["escrow"])
    files = Checkpoint.open(store, base).manifest["files"]
    path = store.path(next(entry["sha256"] for name, entry in files.items() if layout.is_weights(name)))
    path.chmod(0o600)
    hurt(path, "end")
    with pytest.raises(CompressionError, match="of the base") as caught:
        restore(store, manifest, base)
    assert caught.value.code == "damaged_base"


def test_a_restore_goes_on_where_it_was_stopped(store: Store, tmp_path: Path) -> None:
    base_state = random_state(1, "BF16")
    base = put(store, tmp_path / "base", base_state)
    variant = put(store, tmp_path / "variant", tuned(base_state), shards=2)
    output = kept(store, base, variant)
    first, second = (
        entry["sha256"]
        for name, entry in Checkpoint.open(store, variant).manifest["files"].items()
        if layout.is_weights(name)
    )
    before = store.path(first).stat().st_mtime_ns
    store.remove([second])
    spec = StepSpec(kind="escrow.restore", inputs={"escrow": output.data["escrow"], "base": base})
    Runner(store=store, device="cpu").compute(spec, lambda event: None)
    assert store.path(first).stat().st_mtime_ns == before
    store.verify(second)


def test_memory_stays_a_few_chunks_whatever_the_size_of_a_tensor(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coding, "CHUNK_ELEMENTS", 1 << 15)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1 << 11, 1 << 11, generator=generator).bfloat16()
    moved = (weights.float() * 1.01).bfloat16()
    base = put(store, tmp_path / "base", {"model.embed_tokens.weight": weights})
    variant = put(store, tmp_path / "variant", {"model.embed_tokens.weight": moved})
    tracemalloc.start()
    try:
        output = kept(store, base, variant)
        restore(store, store.read_bytes(output.data["escrow"]), base)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < moved.nbytes / 2


def manifest_of(store: Store, output: StepOutput) -> Any:
    return json.loads(store.read_bytes(output.data["escrow"]))


def test_the_estimate_counts_the_steps_and_the_work_of_the_plan(store: Store, tmp_path: Path) -> None:
    base, variant = (attach_folder(store, one) for one in make_tiny_pair(tmp_path))
    manifest = Checkpoint.open(store, variant).manifest
    sizes = {name: manifest[name] for name in ("config", "parameters", "weight_bytes", "size_bytes")}
    found = escrow_estimate(Model(**sizes))
    spec = StepSpec(kind="escrow.plan", inputs={"base": base, "variant": variant})
    planned = Runner(store=store, device="cpu").compute(spec, lambda event: None)[1].steps
    for load in found.steps[1:]:
        steps_of_kind = [step for step in planned if step.kind == load.kind]
        work = catalog.load(catalog.need(load.kind).work)
        assert load.count == len(steps_of_kind), load.kind
        assert load.units == sum(work(step.params, found.sizes) for step in steps_of_kind), load.kind
    assert kept(store, base, variant).data["artifact_bytes"] < found.needed_bytes
