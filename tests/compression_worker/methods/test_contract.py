"""What every method of the catalog keeps, over every family: compress, verify, restore, load, and refuse.

A new method adds its line to :data:`SETTINGS`; without one it runs with its defaults.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression_worker import artifact as artifacts
from compression_worker.architecture import describe
from compression_worker.artifact import Artifact
from compression_worker.catalog import METHODS
from compression_worker.checkpoints import Checkpoint, attach_folder, load_folder
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec
from compression_worker.preflight import Estimate, Inputs, Model
from compression_worker.runner import Runner, run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from tests.families import FAMILIES, edit_weights, make_family_pair

_BRIEF: Json = {"tokens": 128, "window_tokens": 32, "batch_size": 2, "held_out": 2, "rank": 2, "teacher_logits": 16}
_SHARED: Json = {
    **{"groups": "0:1", "protect_first": 0, "protect_last": 0, "rank": 2, "window_tokens": 32, "measure_windows": 4},
    **{"held_out": 2, "teacher_logits": 16, "samples": 4, "length": 32, "batch_size": 2},
}
SETTINGS: dict[str, tuple[Json, Json]] = {
    "bitdelta": ({"distill_steps": 0}, {"distill_steps": 2, "batch_size": 2, "sequence_length": 32}),
    "deltallm": (
        {"tokens": 0, "start": "zero", **_SHARED},
        {"tokens": 128, "start": "svd_covariance", "learning_rate": 1e-4, **_SHARED},
    ),
    "gptq": ({"samples": 4, "length": 32, "num_bits": 8}, {"samples": 4, "length": 32, "inputs": "full"}),
    "int21": (
        {"samples": 4, "length": 32, "num_bits": 8, **_BRIEF},
        {"samples": 4, "length": 32, "num_bits": 4, "start": "closed_form", "objective": "both", **_BRIEF},
    ),
    "quip_sharp": (
        {"samples": 4, "length": 32, "passes": 1},
        {"samples": 4, "length": 32, "passes": 0, "tuning": "both", "block_epochs": 1, "tuning_epochs": 1},
    ),
}
"""Method -> its cheapest settings, and settings with a little training."""
OF_MIXTURES: dict[str, Json] = {"deltallm": {"modules": "attention"}}
"""What a method needs to be told where MLPs are mixtures of experts."""
THREE = ("llama", "gpt2", "mixtral")
"""Linears, transposed linears, experts."""
TRAINED_FAMILIES = ("llama", "qwen2", "phi3", "gpt2", "mixtral")
TEXTS = b"".join(json.dumps({"text": f"Sentence {n}: the fox jumps over the dog."}).encode() + b"\n" for n in range(8))
TOKENS = torch.arange(40, 60).view(1, 20)


@dataclass
class Pair:
    """A pair on disk, and the store in which it is compressed."""

    base_dir: Path
    variant_dir: Path
    store: Store
    made: dict[tuple[str, bool], Compressed] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> dict[str, str]:
        return {
            "base": attach_folder(self.store, self.base_dir),
            "variant": attach_folder(self.store, self.variant_dir),
            "calibration": self.store.write_bytes(parse_samples(TEXTS, TEXT).data),
        }

    def plan(self, method: str, *, trained: bool = False) -> StepSpec:
        config = self.settings(method, trained)
        inputs = {name: digest for name, digest in self.inputs.items() if name != "base" or METHODS[method].needs_base}
        return StepSpec(kind=f"{method}.plan", params={"config": config}, inputs=inputs, seed=7)

    def settings(self, method: str, trained: bool) -> Json:
        more = OF_MIXTURES.get(method, {}) if any(".experts." in name for name in self.weights("variant")) else {}
        return SETTINGS.get(method, ({}, {}))[trained] | more

    def refused(self, method: str) -> CompressionError:
        """How the plan is refused, before any matrix is read."""
        with pytest.raises(CompressionError) as refused:
            Runner(store=self.store, device="cpu").compute(self.plan(method), lambda event: None)
        return refused.value

    def compress(self, method: str, *, trained: bool = False) -> Compressed:
        events: list[Json] = []
        output = run_plan(self.store, self.plan(method, trained=trained), events.append, device="cpu")
        return Compressed(self, output, [event["text"] for event in events if event["type"] == "log"])

    def compressed(self, method: str, *, trained: bool = False) -> Compressed:
        """The same, made once for all tests that only look at it."""
        key = (method, trained)
        if key not in self.made:
            self.made[key] = self.compress(method, trained=trained)
        return self.made[key]

    def weights(self, side: str) -> dict[str, torch.Tensor]:
        return load_file((self.base_dir if side == "base" else self.variant_dir) / "model.safetensors")


@dataclass
class Compressed:
    """An artifact of a pair."""

    pair: Pair
    output: StepOutput
    logs: list[str]

    @cached_property
    def base(self) -> Checkpoint | None:
        return None if self.artifact.stands_alone else Checkpoint.open(self.pair.store, self.pair.inputs["base"])

    @cached_property
    def artifact(self) -> Artifact:
        return Artifact.open_store(self.pair.store, self.output.data["artifact"])

    def folder(self, out: Path) -> Artifact:
        artifacts.write_folder(out, self.pair.store, self.output.blobs)
        return Artifact.open_folder(out)

    def restored(self, out: Path) -> Path:
        artifacts.restore(self.base, self.artifact, out, lambda done, total, unit: None)
        return out

    def load(self, dtype: torch.dtype | None = None, **more: Any) -> Any:
        implementation = import_module(METHODS[self.artifact.manifest["method"]].implementation)
        return implementation.load_model(self.base, self.artifact, "cpu", dtype, **more)


@pytest.fixture(scope="module", name="shelf")
def fixture_shelf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """The pair of a family, made once; what edits a pair makes one of its own with :func:`fresh`."""
    made: dict[str, Pair] = {}

    def pair(family: str) -> Pair:
        if family not in made:
            made[family] = fresh(tmp_path_factory.mktemp(family), family)
        return made[family]

    return pair


def fresh(folder: Path, family: str = "llama", **more: Any) -> Pair:
    return Pair(*make_family_pair(folder, family, **more), Store(folder / "store"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def of_families(*names: str) -> pytest.MarkDecorator:
    """A test for each family. Those of one run in one process, where what was compressed is still there."""
    marked = [pytest.param(name, marks=pytest.mark.xdist_group(f"contract of {name}")) for name in names]
    return pytest.mark.parametrize("family", marked)


every_method = pytest.mark.parametrize("method", METHODS)
every_delta_method = pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.needs_base])
every_quantization = pytest.mark.parametrize("method", [name for name, one in METHODS.items() if not one.needs_base])


@every_method
@of_families(*FAMILIES)
def test_a_pair_goes_through_and_comes_back(
    shelf: Callable[[str], Pair], method: str, family: str, tmp_path: Path
) -> None:
    check(shelf(family).compressed(method), tmp_path)


@every_method
@of_families(*TRAINED_FAMILIES)
def test_a_pair_goes_through_and_comes_back_after_a_little_training(
    shelf: Callable[[str], Pair], method: str, family: str, tmp_path: Path
) -> None:
    check(shelf(family).compressed(method, trained=True), tmp_path)


def check(made: Compressed, out: Path) -> None:
    pair, manifest = made.pair, made.artifact.manifest
    assert made.folder(out / "artifact").problems() == []
    sizes = {path.name: path.stat().st_size for path in (out / "artifact").iterdir()}
    assert sum(part["bytes"] for part in made.artifact.parts) == sum(sizes.values())
    assert made.artifact.summary()["artifact_bytes"] == sum(sizes.values())

    variant = pair.weights("variant")
    restored = load_file(made.restored(out / "model") / "model.safetensors")
    assert restored.keys() == variant.keys()
    assert {n: (t.shape, t.dtype) for n, t in restored.items()} == {n: (t.shape, t.dtype) for n, t in variant.items()}
    for name in (name for name, tensor in variant.items() if tensor.ndim == 1):
        if manifest["tensors"][name]["kind"] in ("raw", "base"):
            assert torch.equal(restored[name], variant[name]), f"{name}: norms and biases are the variant's own"
        else:
            torch.testing.assert_close(restored[name], variant[name], rtol=0.05, atol=0.02)  # trained, a little
    coded = {line["name"] for line in manifest["figures"]["matrices"]}
    assert coded >= {linear.name for linear in describe(made.artifact.config).linears()}, "every linear, every expert"
    assert all(line["relative_error"] >= 0 for line in manifest["figures"]["matrices"])

    model = load_folder(out / "model")
    implementation = import_module(METHODS[manifest["method"]].implementation)
    takes = inspect.signature(implementation.load_model).parameters
    loaded = made.load(dense=True) if "dense" in takes else made.load()
    assert torch.equal(logits(loaded), logits(model)), "the model in memory is the one that a restore writes"
    full = logits(made.load(torch.float32))
    assert full.isfinite().all()
    for form in {"packed", "dense"} & takes.keys():
        torch.testing.assert_close(logits(made.load(torch.float32, **{form: True})), full, rtol=1e-4, atol=1e-4)


@every_method
@of_families(*THREE)
def test_the_same_seed_gives_the_same_bytes(
    shelf: Callable[[str], Pair], method: str, family: str, tmp_path: Path
) -> None:
    """After a little training, which begins with all that is done without; the plain way too where it is cheapest."""
    again = fresh(tmp_path, family)
    for trained in (False, True) if family == "llama" else (True,):
        once = shelf(family).compressed(method, trained=trained)
        assert again.compress(method, trained=trained).output.blobs == once.output.blobs


@every_delta_method
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_variant_equal_to_its_base_comes_back_exactly(
    shelf: Callable[[str], Pair], method: str, family: str, tmp_path: Path
) -> None:
    pair = shelf(family)
    same = Pair(pair.base_dir, pair.base_dir, pair.store).compress(method)
    restored = load_file(same.restored(tmp_path / "model") / "model.safetensors")
    for name, tensor in pair.weights("base").items():
        assert torch.equal(restored[name], tensor), name
    assert all(line["relative_error"] == 0 for line in same.artifact.manifest["figures"]["matrices"])


@every_delta_method
def test_added_vocabulary_rows_are_kept_and_reported(method: str, tmp_path: Path) -> None:
    pair = fresh(tmp_path)
    rows = 0.1 * torch.randn((12, 64), generator=torch.Generator().manual_seed(3))
    table = "model.embed_tokens.weight"
    edit_weights(
        pair.variant_dir, lambda state: state | {table: torch.cat([state[table], rows.to(state[table].dtype)])}
    )
    config = json.loads((pair.variant_dir / "config.json").read_text())
    (pair.variant_dir / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 12}))
    made = pair.compress(method)
    assert any("288 to 300" in line for line in made.logs)
    restored = load_file(made.restored(tmp_path / "model") / "model.safetensors")[table]
    assert torch.equal(restored[288:], pair.weights("variant")[table][288:])
    assert logits(load_folder(tmp_path / "model")).shape[-1] == 300


@every_delta_method
def test_another_family_is_refused_by_the_plan(shelf: Callable[[str], Pair], method: str, tmp_path: Path) -> None:
    pair = Pair(shelf("mistral").base_dir, shelf("llama").variant_dir, Store(tmp_path / "store"))
    refused = pair.refused(method)
    assert refused.code == "architecture_mismatch"
    assert "Choose the base that the variant was tuned from" in refused.message


@every_delta_method
def test_another_shape_is_refused_by_the_plan(shelf: Callable[[str], Pair], method: str, tmp_path: Path) -> None:
    pair = Pair(shelf("odd").base_dir, shelf("llama-untied").variant_dir, Store(tmp_path / "store"))
    refused = pair.refused(method)
    assert refused.code == "shape_mismatch"
    assert "model.layers.0." in refused.message


@every_delta_method
def test_a_missing_expert_is_refused_by_the_plan(method: str, tmp_path: Path) -> None:
    pair = fresh(tmp_path, "mixtral")
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    edit_weights(pair.base_dir, lambda state: {name: tensor for name, tensor in state.items() if name != lost})
    refused = pair.refused(method)
    assert refused.code == "missing_tensor"
    assert f"'{lost}' of transformer block 1 is missing in the base" in refused.message


@pytest.mark.parametrize(
    ("method", "side"),
    [
        (name, side)
        for name, one in METHODS.items()
        for side in ("base", "variant")
        if side == "variant" or one.needs_base
    ],
)
def test_a_matrix_of_nothing_but_nan_is_refused_before_it_is_compared(method: str, side: str, tmp_path: Path) -> None:
    pair = fresh(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    folder = pair.base_dir if side == "base" else pair.variant_dir
    edit_weights(folder, lambda state: state | {name: torch.full_like(state[name], float("nan"))})
    with pytest.raises(CompressionError, match=f"tensor '{name}' .* not finite") as refused:
        pair.compress(method)
    assert refused.value.code == "not_finite"


@every_delta_method
def test_one_matrix_without_a_delta_is_handled_and_reported(method: str, tmp_path: Path) -> None:
    pair = fresh(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    same = pair.weights("base")[name]
    edit_weights(pair.variant_dir, lambda state: state | {name: same})
    made = pair.compress(method)
    assert any(f"'{name}' is equal in base and variant" in line for line in made.logs)
    assert torch.equal(load_file(made.restored(tmp_path / "model") / "model.safetensors")[name], same)


@every_quantization
def test_a_checkpoint_without_an_expert_is_refused_by_the_plan(method: str, tmp_path: Path) -> None:
    pair = fresh(tmp_path, "mixtral")
    lost = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    edit_weights(pair.variant_dir, lambda state: {name: tensor for name, tensor in state.items() if name != lost})
    refused = pair.refused(method)
    assert refused.code == "missing_tensor"
    assert f"'{lost}' of transformer block 1 is missing" in refused.message


@pytest.mark.xdist_group("contract of llama")
@every_quantization
def test_an_artifact_that_stands_alone_needs_no_base_and_names_one_checkpoint_twice(
    shelf: Callable[[str], Pair], method: str
) -> None:
    made = shelf("llama").compressed(method)
    artifact = made.artifact
    assert artifact.stands_alone
    assert artifact.manifest["base"] == artifact.manifest["variant"]
    assert artifact.manifest["variant"]["checkpoint"] == made.pair.inputs["variant"]
    artifact.require_base(None)
    assert not artifact.manifest.get("shared")
    linears = artifact.manifest["figures"]["linears"]
    assert 1 < linears["bits_per_weight"] < 16
    assert all(0 <= line.get("proxy_loss", 0) < 1 for line in artifact.manifest["figures"]["matrices"])


@every_quantization
@of_families(*THREE)
def test_packed_linears_compute_what_the_dense_ones_do(shelf: Callable[[str], Pair], method: str, family: str) -> None:
    made = shelf(family).compressed(method)
    implementation = import_module(METHODS[method].implementation)
    packed = implementation.load_packed(made.artifact, "cpu", torch.float32)
    torch.testing.assert_close(logits(packed), logits(made.load(torch.float32)), rtol=1e-4, atol=1e-4)


@every_quantization
def test_the_same_text_is_calibrated_once_for_every_setting_that_allows_it(
    shelf: Callable[[str], Pair], method: str
) -> None:
    pair = shelf("llama")
    keys = []
    for trained in (False, True):
        _, output, _ = Runner(store=pair.store, device="cpu").compute(
            pair.plan(method, trained=trained), lambda e: None
        )
        keys.append(output.steps[0].to_json())
    assert keys[0] == keys[1], "the step that reads the text is one and the same"


@every_quantization
def test_too_little_text_is_refused(method: str, tmp_path: Path) -> None:
    pair = fresh(tmp_path)
    pair.inputs["calibration"] = pair.store.write_bytes(parse_samples(b'{"text": "a few words"}', TEXT).data)
    with pytest.raises(CompressionError, match="give more text") as refused:
        pair.compress(method)
    assert refused.value.code == "too_few_tokens"


@every_delta_method
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("trained", [False, True], ids=["initial", "trained"])
def test_matrices_that_are_the_base_s_own_cost_nothing(method: str, family: str, trained: bool, tmp_path: Path) -> None:
    pair = fresh(tmp_path, family)
    whole = pair.compress(method, trained=trained)
    base, linears = pair.weights("base"), list(describe(whole.artifact.config).linears())
    touched = {linear.name for linear in linears if any(side in linear.name for side in ("q_proj", "v_proj", "c_attn"))}
    untouched = {linear.name for linear in linears} - touched
    edit_weights(pair.variant_dir, lambda state: state | {name: base[name] for name in untouched})
    adapted = Pair(pair.base_dir, pair.variant_dir, pair.store)
    made = adapted.compress(method, trained=trained)
    table = made.artifact.manifest["tensors"]
    experts = {name for name in untouched if ".experts." in name}
    assert {name for name in touched | untouched if table[name]["kind"] == "base"} == untouched - experts
    assert made.output.data["artifact_bytes"] < whole.output.data["artifact_bytes"]
    restored = load_file(made.restored(tmp_path / "model") / "model.safetensors")
    assert all(torch.equal(restored[name], base[name]) for name in untouched - experts)
    assert any(not torch.equal(restored[name], base[name]) for name in touched)
    full = logits(made.load(torch.float32))
    assert torch.equal(logits(made.load()), logits(load_folder(tmp_path / "model")))
    if "packed" in inspect.signature(import_module(METHODS[method].implementation).load_model).parameters:
        torch.testing.assert_close(logits(made.load(torch.float32, packed=True)), full, rtol=1e-4, atol=1e-4)
    assert forecast(adapted, method, trained).result_bytes >= 0.99 * made.output.data["artifact_bytes"]


@every_delta_method
def test_a_pair_that_differs_in_its_embeddings_alone_has_nothing_coded(method: str, tmp_path: Path) -> None:
    pair = fresh(tmp_path)
    table = "model.embed_tokens.weight"
    changed = pair.weights("variant")[table]
    edit_weights(pair.variant_dir, lambda state: pair.weights("base") | {table: changed})
    made = pair.compress(method, trained=True)
    assert made.artifact.manifest["figures"]["matrices"] == []
    assert {part["name"] for part in made.artifact.parts}.isdisjoint({"codes", "scales"})
    assert torch.equal(load_file(made.restored(tmp_path / "model") / "model.safetensors")[table], changed)


def forecast(pair: Pair, method: str, trained: bool) -> Estimate:
    """What a page promises before the job."""
    manifest = Checkpoint.open(pair.store, pair.inputs["variant"]).manifest
    model = Model(**{key: manifest[key] for key in ("config", "parameters", "weight_bytes", "size_bytes")})
    config = METHODS[method].config_class()(**pair.settings(method, trained))
    found: Estimate = METHODS[method].forecaster().estimate(config, Inputs(variant=model, base=model, text_bytes=1))
    return found
