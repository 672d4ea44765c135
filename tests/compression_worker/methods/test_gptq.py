"""GPTQ: grids, the checkpoint format byte by byte, what the report says, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression_worker import artifact as artifacts
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec
from compression_worker.methods.gptq.config import GPTQConfig
from compression_worker.methods.gptq.estimate import cheaper, estimate
from compression_worker.methods.gptq.grid import GridSettings, fitted
from compression_worker.methods.gptq.layout import group_size_of, pieces
from compression_worker.methods.gptq.merge import GridTensors
from compression_worker.methods.gptq.quantize import quantize
from compression_worker.preflight import Inputs, Model
from compression_worker.runner import Runner, run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from tests.families import make_family_pair

TEXTS = b"".join(json.dumps({"text": f"Sentence {n}: the fox jumps over the dog."}).encode() + b"\n" for n in range(60))
SHORT: Json = {"samples": 6, "length": 32}


class Bench:
    """A tiny model and what GPTQ makes of it."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        self.folder, _ = make_family_pair(folder, family)
        self.store = Store(folder / "store", durable=False)
        self.inputs = {
            "variant": attach_folder(self.store, self.folder),
            "calibration": self.store.write_bytes(parse_samples(TEXTS, TEXT).data),
        }
        self.logs: list[str] = []

    def plan(self, **config: Any) -> StepSpec:
        return StepSpec(kind="gptq.plan", params={"config": SHORT | config}, inputs=self.inputs, seed=3)

    def refused(self, **config: Any) -> CompressionError:
        with pytest.raises(CompressionError) as refused:
            Runner(store=self.store, device="cpu").compute(self.plan(**config), lambda event: None)
        return refused.value

    def made(self, **config: Any) -> Artifact:
        events: list[Json] = []
        self.output: StepOutput = run_plan(self.store, self.plan(**config), events.append, device="cpu")
        self.logs = [event["text"] for event in events if event["type"] == "log"]
        return Artifact.open_store(self.store, self.output.data["artifact"])

    def written(self, out: Path, **config: Any) -> Path:
        self.made(**config)
        artifacts.write_folder(out, self.store, self.output.blobs)
        return out


@pytest.fixture(scope="module", name="bench")
def fixture_bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("gptq"))


def straight_values(folder: Path, stem: str, config: Json) -> torch.Tensor:
    """``W^ (N, K)`` from the files alone, code by code, as the format is described."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for piece in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[piece] = load_file(folder / index[f"{stem}.{piece}"])[f"{stem}.{piece}"]
    bits = config["bits"]
    less = int(config["checkpoint_format"] == "gptq")

    def opened(words: list[int], count: int) -> list[int]:
        stream = sum((word & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words))
        return [(stream >> (bits * at)) & ((1 << bits) - 1) for at in range(count)]

    inputs, outputs = len(tensors["g_idx"]), tensors["scales"].shape[1]
    zeros = [opened(row.tolist(), outputs) for row in tensors["qzeros"]]
    made = torch.zeros((outputs, inputs))
    for output in range(outputs):
        codes = opened(tensors["qweight"][:, output].tolist(), inputs)
        for place, (code, group) in enumerate(zip(codes, tensors["g_idx"].tolist(), strict=True)):
            made[output, place] = float(tensors["scales"][group, output]) * (code - (zeros[group][output] + less))
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "form"), [(False, "gptq_v2"), (True, "gptq_v2"), (False, "gptq")])
def test_the_files_hold_what_the_format_says(
    bench: Bench, tmp_path: Path, bits: int, symmetric: bool, form: str
) -> None:
    folder = bench.written(tmp_path / "made", num_bits=bits, symmetric=symmetric, checkpoint_format=form)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "damp_percent": 0.01,
        "checkpoint_format": form,
        "lm_head": False,
    }
    name = "model.layers.1.self_attn.k_proj"
    with GridTensors(Artifact.open_folder(folder)) as tensors:
        ours = tensors.tensor(f"{name}.weight", torch.float32)
    torch.testing.assert_close(ours, straight_values(folder, name, said), rtol=0, atol=0)
    g_idx = load_file(folder / "codes-00001.safetensors")[f"{name}.g_idx"]
    assert torch.equal(g_idx, torch.arange(64, dtype=torch.int32) // 32)


def test_the_index_names_every_tensor_of_every_file(bench: Bench, tmp_path: Path) -> None:
    folder = bench.written(tmp_path / "made")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lying = {tensor: file.name for file in sorted(folder.glob("*.safetensors")) for tensor in load_file(file)}
    assert index["weight_map"] == lying
    assert index["metadata"]["total_size"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_more_bits_are_nearer_to_the_model(bench: Bench) -> None:
    model = load_model(Checkpoint.open(bench.store, bench.inputs["variant"]), dtype=torch.float32)
    tokens = torch.arange(40, 80).view(2, 20)
    off = []
    for bits in (2, 3, 4, 8):
        made = artifacts.load_model(None, bench.made(num_bits=bits), "cpu", torch.float32)
        with torch.no_grad():
            off.append(float((made(tokens).logits - model(tokens).logits).norm()))
    assert off == sorted(off, reverse=True)
    assert off[3] < off[0] / 20


def test_refinement_lowers_every_proxy_loss_of_the_first_stage(bench: Bench) -> None:
    losses = []
    for passes in (0, 3):
        lines = bench.made(num_bits=3, passes=passes, inputs="full").manifest["figures"]["matrices"]
        losses.append({line["name"]: line["proxy_loss"] for line in lines})
    assert all(losses[1][name] <= losses[0][name] * 1.0001 for name in losses[0])
    assert sum(losses[1].values()) < 0.98 * sum(losses[0].values())


def test_largest_inputs_first_and_fed_back_errors_beat_plain_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    hessian = 2 * x.T @ x / len(x)
    weight = torch.randn(96, 40, generator=generator)
    losses = []
    for config in (GPTQConfig(num_bits=3), GPTQConfig(num_bits=3, act_order=False)):
        made = quantize(weight, hessian, config, 32)
        losses.append(float(((hessian @ (weight - made.values)) * (weight - made.values)).sum()))
    plain = fitted(weight, 32, GridSettings(bits=3, symmetric=False, clip=True), hessian.diagonal())
    group = torch.arange(96) // 32
    codes = (weight / plain.scales[group] + plain.zeros[group]).round().clamp(0, 7)
    off = weight - plain.values(codes)
    assert max(losses) < 0.7 * float(((hessian @ off) * off).sum())


def test_dead_inputs_are_zero_and_cost_nothing() -> None:
    hessian = torch.eye(32) + 0.1
    hessian[7], hessian[:, 7] = 0, 0
    weight = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    made = quantize(weight, hessian, GPTQConfig(num_bits=4), 32)
    assert float(made.values[7].abs().max()) < 1e-6


def test_scales_are_the_fp16_numbers_that_a_runtime_multiplies_by() -> None:
    weight = torch.randn(64, 5, generator=torch.Generator().manual_seed(2))
    for symmetric in (False, True):
        grids = fitted(weight, 32, GridSettings(bits=4, symmetric=symmetric, clip=True), None)
        assert torch.equal(grids.scales, grids.scales.to(torch.float16).to(torch.float32))
        assert torch.equal(grids.zeros, grids.zeros.round())
        assert bool(((grids.zeros >= 0) & (grids.zeros <= 15)).all())
    plain = fitted(weight, 32, GridSettings(bits=4, symmetric=False, clip=False), None)
    least, greatest = weight[:32].amin(0), weight[:32].amax(0)
    torch.testing.assert_close(plain.scales[0], (greatest - least) / 15, rtol=1e-3, atol=0)


def test_a_searched_range_is_never_worse_by_its_own_measure() -> None:
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(2)) ** 3
    importance = torch.rand(64, generator=torch.Generator().manual_seed(3)) + 0.1

    def off(clip: bool) -> torch.Tensor:
        grids = fitted(weight, 32, GridSettings(bits=3, symmetric=False, clip=clip), importance)
        group = torch.arange(64) // 32
        codes = (weight / grids.scales[group] + grids.zeros[group]).round().clamp(0, 7)
        error = (weight - grids.values(codes)).square() * importance[:, None]
        return error.view(2, 32, 50).sum(dim=1)

    assert bool((off(True) <= off(False) * 1.00001).all())
    assert float(off(True).sum()) < 0.95 * float(off(False).sum())


def test_a_format_that_cannot_store_a_zero_of_nought_gets_none() -> None:
    weight = torch.rand(32, 6) + 0.1
    settings = GridSettings(bits=4, symmetric=False, clip=False)
    assert not fitted(weight, 32, settings, None).zeros.any()
    assert bool((fitted(weight, 32, replace(settings, least_zero=1), None).zeros == 1).all())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_bits": 5}, "num_bits is 5; it may be one of 2, 3, 4, 8"),
        ({"group_size": 48}, "group_size is 48, which does not divide the 64 inputs of a matrix: 32, 16, 8 do"),
        ({"damping": 0.0}, "damping is 0.0"),
        ({"inputs": "none"}, "it may be one of quantized, full"),
        ({"wrong": 1}, "GPTQ has no setting 'wrong'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_read(bench: Bench, config: Json, words: str) -> None:
    assert words in bench.refused(**config).message


def test_without_a_text_the_plan_is_refused_unless_the_model_writes_it(bench: Bench) -> None:
    alone = Bench.__new__(Bench)
    alone.store, alone.inputs, alone.logs = bench.store, {"variant": bench.inputs["variant"]}, []
    assert alone.refused().code == "no_calibration"
    made = alone.made(calibration="generations", num_bits=8)
    assert made.manifest["figures"]["calibration"]["tokens"] == 192


def test_groups_follow_the_shapes(bench: Bench) -> None:
    from compression_worker.architecture import Linear

    def linears(*widths: int) -> list[Linear]:
        return [Linear("w", 0, 8, width) for width in widths]

    assert group_size_of(GPTQConfig(), linears(4096, 11008)) == 128
    assert group_size_of(GPTQConfig(), linears(576, 1536)) == 64
    assert group_size_of(GPTQConfig(), linears(33, 45)) == -1
    assert group_size_of(GPTQConfig(group_size=-1), linears(64)) == -1


def test_sides_of_any_length_are_padded_and_come_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "odd")
    made = bench.made(num_bits=4)
    assert any("no multiples of 32 were padded" in line for line in bench.logs)
    assert "model.safetensors.index.json" not in made.manifest["files"]
    codes = torch.randint(0, 16, (33, 45), dtype=torch.uint8)
    packed = pieces(codes, torch.ones(1, 45), torch.zeros(1, 45), 4, 33, 0)
    assert {name: tuple(tensor.shape) for name, tensor in packed.items()} == {
        "g_idx": (64,),
        "qweight": (8, 64),
        "qzeros": (1, 8),
        "scales": (1, 64),
    }


def test_the_chain_of_quantized_inputs_differs_from_full_ones_and_both_are_reported(bench: Bench) -> None:
    behind, full = (bench.made(num_bits=3, inputs=inputs) for inputs in ("quantized", "full"))
    assert behind.digest != full.digest
    for made in (behind, full):
        lines = made.manifest["figures"]["matrices"]
        assert {line["origin"] for line in lines} == {"own"}
        assert {line["rows"] for line in lines} == {192}
        assert {line["damping"] for line in lines} == {0.01}
        assert all(0 < line["proxy_loss"] < 0.5 for line in lines)


def smol() -> Inputs:
    config = {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "vocab_size": 49152, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    }
    return Inputs(
        variant=Model(config=config, parameters=134_515_008, weight_bytes=269_060_552, size_bytes=272_000_000)
    )


def test_what_is_foretold_is_near_what_is_made(bench: Bench) -> None:
    manifest = Checkpoint.open(bench.store, bench.inputs["variant"]).manifest
    keys = ("config", "parameters", "weight_bytes", "size_bytes")
    inputs = Inputs(variant=Model(**{key: manifest[key] for key in keys}))
    for config in (
        GPTQConfig(num_bits=4, samples=6, length=32),
        GPTQConfig(num_bits=3, samples=6, length=32, inputs="full"),
    ):
        made = bench.made(num_bits=config.num_bits, inputs=config.inputs)
        foretold = estimate(config, inputs)
        by_part = {part["name"]: part["bytes"] for part in made.parts}
        for part in foretold.parts:
            if part["name"] in ("codes", "scales"):
                assert part["bytes"] == by_part[part["name"]], part["name"]
        total = made.summary()["artifact_bytes"]
        assert total <= foretold.result_bytes <= 1.15 * total
        planned = {step.kind: step.count for step in foretold.steps}
        _, plan, _ = Runner(store=bench.store, device="cpu").compute(
            bench.plan(num_bits=config.num_bits, inputs=config.inputs), lambda event: None
        )
        kinds = [step.kind for step in plan.steps] + ["gptq.plan"]
        assert planned == {kind: kinds.count(kind) for kind in kinds}


def test_a_small_model_is_foretold_to_fit_in_700_megabytes() -> None:
    found = estimate(GPTQConfig(num_bits=4, group_size=64, samples=8, length=512), smol())
    assert found.exact
    assert found.hungriest is not None
    assert found.hungriest.memory_bytes < 900_000_000
    assert {part["name"]: part["bytes"] for part in found.parts}["codes"] == 106_168_320 // 2


def test_less_text_is_the_cheaper_job() -> None:
    configs = list(cheaper(GPTQConfig(samples=32)))
    assert [config.samples for config in configs] == [16, 8, 4, 2, 1]


def test_a_folder_and_a_store_give_the_same_model(bench: Bench, tmp_path: Path) -> None:
    folder = bench.written(tmp_path / "made", num_bits=4)
    from_folder = artifacts.load_model(None, Artifact.open_folder(folder), "cpu")
    from_store = artifacts.load_model(None, bench.made(num_bits=4), "cpu")
    tokens = torch.arange(40, 60).view(1, 20)
    with torch.no_grad():
        assert torch.equal(from_folder(tokens).logits, from_store(tokens).logits)
