"""BitDelta from two folders to an artifact: what it stores, what it refuses, and that it gives the same bytes again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression_worker.artifact import Artifact, load_compressed_model
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec
from compression_worker.methods.bitdelta import compress, layout, merge
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.runner import Runner, resolve_inputs, run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from kernels.packing import unpack_signs
from tests.tiny import make_tiny_pair, tiny_config, tiny_state, write_checkpoint

TEXTS = b"".join(
    json.dumps({"text": f"Sentence {n}: the fox jumps over the dog {n} times."}).encode() + b"\n" for n in range(12)
)
INITIAL = {"distill_steps": 0}
LINEAR = "model.layers.1.mlp.down_proj.weight"


class Bench:
    """A store that holds a tiny pair."""

    def __init__(self, folder: Path, **pair: object) -> None:
        self.base_dir, self.variant_dir = make_tiny_pair(folder, **pair)  # type: ignore[arg-type]
        self.store = Store(folder / "store")
        self.events: list[Json] = []

    def plan(self, config: Json, *, seed: int = 0, calibration: bytes = TEXTS) -> StepSpec:
        self.base = attach_folder(self.store, self.base_dir)
        self.variant = attach_folder(self.store, self.variant_dir)
        inputs = {"base": self.base, "variant": self.variant}
        if calibration:
            inputs["calibration"] = self.store.write_bytes(parse_samples(calibration, TEXT).data)
        return StepSpec(kind="bitdelta.plan", params={"config": config}, inputs=inputs, seed=seed)

    def compress(self, config: Json, **more: object) -> StepOutput:
        return run_plan(self.store, self.plan(config, **more), self.events.append, device="cpu")  # type: ignore[arg-type]

    def logs(self) -> str:
        return "\n".join(event["text"] for event in self.events if event["type"] == "log")

    def edit(self, which: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: object) -> None:
        """Change the weights (and config.json) of one side."""
        state = load_file(which / "model.safetensors")
        change(state)
        save_file(state, which / "model.safetensors", metadata={"format": "pt"})
        if config:
            path = which / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture(name="bench")
def fixture_bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_initial_form_is_the_sign_and_the_mean_of_each_delta(bench: Bench) -> None:
    output = bench.compress(INITIAL)
    base, variant = load_file(bench.base_dir / "model.safetensors"), load_file(bench.variant_dir / "model.safetensors")
    with merge.MergedSigns(
        Checkpoint.open(bench.store, bench.base), Artifact.open_store(bench.store, output.data["artifact"])
    ) as merged:
        assert merged.specs().keys() == variant.keys()
        for name, entry in merged.table.items():
            delta = variant[name].float() - base[name].float()
            if entry["kind"] != "sign":
                assert torch.equal(merged.tensor(name, torch.bfloat16), variant[name]), name
                continue
            signs = torch.where(delta < 0, -1.0, 1.0)
            assert torch.equal(unpack_signs(merged.codes(name), delta.shape[1]), signs), name
            scale = merged.scale(name)
            torch.testing.assert_close(scale, delta.abs().mean())
            assert torch.equal(merged.tensor(name, torch.float32), base[name].float() + scale * signs), name


def test_every_linear_of_the_blocks_is_coded_and_nothing_else(bench: Bench) -> None:
    tensors = Artifact.open_store(bench.store, bench.compress(INITIAL).data["artifact"]).manifest["tensors"]
    coded = {name for name, entry in tensors.items() if entry["kind"] == "sign"}
    assert coded == {name for name in tensors if "_proj." in name}
    assert len(coded) == 14


def test_distillation_changes_scales_only(bench: Bench) -> None:
    initial = bench.compress(INITIAL)
    distilled = bench.compress({"distill_steps": 5, "learning_rate": 0.001})
    assert len(distilled.data["figures"]["distillation"]["losses"]) == 5
    assert all(line["scale"] != line["scale0"] for line in distilled.data["figures"]["matrices"])
    same = {name for name, digest in initial.blobs.items() if distilled.blobs[name] == digest}
    assert initial.blobs.keys() - same == {"scales.safetensors", "manifest.json"}


def test_the_same_job_gives_the_same_bytes_and_another_seed_does_not(bench: Bench, tmp_path: Path) -> None:
    config = {"distill_steps": 3, "learning_rate": 0.001}
    first = bench.compress(config).blobs
    again = Bench(tmp_path / "again").compress(config).blobs
    assert first == again
    assert bench.compress(config, seed=1).blobs["scales.safetensors"] != first["scales.safetensors"]


@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_a_run_cut_into_chunks_ends_on_the_same_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    config = {"distill_steps": 6, "learning_rate": 0.001, "learning_rate_unit": unit, "batch_size": 2}
    whole = bench.compress(config)
    monkeypatch.setattr(compress, "CHUNK_STEPS", 2)
    assert bench.compress(config).blobs == whole.blobs


def test_a_chunk_taken_up_by_another_process_ends_on_the_same_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "CHUNK_STEPS", 2)
    plan = bench.plan({"distill_steps": 4, "batch_size": 2})
    whole = run_plan(bench.store, plan, device="cpu")
    runner = Runner(store=bench.store, device="cpu")
    _, planned, _ = runner.compute(plan, lambda event: None)
    digests: list[str] = []
    for step in planned.steps:
        spec = StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, digests), seed=step.seed)
        if step.group == "distill":
            # As after a kill: the step is computed once for nothing and once more from what is in the store.
            runner.compute(spec, lambda event: None)
        digest, output, _ = Runner(store=Store(bench.store.root), device="cpu").compute(spec, lambda event: None)
        digests.append(digest)
    assert output.blobs == whole.blobs


def test_a_plan_names_its_steps_and_keeps_layers_apart_from_the_settings(bench: Bench) -> None:
    steps = run_steps(bench, {"distill_steps": 30})
    assert [step.group for step in steps] == ["layer", "layer", "rest", "distill", "distill", "assemble"]
    assert [step.name for step in steps] == [
        "layer 0",
        "layer 1",
        "rest",
        "steps 1 to 25",
        "steps 26 to 30",
        "assemble",
    ]
    other = run_steps(bench, {"distill_steps": 10, "learning_rate": 0.01})
    assert [step.to_json() for step in steps[:3]] == [step.to_json() for step in other[:3]]


def run_steps(bench: Bench, config: Json) -> tuple[compress.PlannedStep, ...]:
    _, output, _ = Runner(store=bench.store, device="cpu").compute(bench.plan(config), bench.events.append)
    return output.steps


def test_distillation_without_text_is_refused_with_what_to_do(bench: Bench) -> None:
    with pytest.raises(CompressionError, match="set distill_steps to 0") as refused:
        bench.compress({"distill_steps": 5}, calibration=b"")
    assert refused.value.code == "no_calibration"


def test_a_rate_that_makes_the_loss_infinite_is_refused(bench: Bench) -> None:
    def explode(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"] *= 1e25

    bench.edit(bench.variant_dir, explode)
    with pytest.raises(CompressionError, match="not finite") as refused:
        bench.compress({"distill_steps": 2})
    assert refused.value.code == "diverged"


def test_a_base_of_another_shape_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.base_dir, _ = make_tiny_pair(tmp_path / "wide", hidden=32)
    with pytest.raises(CompressionError, match=r"'model\.layers\.0\.self_attn\.q_proj\.weight' of transformer block 0"):
        bench.compress(INITIAL)


def test_a_base_with_another_number_of_blocks_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.base_dir, _ = make_tiny_pair(tmp_path / "deep", layers=3)
    with pytest.raises(CompressionError, match="3 transformer blocks and the variant 2"):
        bench.compress(INITIAL)


def test_another_architecture_is_refused(bench: Bench) -> None:
    bench.edit(bench.base_dir, lambda state: None, architectures=["MistralForCausalLM"], model_type="mistral")
    with pytest.raises(CompressionError, match="MistralForCausalLM and the variant a LlamaForCausalLM") as refused:
        bench.compress(INITIAL)
    assert refused.value.code == "architecture_mismatch"


@pytest.mark.parametrize("side", ["base", "variant"])
def test_a_missing_block_linear_is_refused(bench: Bench, side: str) -> None:
    bench.edit(bench.base_dir if side == "base" else bench.variant_dir, lambda state: state.__delitem__(LINEAR))
    with pytest.raises(CompressionError, match=f"{LINEAR}' of transformer block 1 is missing in the {side}"):
        bench.compress(INITIAL)


@pytest.mark.parametrize(("vocab", "verb"), [(300, "288 to 300"), (280, "288 to 280")])
def test_a_grown_or_shrunk_vocabulary_is_kept_whole_and_reported(
    bench: Bench, tmp_path: Path, vocab: int, verb: str
) -> None:
    _, bench.variant_dir = make_tiny_pair(tmp_path / "other", vocab=vocab)
    output = bench.compress(INITIAL)
    assert f"the vocabulary goes from {verb} tokens" in bench.logs()
    model = load_compressed_model(bench.store, bench.base, output.data["artifact"], dtype=torch.float32)
    wanted = load_file(bench.variant_dir / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.get_input_embeddings().weight, wanted.float())  # type: ignore[operator]


def test_another_tokenizer_is_carried_and_reported(bench: Bench) -> None:
    path = bench.variant_dir / "tokenizer.json"
    path.write_text(
        path.read_text().replace('"fuse_unk":false', '"fuse_unk":true').replace('"fuse_unk": false', '"fuse_unk": true')
    )
    output = bench.compress(INITIAL)
    assert "different tokenizers" in bench.logs()
    assert bench.store.read_bytes(output.blobs["tokenizer.json"]) == path.read_bytes()


def test_a_delta_of_zero_is_allowed_and_reported(bench: Bench) -> None:
    same = load_file(bench.base_dir / "model.safetensors")[LINEAR]
    bench.edit(bench.variant_dir, lambda state: state.update({LINEAR: same}))
    output = bench.compress({"distill_steps": 2, "learning_rate_unit": "relative"})
    assert f"'{LINEAR}' is equal in base and variant: it is the base's own and costs nothing" in bench.logs()
    with merge.MergedSigns(
        Checkpoint.open(bench.store, bench.base), Artifact.open_store(bench.store, output.data["artifact"])
    ) as merged:
        assert merged.table[LINEAR]["kind"] == "base"
        assert torch.equal(merged.tensor(LINEAR, torch.bfloat16), same)


def test_a_variant_equal_to_its_base_comes_back_exactly(bench: Bench) -> None:
    bench.variant_dir = bench.base_dir
    output = bench.compress(INITIAL)
    entries = Artifact.open_store(bench.store, output.data["artifact"]).manifest["tensors"].values()
    assert {entry["kind"] for entry in entries} == {"base"}
    model = load_compressed_model(bench.store, bench.base, output.data["artifact"])
    expected = load_model(Checkpoint.open(bench.store, bench.base))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_shards_and_an_untied_head_are_fine(tmp_path: Path, dtype: torch.dtype) -> None:
    bench = Bench(tmp_path, dtype=dtype, shards=3, tied=False)
    output = bench.compress(INITIAL)
    assert {part["name"] for part in output.data["ledger"]} >= {"embeddings", "head", "norms"}
    model = load_compressed_model(bench.store, bench.base, output.data["artifact"])
    assert model.dtype == dtype
    assert output.data["nominal_ratio"] == pytest.approx(8 * dtype.itemsize, rel=0.01)


def test_biases_are_kept_and_applied(tmp_path: Path) -> None:
    """A Qwen2, whose q, k and v have biases."""
    generator = torch.Generator().manual_seed(5)
    config = tiny_config() | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    bench = Bench(tmp_path)
    for folder in (bench.base_dir, bench.variant_dir):
        state = tiny_state(generator, tied=True, vocab=288)
        for name in [name for name in state if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            state[name.replace(".weight", ".bias")] = torch.randn(state[name].shape[0], generator=generator)
        write_checkpoint(folder, {name: tensor.bfloat16() for name, tensor in state.items()}, config)
    output = bench.compress({"distill_steps": 2})
    assert {"biases", "codes"} <= {part["name"] for part in output.data["ledger"]}
    model = load_compressed_model(bench.store, bench.base, output.data["artifact"])
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(model.state_dict()[bias], load_file(bench.variant_dir / "model.safetensors")[bias])


def test_weights_stored_the_other_way_round_are_packed_along_their_inputs(tmp_path: Path) -> None:
    """A GPT-2, whose linears are (K, N) and whose files may leave out the model's prefix."""
    config: Json = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 64, "vocab_size": 288},
    }
    shapes = {"wte.weight": (288, 24), "wpe.weight": (64, 24), "ln_f.weight": (24,), "ln_f.bias": (24,)}
    for layer in range(2):
        for name, rows, columns in (
            ("attn.c_attn", 24, 72),
            ("attn.c_proj", 24, 24),
            ("mlp.c_fc", 24, 96),
            ("mlp.c_proj", 96, 24),
        ):
            shapes |= {f"h.{layer}.{name}.weight": (rows, columns), f"h.{layer}.{name}.bias": (columns,)}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{norm}.weight": (24,), f"h.{layer}.{norm}.bias": (24,)}
    bench = Bench(tmp_path)
    generator = torch.Generator().manual_seed(6)
    for folder in (bench.base_dir, bench.variant_dir):
        state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        write_checkpoint(folder, state, config)
    output = bench.compress({"distill_steps": 2})
    name = "h.1.mlp.c_proj.weight"
    base, variant = (load_file(side / "model.safetensors")[name] for side in (bench.base_dir, bench.variant_dir))
    artifact = Artifact.open_store(bench.store, output.data["artifact"])
    checkpoint = Checkpoint.open(bench.store, bench.base)
    with merge.MergedSigns(checkpoint, artifact) as merged:
        assert merged.codes(name).shape == (3, 24)
        signs = torch.where(variant - base < 0, -1.0, 1.0)
        assert torch.equal(merged.tensor(name, torch.float32), base + merged.scale(name) * signs)
    model = load_compressed_model(bench.store, bench.base, output.data["artifact"])
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_the_packed_model_answers_as_the_merged_one(bench: Bench) -> None:
    artifact = Artifact.open_store(bench.store, bench.compress(INITIAL).data["artifact"])
    base = Checkpoint.open(bench.store, bench.base)
    tokens = torch.arange(20).view(1, 20)
    dense = merge.load_model(base, artifact, "cpu", torch.float32)
    packed = merge.load_model(base, artifact, "cpu", torch.float32, packed=True)
    assert sum(isinstance(module, merge.PackedLinear) for module in packed.modules()) == 14
    torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def test_figures_name_scale_and_error_of_each_matrix(bench: Bench) -> None:
    figures = bench.compress(INITIAL).data["figures"]
    base, variant = (
        load_file(side / "model.safetensors")[LINEAR].float() for side in (bench.base_dir, bench.variant_dir)
    )
    delta = variant - base
    (line,) = [line for line in figures["matrices"] if line["name"] == LINEAR]
    error = (delta - delta.abs().mean() * torch.where(delta < 0, -1.0, 1.0)).norm() / delta.norm()
    assert line["relative_error"] == pytest.approx(float(error), rel=1e-4)
    assert line["scale"] == line["scale0"] == pytest.approx(float(delta.abs().mean()), rel=1e-4)
    assert figures["distillation"] is None


@pytest.mark.parametrize("settings", [{}, {"distill_steps": 10}])
def test_the_ledger_adds_up_and_was_predicted_from_the_config_alone(bench: Bench, settings: Json) -> None:
    output = bench.compress(INITIAL | settings)
    real = sum(bench.store.size(digest) for digest in output.blobs.values())
    assert sum(part["bytes"] for part in output.data["ledger"]) == output.data["artifact_bytes"] == real
    config = json.loads((bench.variant_dir / "config.json").read_text())
    side = {name: bench.store.size(digest) for name, digest in output.blobs.items() if name.endswith("json")}
    side.pop("manifest.json")
    predicted = layout.predict(config, BitDeltaConfig(**(INITIAL | settings)), side_files=side)
    assert sum(part["bytes"] for part in predicted) == pytest.approx(real, rel=0.01)
    exact = {part["name"]: part["bytes"] for part in output.data["ledger"]}
    assert {p["name"]: p["bytes"] for p in predicted if p["name"] != "manifest"} == {
        name: size for name, size in exact.items() if name != "manifest"
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"distill_steps": -1},
        {"distill_steps": True},
        {"distill_steps": 2.5},
        {"batch_size": 0},
        {"sequence_length": 1},
        {"learning_rate": 0},
        {"learning_rate": math.nan},
        {"learning_rate": "fast"},
        {"learning_rate_unit": "percent"},
        {"schedule": "linear"},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: Json) -> None:
    with pytest.raises(CompressionError, match=next(iter(wrong))):
        BitDeltaConfig(**wrong)


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(CompressionError, match="no setting 'bits'"):
        compress.parse_config({"bits": 1})


def test_the_defaults_are_the_papers() -> None:
    config = BitDeltaConfig()
    assert (config.distill_steps, config.batch_size, config.sequence_length) == (200, 4, 128)
    assert (config.learning_rate, config.learning_rate_unit, config.schedule) == (1e-4, "absolute", "cosine")
