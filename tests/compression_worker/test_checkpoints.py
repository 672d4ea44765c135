"""Importing, pairing, reading and loading checkpoints, with real folders and the real libraries."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression_worker.checkpoints import (
    Checkpoint,
    attach_folder,
    import_step,
    load_model,
    load_tokenizer,
    pair,
    read_manifest,
    require_pair,
    tokenizer_differs,
)
from compression_worker.contracts import CompressionError, StepContext, StepOutput, StepSpec
from compression_worker.store import NoRoom, Store
from tests.tiny import (
    fine_tuned,
    make_tiny_pair,
    tiny_config,
    tiny_state,
    write_checkpoint,
    write_json,
    write_tokenizer,
)

NORM = "model.norm.weight"
Edit = Callable[[Path], object]


@pytest.fixture(name="store")
def fixture_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def run_import(
    store: Store,
    root: Path,
    folder: str,
    *,
    base: str = "",
    licence: str = "",
    progress: list[tuple[int, int, str]] | None = None,
) -> StepOutput:
    spec = StepSpec(
        kind="checkpoint.import",
        params={"root": "imports", "folder": folder, "licence": licence},
        inputs={"base": base} if base else {},
    )
    seen = [] if progress is None else progress
    return import_step(
        StepContext(
            store=store,
            spec=spec,
            progress=lambda done, total, unit: seen.append((done, total, unit)),
            log=lambda text, level: None,
            measure=lambda name, value: None,
            import_roots={"imports": root},
        )
    )


def refusal(run: Callable[[], object]) -> CompressionError:
    with pytest.raises(CompressionError) as refused:
        run()
    return refused.value


def edit_weights(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors"
) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    edit(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def edit_json(folder: Path, file: str, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / file).read_text())
    edit(value)
    write_json(folder / file, value)


def edit_bytes(folder: Path, edit: Callable[[bytes], bytes], file: str = "model.safetensors") -> None:
    (folder / file).write_bytes(edit((folder / file).read_bytes()))


def big_header(folder: Path) -> None:
    raw = b"{" + b" " * 8_000_001 + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)


def as_symlink(folder: Path, file: str = "model.safetensors") -> None:
    (folder / file).rename(folder.parent / file)
    (folder / file).symlink_to(folder.parent / file)


def as_hard_link(folder: Path) -> None:
    os.link(folder / "config.json", folder.parent / "other name")


def as_fifo(folder: Path) -> None:
    (folder / "merges.txt").unlink(missing_ok=True)
    os.mkfifo(folder / "merges.txt")


ONE_FILE: dict[str, tuple[Edit, str, str]] = {
    "truncated": (lambda f: edit_bytes(f, lambda raw: raw[:-1]), "truncated_file", "1 bytes too short"),
    "emptied": (lambda f: edit_bytes(f, lambda raw: b""), "truncated_file", "copy it again"),
    "bytes appended": (lambda f: edit_bytes(f, lambda raw: raw + b"PK"), "tail_bytes", "2 bytes"),
    "header over 8 MB": (big_header, "header_too_large", "8,000,000"),
    "duplicate keys": (
        lambda f: edit_bytes(f, lambda raw: raw.replace(b"layers.0.mlp.up_proj", b"layers.1.mlp.up_proj", 1)),
        "duplicate_key",
        "model.layers.1.mlp.up_proj.weight",
    ),
    "a NaN": (
        lambda f: edit_weights(f, lambda t: t[NORM].__setitem__(3, float("nan"))),
        "not_finite",
        "'model.norm.weight' in 'model.safetensors' holds 1 values that are not finite (1 NaN, 0 infinite)",
    ),
    "infinities": (
        lambda f: edit_weights(f, lambda t: t[NORM].__setitem__(slice(0, 2), float("-inf"))),
        "not_finite",
        "(0 NaN, 2 infinite)",
    ),
    "8-byte floats": (
        lambda f: edit_weights(f, lambda t: t.update({NORM: t[NORM].double()})),
        "wrong_dtype",
        "'model.norm.weight'",
    ),
    "integers": (lambda f: edit_weights(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})), "wrong_dtype", "I8"),
    "a pickle beside": (lambda f: (f / "training_args.bin").write_bytes(b""), "pickle_file", "safe_serialization"),
    "a checkpoint of torch": (
        lambda f: torch_saved(f / "consolidated.pt"),
        "pickle_file",
        "consolidated.pt",
    ),
    "a pickle called safetensors": (lambda f: torch_saved(f / "model.safetensors"), "pickle_file", "zip archive"),
    "an archive called text": (
        lambda f: (f / "merges.txt").write_bytes(b"\x1f\x8b\x08\0"),
        "archive_file",
        "merges.txt",
    ),
    "an archive": (lambda f: (f / "model.tar.gz").write_bytes(b""), "archive_file", "unpack"),
    "code": (lambda f: (f / "modeling_llama.py").write_text("boom"), "unexpected_file", "modeling_llama.py"),
    "a folder inside": (lambda f: (f / "original").mkdir(), "unexpected_file", "original"),
    "a folder called weights": (lambda f: (f / "x.safetensors").mkdir(), "unexpected_file", "no regular file"),
    "a pipe": (as_fifo, "unexpected_file", "no regular file"),
    "weights behind a symbolic link": (as_symlink, "symlink", "cp -rL"),
    "config behind a symbolic link": (lambda f: as_symlink(f, "config.json"), "symlink", "config.json"),
    "a dangling link": (lambda f: (f / "merges.txt").symlink_to("/nowhere"), "symlink", "merges.txt"),
    "auto_map": (
        lambda f: edit_json(f, "config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"})),
        "auto_map",
        "remove the key",
    ),
    "auto_map of the tokenizer": (
        lambda f: edit_json(f, "tokenizer_config.json", lambda c: c.update(auto_map={"AutoTokenizer": ["x.Y", None]})),
        "auto_map",
        "tokenizer_config.json",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "missing_config", "config.json"),
    "config in another encoding": (
        lambda f: (f / "config.json").write_bytes('{"a": "é"}'.encode("latin-1")),
        "not_utf8",
        "config.json",
    ),
    "config cut": (lambda f: edit_bytes(f, lambda raw: raw[:-5], "config.json"), "bad_json", "config.json"),
    "tokenizer cut": (lambda f: edit_bytes(f, lambda raw: raw[:-5], "tokenizer.json"), "bad_json", "tokenizer.json"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_bytes(b""), "bad_json", "tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no_weights", ".safetensors"),
    "weights by another name": (
        lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
        "missing_index",
        "model.safetensors",
    ),
    "names that differ in case": (
        lambda f: shutil.copy(f / "model.safetensors", f / "Model.safetensors"),
        "unexpected_file",
        "case",
    ),
}


def torch_saved(path: Path) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        torch.save({"a": torch.zeros(1)}, file)


@pytest.mark.parametrize(("edit", "code", "words"), ONE_FILE.values(), ids=ONE_FILE.keys())
def test_it_refuses_bad_input_with_its_code_and_keeps_nothing(
    tmp_path: Path, store: Store, edit: Edit, code: str, words: str
) -> None:
    _, variant = make_tiny_pair(tmp_path)
    edit(variant)
    error = refusal(lambda: run_import(store, tmp_path, "variant"))
    assert error.code == code
    assert words in error.message
    assert "\n" not in error.message
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


SHARD = "model-00002-of-00003.safetensors"
SHARDED: dict[str, tuple[Edit, str, str]] = {
    "a shard missing": (lambda f: (f / SHARD).unlink(), "missing_shard", SHARD),
    "a shard too many": (
        lambda f: shutil.copy(f / SHARD, f / "model-00009-of-00009.safetensors"),
        "duplicate_tensor",
        "model-00009",
    ),
    "a foreign shard": (
        lambda f: save_file({"x": torch.zeros(1, dtype=torch.bfloat16)}, f / "extra.safetensors"),
        "extra_shard",
        "extra.safetensors",
    ),
    "two shards swapped": (
        lambda f: (
            (f / SHARD).rename(f / "x"),
            (f / "model-00001-of-00003.safetensors").rename(f / SHARD),
            (f / "x").rename(f / "model-00001-of-00003.safetensors"),
        ),
        "index_disagrees",
        "places",
    ),
    "a tensor that only the index knows": (
        lambda f: edit_json(f, "model.safetensors.index.json", lambda i: i["weight_map"].update({"x": SHARD})),
        "index_disagrees",
        "'x', which no shard holds",
    ),
    "a tensor that the index does not know": (
        lambda f: edit_json(f, "model.safetensors.index.json", lambda i: i["weight_map"].pop(NORM)),
        "index_disagrees",
        NORM,
    ),
    "an index that leads out": (
        lambda f: edit_json(
            f, "model.safetensors.index.json", lambda i: i["weight_map"].update({NORM: "../base/model.safetensors"})
        ),
        "bad_path",
        "../base",
    ),
    "an index without a map": (
        lambda f: write_json(f / "model.safetensors.index.json", {"metadata": {}}),
        "bad_index",
        "weight_map",
    ),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "missing_index", "index.json"),
    "a shard cut": (lambda f: edit_bytes(f, lambda raw: raw[:-7], SHARD), "truncated_file", SHARD),
}


@pytest.mark.parametrize(("edit", "code", "words"), SHARDED.values(), ids=SHARDED.keys())
def test_it_refuses_shards_that_disagree(tmp_path: Path, store: Store, edit: Edit, code: str, words: str) -> None:
    _, variant = make_tiny_pair(tmp_path, shards=3)
    edit(variant)
    error = refusal(lambda: run_import(store, tmp_path, "variant"))
    assert (error.code, words in error.message) == (code, True), error.message


@pytest.mark.parametrize("name", ["..", ".", "../imports", "/etc", "a/b", "", "a\0b", ".hidden", "x" * 201])
def test_a_folder_name_is_never_a_path(tmp_path: Path, store: Store, name: str) -> None:
    assert refusal(lambda: run_import(store, tmp_path, name)).code == "bad_path"


def test_it_does_not_follow_a_link_to_a_folder(tmp_path: Path, store: Store) -> None:
    make_tiny_pair(tmp_path / "elsewhere")
    (tmp_path / "imports").mkdir()
    (tmp_path / "imports" / "model").symlink_to(tmp_path / "elsewhere" / "base")
    assert refusal(lambda: run_import(store, tmp_path / "imports", "model")).code == "symlink"


def test_it_refuses_a_missing_folder_and_an_unknown_root(tmp_path: Path, store: Store) -> None:
    assert refusal(lambda: run_import(store, tmp_path, "nothing")).code == "missing_folder"
    assert refusal(lambda: run_import(store, tmp_path / "gone", "nothing")).code == "unknown_root"


def test_it_refuses_a_file_with_a_second_name_outside(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path)
    as_hard_link(base)
    assert refusal(lambda: run_import(store, tmp_path, "base")).code == "hard_link"


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, store: Store, change: str) -> None:
    base, _ = make_tiny_pair(tmp_path, shards=2)
    second = base / "model-00002-of-00002.safetensors"
    os.utime(second, (1, 1))  # so that a write shows in the time whatever the clock's grain

    class Meddler(list[tuple[int, int, str]]):
        """Changes the second shard while the first is copied."""

        def append(self, seen: tuple[int, int, str]) -> None:
            if not self:
                raw = second.read_bytes()
                second.write_bytes({"grow": raw + b"x", "shrink": raw[:-9], "rewrite": raw}[change])
            super().append(seen)

    error = refusal(lambda: run_import(store, tmp_path, "base", progress=Meddler()))
    assert (error.code, second.name in error.message) == ("file_changed", True)


def test_a_file_swapped_after_its_check_is_not_read(tmp_path: Path, store: Store) -> None:
    base, variant = make_tiny_pair(tmp_path, shards=2)
    name = "model-00002-of-00002.safetensors"
    original = (base / name).read_bytes()

    class Swapper(list[tuple[int, int, str]]):
        def append(self, seen: tuple[int, int, str]) -> None:
            if not self:
                (variant / name).replace(base / name)
            super().append(seen)

    output = run_import(store, tmp_path, "base", progress=Swapper())
    assert (base / name).read_bytes() != original
    assert store.read_bytes(output.blobs[name]) == original


def test_it_stops_for_room_before_it_copies(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_pair(tmp_path)
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1_000)
    with pytest.raises(NoRoom, match="1,000 free"):
        run_import(store, tmp_path, "base")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_import_holds_every_byte_of_the_folder(tmp_path: Path, store: Store, shards: int, tied: bool) -> None:
    base, _ = make_tiny_pair(tmp_path, shards=shards, tied=tied)
    seen: list[tuple[int, int, str]] = []
    output = run_import(store, tmp_path, "base", licence="MIT", progress=seen)
    manifest = read_manifest(store, output.data["checkpoint"])
    assert set(manifest["files"]) == {path.name for path in base.iterdir()}
    for path in base.iterdir():
        assert store.read_bytes(manifest["files"][path.name]["sha256"]) == path.read_bytes()
        assert output.blobs[path.name] == manifest["files"][path.name]["sha256"]
    weights = {name: t for path in sorted(base.glob("*.safetensors")) for name, t in load_file(path).items()}
    assert manifest["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert manifest["weight_bytes"] == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert manifest["size_bytes"] == sum(path.stat().st_size for path in base.iterdir())
    assert manifest["aliases"] == ([["lm_head.weight", "model.embed_tokens.weight"]] if tied else [])
    assert (manifest["architecture"], manifest["dtype"], manifest["licence"]) == ("LlamaForCausalLM", "BF16", "MIT")
    assert seen[-1] == (manifest["weight_bytes"], manifest["weight_bytes"], "bytes")
    with Checkpoint.open(store, output.data["checkpoint"]) as checkpoint:
        assert checkpoint.names == sorted(weights)
        for name, tensor in weights.items():
            assert torch.equal(checkpoint.tensor(name), tensor)
        head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        assert torch.equal(checkpoint.tensor("lm_head.weight"), head)


def test_sharding_does_not_change_the_fingerprint_but_a_weight_or_the_config_does(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    whole, variant = make_tiny_pair(tmp_path / "a")
    sharded, _ = make_tiny_pair(tmp_path / "b", shards=2)
    one, other, third = (read_manifest(store, attach_folder(store, path)) for path in (whole, sharded, variant))
    assert one["fingerprint"] == other["fingerprint"] != third["fingerprint"]
    edit_json(whole, "config.json", lambda config: config.update(rms_norm_eps=1e-6))
    assert read_manifest(store, attach_folder(store, whole))["fingerprint"] != one["fingerprint"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_not_finite_is_found_in_every_dtype(tmp_path: Path, store: Store, dtype: torch.dtype) -> None:
    base, _ = make_tiny_pair(tmp_path, dtype=dtype)
    run_import(store, tmp_path, "base")
    edit_weights(
        base, lambda tensors: tensors[NORM].__setitem__(slice(0, 3), torch.tensor([torch.nan, torch.inf, -torch.nan]))
    )
    assert (
        "3 values that are not finite (2 NaN, 1 infinite)"
        in refusal(lambda: run_import(store, tmp_path, "base")).message
    )


def test_the_licence_comes_from_the_model_card(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path)
    (base / "README.md").write_text("---\ntags:\n- llama\nlicense: apache-2.0\n---\n# Model\nlicense: other\n")
    (base / "LICENSE").write_bytes(b"\xff not opened")
    output = run_import(store, tmp_path, "base")
    assert output.data["manifest"]["licence"] == "apache-2.0"
    assert "README.md" not in output.blobs


def test_a_stored_copy_of_a_tied_head_is_an_alias_and_no_difference(tmp_path: Path, store: Store) -> None:
    _, variant = make_tiny_pair(tmp_path)
    edit_weights(variant, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    first = run_import(store, tmp_path, "base")
    second = run_import(store, tmp_path, "variant", base=first.data["checkpoint"])
    assert second.data["differences"] == []
    assert second.data["manifest"]["parameters"] == first.data["manifest"]["parameters"]
    assert second.data["manifest"]["aliases"] == [["lm_head.weight", "model.embed_tokens.weight"]]


def test_a_tied_head_that_differs_is_refused(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path)
    edit_weights(base, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    error = refusal(lambda: run_import(store, tmp_path, "base"))
    assert (error.code, "tie_word_embeddings" in error.message) == ("tied_weights_differ", True)


def test_an_import_lists_how_the_variant_differs_and_succeeds(tmp_path: Path, store: Store) -> None:
    _, variant = make_tiny_pair(tmp_path, tied=False)
    first = run_import(store, tmp_path, "base").data["checkpoint"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], tensors[name][:64]])
        tensors["extra"] = tensors.pop(NORM)
        tensors["model.layers.0.input_layernorm.weight"] = tensors["model.layers.0.input_layernorm.weight"].half()

    edit_weights(variant, change)
    edit_json(variant, "config.json", lambda config: config.update(vocab_size=352))
    write_tokenizer(variant, 280)
    data = run_import(store, tmp_path, "variant", base=first).data
    assert [(d["tensor"], d["kind"], d["base"], d["variant"]) for d in data["differences"]] == [
        (NORM, "missing", "BF16 [64]", ""),
        ("extra", "added", "", "BF16 [64]"),
        ("lm_head.weight", "shape", "BF16 [288, 64]", "BF16 [352, 64]"),
        ("model.embed_tokens.weight", "shape", "BF16 [288, 64]", "BF16 [352, 64]"),
        ("model.layers.0.input_layernorm.weight", "dtype", "BF16 [64]", "F16 [64]"),
    ]
    assert "the vocabulary grew from 288 to 352 tokens" in data["differences"][2]["text"]
    assert data["tokenizer_differs"] is True
    manifests = read_manifest(store, first), read_manifest(store, data["checkpoint"])
    assert refusal(lambda: require_pair(*manifests)).code == "missing_mismatch"
    assert "shrank from 352 to 288" in pair(manifests[1], manifests[0])[2]["text"]


def test_a_fitting_pair_has_no_difference(tmp_path: Path, store: Store) -> None:
    base, variant = make_tiny_pair(tmp_path, tied=False)
    one, other = (read_manifest(store, attach_folder(store, path)) for path in (base, variant))
    require_pair(one, other)
    assert pair(one, other) == []
    assert not tokenizer_differs(one, other)
    assert (
        refusal(lambda: require_pair(one, other | {"architecture": "GPT2LMHeadModel"})).code == "architecture_mismatch"
    )


def test_an_attached_folder_is_used_in_place(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path, shards=2)
    digest = attach_folder(store, base)
    assert run_import(Store(tmp_path / "copied"), tmp_path, "base").data["checkpoint"] == digest
    manifest = read_manifest(store, digest)
    for path in base.glob("*.safetensors"):
        blob = store.path(manifest["files"][path.name]["sha256"])
        assert (blob.is_symlink(), blob.resolve()) == (True, path.resolve())
    with Checkpoint.open(store, digest) as checkpoint:
        checkpoint.verify()
        assert load_file(checkpoint.folder / "model-00001-of-00002.safetensors").keys() <= set(checkpoint.names)
    edit_bytes(base, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "model-00001-of-00002.safetensors")
    assert refusal(Checkpoint.open(store, digest).verify).code == "damaged_blob"
    assert attach_folder(store, base) != digest


def test_attaching_refuses_what_an_import_refuses(tmp_path: Path, store: Store) -> None:
    base, variant = make_tiny_pair(tmp_path)
    as_symlink(base)
    assert refusal(lambda: attach_folder(store, base)).code == "symlink"
    (variant / "pytorch_model.bin").write_bytes(b"")
    assert refusal(lambda: attach_folder(store, variant)).code == "pickle_file"
    assert refusal(lambda: attach_folder(store, tmp_path / "nothing")).code == "missing_folder"


def test_a_loaded_model_computes_what_the_folder_says(tmp_path: Path, store: Store) -> None:
    from transformers import AutoModelForCausalLM

    base, _ = make_tiny_pair(tmp_path, shards=2)
    checkpoint = Checkpoint.open(store, run_import(store, tmp_path, "base").data["checkpoint"])
    tokens = load_tokenizer(checkpoint)("The quick brown fox", return_tensors="pt")["input_ids"]
    ours = load_model(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert not ours.training
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert load_model(checkpoint, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "code"), [("model.layers.0.mlp.up_proj.weight", "missing_tensor"), ("lm_head.weight", "missing_tensor")]
)
def test_it_refuses_to_fill_a_gap_with_random_weights(tmp_path: Path, store: Store, name: str, code: str) -> None:
    base, _ = make_tiny_pair(tmp_path, tied=False)
    edit_weights(base, lambda tensors: tensors.pop(name))
    checkpoint = Checkpoint.open(store, attach_folder(store, base))
    error = refusal(lambda: load_model(checkpoint))
    assert (error.code, name in error.message) == (code, True)


def test_it_refuses_to_drop_a_tensor(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(base, lambda tensors: tensors.update({bias: torch.ones(64, dtype=torch.bfloat16)}))
    error = refusal(lambda: load_model(Checkpoint.open(store, attach_folder(store, base))))
    assert (error.code, bias in error.message) == ("unexpected_tensor", True)


def test_a_config_of_another_shape_is_refused_when_loaded(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path)
    edit_json(base, "config.json", lambda config: config.update(intermediate_size=96))
    checkpoint = Checkpoint.open(store, attach_folder(store, base))
    assert refusal(lambda: load_model(checkpoint)).code in ("mismatched_tensor", "unloadable_model")


def test_an_unknown_architecture_is_refused_when_loaded(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path)
    edit_json(base, "config.json", lambda config: config.update(model_type="nothing", architectures=["NothingLM"]))
    checkpoint = Checkpoint.open(store, attach_folder(store, base))
    assert refusal(lambda: load_model(checkpoint)).code == "unloadable_model"


def test_a_checkpoint_without_tokenizer_says_so(tmp_path: Path, store: Store) -> None:
    base, _ = make_tiny_pair(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    checkpoint = Checkpoint.open(store, attach_folder(store, base))
    assert refusal(lambda: load_tokenizer(checkpoint)).code == "missing_tokenizer"


def test_a_file_larger_than_a_chunk_is_read_whole(tmp_path: Path, store: Store) -> None:
    generator = torch.Generator().manual_seed(1)
    state = tiny_state(generator, tied=True, vocab=40_000, layers=1)
    tuned = {name: tensor.bfloat16() for name, tensor in fine_tuned(state, generator).items()}
    write_checkpoint(tmp_path / "big", tuned, tiny_config(vocab=40_000, layers=1))
    output = run_import(store, tmp_path, "big")
    with Checkpoint.open(store, output.data["checkpoint"]) as checkpoint:
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tuned.items())
        checkpoint.verify()
    edit_weights(tmp_path / "big", lambda t: t["model.embed_tokens.weight"].__setitem__((39_999, 63), float("inf")))
    assert refusal(lambda: run_import(store, tmp_path, "big")).code == "not_finite"
