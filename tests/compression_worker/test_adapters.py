"""PEFT adapters as variants: the merge agrees with the library's, and what cannot be merged is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression_worker.adapters import CONFIG_FILE, WEIGHTS_FILE, check_adapter_config, is_adapter
from compression_worker.checkpoints import Checkpoint, attach_folder, import_step, load_model, read_manifest
from compression_worker.contracts import CompressionError, StepContext, StepSpec
from compression_worker.store import Store
from tests.families import make_family_pair
from tests.peft_adapters import edit_adapter_config, edit_adapter_weights, make_adapter
from tests.tiny import write_tokenizer

ATTENTION = ["q_proj", "v_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {"target_modules": ATTENTION}),
    "all linears": ("llama-untied", {"target_modules": "all-linear"}),
    "odd sizes": ("odd", {"target_modules": ["q_proj", "down_proj"], "r": 3}),
    "rsLoRA": ("mistral", {"target_modules": ATTENTION, "use_rslora": True, "r": 8}),
    "DoRA": ("qwen3", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "fused matrices": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "trained biases": ("qwen2", {"target_modules": ATTENTION, "bias": "lora_only"}),
    "weights the other way round": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "DoRA the other way round": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "embeddings and head": ("llama-untied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "a head of its own": ("llama-untied", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "norms": ("gemma2", {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm"]}),
    "a rank and an alpha for some": (
        "llama",
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
        },
    ),
    "a mixture of experts": ("mixtral", {"target_modules": ATTENTION}),
}


class Bench:
    """A base in a store, and room for adapters on it."""

    def __init__(self, folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.base_dir, _ = make_family_pair(folder, family, dtype=dtype)
        self.store = Store(folder / "store")
        self.base = attach_folder(self.store, self.base_dir)
        self.adapter = folder / "adapter"

    def make(self, **settings: Any) -> dict[str, torch.Tensor]:
        return make_adapter(self.base_dir, self.adapter, **{"target_modules": ATTENTION} | settings)

    def merged(self) -> Checkpoint:
        return Checkpoint.open(self.store, attach_folder(self.store, self.adapter, base=self.base))

    def refused(self) -> CompressionError:
        with pytest.raises(CompressionError) as refused:
            self.merged()
        return refused.value


@pytest.fixture(name="bench")
def fixture_bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merge_agrees_with_the_librarys_own(kind: str, tmp_path: Path) -> None:
    family, settings = ADAPTERS[kind]
    bench = Bench(tmp_path, family)
    expected = bench.make(**settings)
    base = load_file(bench.base_dir / "model.safetensors")
    merged = bench.merged()
    assert set(merged.names) == base.keys()
    changed = set()
    for name, wanted in expected.items():
        torch.testing.assert_close(merged.tensor(name), wanted, rtol=2e-6, atol=2e-6)
        if not torch.equal(wanted, base[name]):
            changed.add(name)
            assert not torch.equal(merged.tensor(name), base[name]), name
        else:
            assert torch.equal(merged.tensor(name), base[name]), name
    assert len(changed) > 0
    assert merged.manifest["source"]["changed_tensors"] >= len(changed)
    tokens = torch.arange(30).view(1, 30)
    assert load_model(merged)(tokens).logits.isfinite().all()


def test_the_sum_is_rounded_once_to_the_bases_type(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dtype=torch.bfloat16)
    expected = bench.make(target_modules="all-linear")
    merged = bench.merged()
    for name, wanted in expected.items():
        found = merged.tensor(name)
        assert found.dtype == torch.bfloat16
        # The order of a float32 sum may tip a rounding; two roundings would do so in many places.
        assert (found != wanted.bfloat16()).float().mean() < 0.002, name


def test_a_large_matrix_is_merged_some_rows_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from compression_worker import adapter_merge

    bench.make(use_dora=True)
    whole = bench.merged()
    monkeypatch.setattr(adapter_merge, "TILE_ELEMENTS", 64 * 5)
    tiled = bench.merged()
    for name in whole.names:
        torch.testing.assert_close(tiled.tensor(name), whole.tensor(name), rtol=1e-6, atol=1e-6)


def test_a_merged_adapter_is_a_checkpoint_like_any_other(bench: Bench) -> None:
    bench.make()
    merged = bench.merged()
    merged.verify()
    base = read_manifest(bench.store, bench.base)
    assert merged.manifest["source"] == {
        "kind": "adapter",
        "base": base["fingerprint"],
        "changed_tensors": 4,
        "files": {name: sha256_of(bench.adapter / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
    }
    assert merged.manifest["files"]["config.json"] == base["files"]["config.json"]
    assert merged.manifest["tokenizer_sha256"] == base["tokenizer_sha256"]
    state = {name: merged.tensor(name) for name in merged.names}
    folder = bench.folder / "as-checkpoint"
    shutil.copytree(bench.base_dir, folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_manifest(bench.store, attach_folder(bench.store, folder))["fingerprint"] == merged.fingerprint
    assert bench.merged().digest == merged.digest


def sha256_of(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_shard_that_the_adapter_does_not_touch_stays_the_blob_that_it_is(bench: Bench) -> None:
    state = load_file(bench.base_dir / "model.safetensors")
    files = {"model-00001-of-00002.safetensors": [n for n in state if "q_proj" in n]}
    files["model-00002-of-00002.safetensors"] = [n for n in state if "q_proj" not in n]
    (bench.base_dir / "model.safetensors").unlink()
    for file, names in files.items():
        save_file({name: state[name] for name in names}, bench.base_dir / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (bench.base_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    bench.base = attach_folder(bench.store, bench.base_dir)
    expected = bench.make(target_modules=["q_proj"])
    merged = bench.merged()
    ours, theirs = read_manifest(bench.store, bench.base)["files"], merged.manifest["files"]
    first, second = files
    assert (ours[first] != theirs[first], ours[second] == theirs[second]) == (True, True)
    model = load_model(merged)
    for name, wanted in expected.items():
        torch.testing.assert_close(model.get_parameter(name), wanted, rtol=2e-6, atol=2e-6)


def test_a_grown_vocabulary_brings_its_rows_its_tokenizer_and_its_config(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "llama-untied")
    bench.make(modules_to_save=["embed_tokens", "lm_head"])
    tables = {
        n: t for n, t in load_file(bench.adapter / WEIGHTS_FILE).items() if n.endswith(("tokens.weight", "head.weight"))
    }
    assert len(tables) == 2
    grown = {name: torch.cat([table, table[:7] + 1]) for name, table in tables.items()}
    edit_adapter_weights(bench.adapter, **grown)
    write_tokenizer(bench.adapter, 295)
    merged = bench.merged()
    assert merged.manifest["config"]["vocab_size"] == 295
    assert merged.tensor("lm_head.weight").shape == (295, 64)
    assert merged.manifest["tokenizer_sha256"] != read_manifest(bench.store, bench.base)["tokenizer_sha256"]
    assert load_model(merged)(torch.tensor([[290, 3]])).logits.shape == (1, 2, 295)
    one = next(name for name in tables if "lm_head" in name)
    edit_adapter_weights(bench.adapter, **{one: tables[one]})
    assert "another vocabulary" in bench.refused().message


def test_tied_embeddings_are_changed_together_or_not_at_all(bench: Bench) -> None:
    table = torch.randn((288, 64), generator=torch.Generator().manual_seed(1))
    bench.make()
    embeddings, head = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
    edit_adapter_weights(bench.adapter, **{embeddings: table, head: table.clone()})
    assert torch.equal(bench.merged().tensor("lm_head.weight"), table)
    for changes in ({head: None}, {embeddings: table + 1, head: table}):
        edit_adapter_weights(bench.adapter, **changes)
        assert bench.refused().code == "tied_weights_differ"


def test_an_adapter_of_tied_embeddings_alone_is_refused(bench: Bench) -> None:
    bench.make(target_modules=["embed_tokens"])
    assert bench.refused().code == "tied_weights_differ"


def test_without_a_base_an_adapter_is_refused_with_what_to_do(bench: Bench) -> None:
    bench.make()
    with pytest.raises(CompressionError, match="name the base that it was trained on") as refused:
        attach_folder(bench.store, bench.adapter)
    assert refused.value.code == "adapter_without_base"


def test_an_import_merges_an_adapter_into_the_base_that_was_chosen(bench: Bench) -> None:
    expected = bench.make()
    edit_adapter_config(bench.adapter, base_model_name_or_path="/etc/passwd", revision="main")
    roots = bench.folder / "roots"
    roots.mkdir()
    shutil.copytree(bench.adapter, roots / "tuned")
    store = Store(bench.folder / "other")
    inputs = {"base": attach_folder(store, bench.base_dir)}
    spec = StepSpec(kind="checkpoint.import", params={"root": "r", "folder": "tuned", "licence": "MIT"}, inputs=inputs)
    output = import_step(
        StepContext(
            store=store,
            spec=spec,
            progress=lambda done, total, unit: None,
            log=lambda text, level: None,
            measure=lambda name, value: None,
            import_roots={"r": roots},
        )
    )
    assert output.data["differences"] == []
    assert output.data["manifest"]["source"]["kind"] == "adapter"
    assert output.data["manifest"]["licence"] == "MIT"
    with Checkpoint.open(store, output.data["checkpoint"]) as merged:
        for name, wanted in expected.items():
            torch.testing.assert_close(merged.tensor(name), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("family", ["mistral", "odd", "gpt2", "llama-deep"])
def test_an_adapter_for_another_base_is_refused(bench: Bench, family: str, tmp_path: Path) -> None:
    bench.make(target_modules=["down_proj"] if family == "mistral" else ATTENTION)
    if family == "llama-deep":
        name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
        state = load_file(bench.adapter / WEIGHTS_FILE)
        edit_adapter_weights(bench.adapter, **{name.format(7, side): state[name.format(0, side)] for side in "AB"})
    elif family == "mistral":
        edit_adapter_weights(
            bench.adapter, **{"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.zeros(4, 95)}
        )
    else:
        other, _ = make_family_pair(tmp_path / "other", family)
        bench.base = attach_folder(bench.store, other)
    refused = bench.refused()
    assert refused.code == "adapter_mismatch"
    assert "choose the base that the adapter was trained on" in refused.message


def test_stacked_experts_adapted_all_at_once_are_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "mixtral")
    bench.make(target_parameters=["mlp.experts.gate_up_proj"])
    assert "target_parameters" in bench.refused().message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 4]]),
        ("trainable_token_indices", [5]),
        ("use_qalora", True),
        ("lora_bias", True),
        ("a_setting_of_tomorrow", "on"),
    ],
)
def test_what_a_merge_does_not_cover_is_refused_by_name(bench: Bench, setting: str, value: object) -> None:
    bench.make()
    edit_adapter_config(bench.adapter, **{setting: value})
    refused = bench.refused()
    assert refused.code == "unknown_adapter"
    assert setting in refused.message


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[]", "no JSON object"),
        (b'{"peft_type": "LORA", "auto_map": {"x": "y"}}', "auto_map"),
        (b'{"peft_type": "LORA", "lora_alpha": "8"}', "lora_alpha"),
        (b'{"peft_type": "LORA", "lora_alpha": 0}', "lora_alpha"),
        (b'{"peft_type": "LORA", "use_dora": "yes"}', "use_dora"),
        (b'{"peft_type": "LORA", "alpha_pattern": {"(a+)+$": 1}}', "plain ends of module names"),
        (b'{"peft_type": "LORA", "alpha_pattern": {"q_proj": -1}}', "q_proj"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(CompressionError, match=re.escape(CONFIG_FILE)) as refused:
        check_adapter_config(raw)
    assert says in refused.value.message


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_half_a_pair_is_refused(bench: Bench, lost: str) -> None:
    bench.make()
    edit_adapter_weights(bench.adapter, **{f"base_model.model.model.layers.0.self_attn.q_proj.{lost}.weight": None})
    assert f"no {lost}" in bench.refused().message


@pytest.mark.parametrize(("trained", "said"), [(True, False), (False, True)])
def test_config_and_weights_of_two_trainings_are_refused(bench: Bench, trained: bool, said: bool) -> None:
    bench.make(use_dora=trained)
    edit_adapter_config(bench.adapter, use_dora=said)
    assert "magnitudes" in bench.refused().message


def test_a_tensor_whose_part_is_not_known_is_refused(bench: Bench) -> None:
    bench.make()
    edit_adapter_weights(bench.adapter, **{"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)})
    assert "does not begin with 'base_model.model.'" in bench.refused().message


def test_values_that_are_not_finite_are_refused(bench: Bench) -> None:
    bench.make()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    edit_adapter_weights(bench.adapter, **{name: torch.full((4, 64), float("nan"))})
    assert bench.refused().code == "not_finite"
    large = {name: torch.full((4, 64), 3e38), name.replace("lora_A", "lora_B"): torch.full((64, 4), 3e38)}
    edit_adapter_weights(bench.adapter, **large)
    assert "after the merge" in bench.refused().message


def test_a_pickle_is_refused_and_so_is_a_folder_without_weights(bench: Bench) -> None:
    bench.make()
    weights = bench.adapter / WEIGHTS_FILE
    weights.rename(bench.adapter / "adapter_model.bin")
    refused = bench.refused()
    assert (refused.code, "adapter_model.bin" in refused.message) == ("pickle_file", True)
    (bench.adapter / "adapter_model.bin").unlink()
    assert bench.refused().code == "no_weights"


def test_other_files_and_links_are_refused_as_in_a_checkpoint(bench: Bench) -> None:
    bench.make()
    (bench.adapter / "modeling_llama.py").write_text("raise SystemExit")
    assert bench.refused().code == "unexpected_file"
    (bench.adapter / "modeling_llama.py").unlink()
    (bench.adapter / CONFIG_FILE).rename(bench.folder / "moved.json")
    (bench.adapter / CONFIG_FILE).symlink_to(bench.folder / "moved.json")
    assert bench.refused().code == "symlink"


def test_a_damaged_base_is_noticed_before_it_is_merged(bench: Bench) -> None:
    bench.make()
    weights = bench.base_dir / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CompressionError):
        bench.merged()


def test_a_whole_model_with_notes_of_an_adapter_stays_a_whole_model(bench: Bench) -> None:
    (bench.base_dir / CONFIG_FILE).write_text("{}")
    assert not is_adapter([path.name for path in bench.base_dir.iterdir()])
    assert "source" not in read_manifest(bench.store, attach_folder(bench.store, bench.base_dir))
