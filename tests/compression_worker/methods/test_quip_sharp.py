"""QuIP# from a folder to an artifact and back: rotations that undo, losses of the solver, odd shapes, from_pretrained."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compression_worker import artifact as artifacts
from compression_worker.artifact import Artifact, load_compressed_model
from compression_worker.checkpoints import attach_folder
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec
from compression_worker.methods.quip_sharp.codebook import E8PRounder
from compression_worker.methods.quip_sharp.config import RHO, QuipSharpConfig
from compression_worker.methods.quip_sharp.layout import LAYOUT
from compression_worker.methods.quip_sharp.loading import load_packed
from compression_worker.methods.quip_sharp.merge import LatticeTensors
from compression_worker.methods.quip_sharp.quantize import code_words, quantize, unscaled
from compression_worker.methods.quip_sharp.rotation import Rotation
from compression_worker.runner import run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from kernels.e8p_matmul.reference import decode_matrix
from tests.families import make_family_pair

TEXTS = b"".join(json.dumps({"text": f"Sentence {n}: the fox jumps {n} times."}).encode() + b"\n" for n in range(80))
CONFIG = {"samples": 4, "length": 32, "passes": 1}
TOKENS = torch.arange(40, 60).view(1, 20)


class Bench:
    """A store that holds a tiny model."""

    def __init__(self, folder: Path, family: str = "llama") -> None:
        _, self.folder = make_family_pair(folder, family)
        self.store = Store(folder / "store")
        self.variant = attach_folder(self.store, self.folder)
        self.events: list[Json] = []

    def compress(self, config: Json, *, seed: int = 0, calibration: bytes = TEXTS) -> StepOutput:
        inputs = {"variant": self.variant}
        if calibration:
            inputs["calibration"] = self.store.write_bytes(parse_samples(calibration, TEXT).data)
        plan = StepSpec(kind="quip_sharp.plan", params={"config": CONFIG | config}, inputs=inputs, seed=seed)
        return run_plan(self.store, plan, self.events.append, device="cpu")

    def artifact(self, output: StepOutput) -> Artifact:
        return Artifact.open_store(self.store, output.data["artifact"])

    def written(self, output: StepOutput, out: Path) -> Path:
        artifacts.write_folder(out, self.store, output.blobs)
        return out

    def logs(self) -> list[str]:
        return [event["text"] for event in self.events if event["type"] == "log"]


@pytest.fixture(name="bench")
def fixture_bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hessian(inputs: int, rows: int = 400, seed: int = 3) -> torch.Tensor:
    """Of correlated inputs, one of which is large."""
    x = gaussian(rows, inputs, seed=seed) @ gaussian(inputs, inputs, seed=seed + 1)
    x[:, 0] *= 10
    return 2 * x.T @ x / rows


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (33, 45), (7, 24), (1, 8), (2, 3), (960, 576), (46, 92)])
def test_a_rotation_keeps_the_loss_and_goes_back(outputs: int, inputs: int) -> None:
    rotation = Rotation.of(outputs, inputs, seed=5, stream=3)
    s_in, s_out = rotation.signs()
    weight, second = gaussian(outputs, inputs), hessian(inputs)
    rotated, turned = rotation.weight(weight, s_in, s_out), rotation.hessian(second, s_in)
    assert rotated.shape == (rotation.input_plan.n, rotation.output_plan.n)
    assert rotation.input_plan.n % 8 == 0
    assert torch.equal(turned, turned.T)
    torch.testing.assert_close(unscaled(rotation.back(rotated.T), s_in, s_out), weight, rtol=0, atol=1e-5)
    loss = ((weight @ second) * weight).sum()
    torch.testing.assert_close(((turned @ rotated) * rotated).sum(), loss, rtol=1e-4, atol=0)
    assert Rotation.from_json(json.loads(json.dumps(rotation.to_json())), 5) == rotation


def test_an_outlier_is_spread_over_the_whole_matrix() -> None:
    rotation = Rotation.of(96, 64, seed=5, stream=3)
    weight = torch.zeros(96, 64)
    weight[4, 7] = 1.0
    rotated = rotation.weight(weight, *rotation.signs())
    torch.testing.assert_close(rotated.abs(), torch.full_like(rotated, (96 * 64) ** -0.5), rtol=0, atol=1e-6)


def test_streams_of_one_seed_differ_and_are_found_again() -> None:
    one, other = (Rotation.of(64, 64, 1, stream).signs()[0] for stream in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one, Rotation.of(64, 64, 1, 0).signs()[0])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_weights_without_a_hessian_lose_what_the_codebook_must(bits: int) -> None:
    """The published error of each codebook on Gaussians, times the energy that the width leaves."""
    config = QuipSharpConfig(num_bits=bits, rho=1.03, passes=0)
    made = quantize([gaussian(256, 256)], torch.eye(256), Rotation.of(256, 256, 0, 0), config)
    wanted = {2: 0.0919, 3: 0.0296, 4: 0.0098}[bits]
    assert made.pieces[0].proxy_loss == pytest.approx(wanted, rel=0.05)
    assert made.pieces[0].error / made.pieces[0].energy == pytest.approx(made.pieces[0].proxy_loss, rel=1e-3)


def test_feedback_beats_rounding_and_refinement_beats_feedback() -> None:
    weight, second = gaussian(48, 128), hessian(128)
    rotation = Rotation.of(48, 128, 0, 0)
    s_in, s_out = rotation.signs()
    rotated = rotation.weight(weight, s_in, s_out)
    unit = rotated.square().mean().sqrt() / 0.9
    plain, _ = E8PRounder(2)(rotated.T.reshape(48, 16, 8) / unit)
    lost = (weight - unscaled(rotation.back(plain.flatten(-2)), s_in, s_out) * unit).T
    nearest = float(((second @ lost) * lost).sum() / ((weight @ second) * weight).sum())
    fed, refined = (
        quantize([weight], second, rotation, QuipSharpConfig(passes=passes)).pieces[0].proxy_loss for passes in (0, 10)
    )
    assert refined < fed < nearest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_stored_is_what_was_rounded(bits: int) -> None:
    rotation = Rotation.of(33, 45, seed=2, stream=0)
    made = quantize([gaussian(21, 45), gaussian(12, 45, seed=1)], hessian(45), rotation, QuipSharpConfig(num_bits=bits))
    assert [plane.shape for plane in made.planes] == [(34, 6)] * (1 if bits == 2 else 2)
    back = rotation.back(decode_matrix(code_words(made.planes, bits)))
    torch.testing.assert_close(back, made.turned, rtol=0, atol=2e-5)


def test_the_width_that_is_found_loses_no_more_than_the_published_one() -> None:
    weight, second, rotation = gaussian(256, 128), hessian(128), Rotation.of(256, 128, 0, 0)
    published, found = (quantize([weight], second, rotation, QuipSharpConfig(rho=rho, passes=0)) for rho in (0.9, None))
    assert published.rho == 0.9
    assert found.rho > 0.92
    assert found.pieces[0].proxy_loss < published.pieces[0].proxy_loss


def test_joint_search_loses_less_than_greedy_stages() -> None:
    weight, second, rotation = gaussian(64, 64), hessian(64), Rotation.of(64, 64, 0, 0)
    greedy, joint = (
        quantize([weight], second, rotation, QuipSharpConfig(num_bits=4, joint_search=joint, passes=0)).pieces[0]
        for joint in (False, True)
    )
    assert joint.proxy_loss < 0.97 * greedy.proxy_loss


def test_a_hessian_of_one_direction_is_damped_and_used() -> None:
    x = gaussian(1, 32)
    made = quantize([gaussian(8, 32)], x.T @ x, Rotation.of(8, 32, 0, 0), QuipSharpConfig())
    assert made.feedback
    assert made.pieces[0].proxy_loss < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_ledger_and_the_bits_are_exact(bench: Bench, bits: int) -> None:
    output = bench.compress({"num_bits": bits})
    manifest = bench.artifact(output).manifest
    parts = {part["name"]: part["bytes"] for part in output.data["ledger"]}
    weights = sum(torch.Size(e["shape"]).numel() for e in manifest["tensors"].values() if e["kind"] == "lattice")
    matrices = manifest["figures"]["matrices"]
    assert parts["codes"] == weights * bits // 8
    assert parts["scales"] == 4 * len(matrices)
    assert sum(part["bytes"] for part in output.data["ledger"]) == output.data["artifact_bytes"]
    linears = manifest["figures"]["linears"]
    assert linears["bits_per_weight"] == pytest.approx(bits + 32 * len(matrices) / weights, rel=1e-5)
    assert linears["nominal_ratio"] == pytest.approx(16 / bits, rel=1e-5)
    assert output.data["name_hint"] == f"quip_sharp-{bits}bit"


def test_matrices_of_one_input_are_one_stack_unless_told_otherwise(bench: Bench) -> None:
    fused = bench.artifact(bench.compress({})).manifest["tensors"]
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert fused[f"{attention}.q_proj.weight"]["pieces"] == [f"{attention}.{n}_proj.weight" for n in "qkv"]
    assert fused[f"{mlp}.gate_proj.weight"]["pieces"] == [f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"]
    assert fused[f"{attention}.v_proj.weight"]["first"] == 96
    alone = bench.artifact(bench.compress({"fuse": False})).manifest["tensors"]
    assert all(entry["pieces"] == [name] for name, entry in alone.items() if entry["kind"] == "lattice")


def test_odd_sides_are_padded_and_the_padding_is_counted(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "odd")
    output = bench.compress({})
    entry = bench.artifact(output).manifest["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert entry["shape"] == [33, 45]
    assert entry["rotation"]["output_plan"]["n"] == 34
    assert entry["rotation"]["input_plan"]["n"] == 48
    assert entry["bytes"] == 34 * 48 // 4
    with LatticeTensors(bench.artifact(output)) as made:
        assert made.tensor("model.layers.0.mlp.down_proj.weight", torch.float32).shape == (33, 45)


def test_another_seed_gives_other_signs(bench: Bench) -> None:
    one, other = (bench.compress({}, seed=seed) for seed in (0, 1))
    assert one.blobs["codes-00000.safetensors"] != other.blobs["codes-00000.safetensors"]
    assert one.blobs["raw.safetensors"] == other.blobs["raw.safetensors"]


def test_experts_without_tokens_of_their_own_say_whose_hessian_they_used(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "mixtral")
    output = bench.compress({"samples": 1, "length": 16})
    origins = {line["origin"] for line in output.data["figures"]["matrices"]}
    assert origins >= {"own", "pooled"}
    assert any("rounded on the pooled Hessian" in line for line in bench.logs())


def test_four_bits_answer_nearly_as_the_model_does(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)
    divergences = []
    for bits in (2, 4):
        output = bench.compress({"num_bits": bits, "samples": 8})
        model: Any = load_compressed_model(bench.store, None, output.data["artifact"], dtype=torch.float32)
        with torch.no_grad():
            ours, theirs = (one(TOKENS).logits.log_softmax(-1) for one in (model, whole))
        divergences.append(float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")))
    assert divergences[1] < 0.2 * divergences[0]


LOAD = """
import sys
{imports}
import torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32, output_loading_info=True)
assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
torch.save(model(torch.arange(40, 60).view(1, 20)).logits.detach(), {out!r})
"""


@pytest.mark.parametrize(
    "imports",
    ["import compression_worker; import transformers", "import transformers.modeling_utils; import compression_worker"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_transformers_loads_the_folder_in_either_order_of_imports(tmp_path: Path, family: str, imports: str) -> None:
    bench = Bench(tmp_path, family)
    output = bench.compress({})
    folder, out = bench.written(output, tmp_path / "artifact"), tmp_path / "logits.pt"
    code = LOAD.format(imports=imports, folder=str(folder), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model: Any = load_compressed_model(bench.store, None, output.data["artifact"], dtype=torch.float32)
    # two processes may sum in another order, even of the same weights
    torch.testing.assert_close(torch.load(out, weights_only=True), model(TOKENS).logits, rtol=1e-5, atol=1e-6)


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, compression_worker; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_transformers_refuses_a_folder_whose_codes_were_changed(bench: Bench, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = bench.written(bench.compress({}), tmp_path / "artifact")
    path = folder / "codes-00001.safetensors"
    path.chmod(0o644)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(CompressionError, match=r"'codes-00001\.safetensors' does not match its digest"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_packed_linears_share_one_product_and_are_differentiable(bench: Bench) -> None:
    output = bench.compress({"num_bits": 3})
    model: Any = load_packed(bench.artifact(output), "cpu", torch.float32)
    attention = model.model.layers[0].self_attn
    calls = []
    attention.q_proj.stack.register_forward_hook(lambda *given: calls.append(1))
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits
    logits.sum().backward()
    assert len(calls) == 1
    assert embedded.grad is not None
    assert embedded.grad.isfinite().all()
    dense: Any = load_compressed_model(bench.store, None, output.data["artifact"], dtype=torch.float32)
    other = embedded.detach().requires_grad_(True)
    dense(inputs_embeds=other).logits.sum().backward()
    assert other.grad is not None
    torch.testing.assert_close(embedded.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_a_product_is_made_again_for_an_input_that_was_changed_in_place(bench: Bench) -> None:
    model: Any = load_packed(bench.artifact(bench.compress({})), "cpu", torch.float32)
    attention = model.model.layers[0].self_attn
    x = gaussian(1, 4, 64)
    first = attention.q_proj(x)
    x *= 2
    torch.testing.assert_close(attention.k_proj(x), attention.k_proj(x.clone()))
    torch.testing.assert_close(attention.q_proj(x), 2 * first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_bits": 5}, "the codebooks have 2, 3 and 4 bits"),
        ({"joint_search": True}, "joint_search is for num_bits 4"),
        ({"rho": 0.0}, "above 0"),
        ({"tuning": "all"}, "may be one of none, block, end_to_end, both"),
        ({"tuning": "block", "samples": 1}, "a window to learn from and one to judge by"),
        ({"bits": 3}, "no setting 'bits'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_can(bench: Bench, config: Json, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        bench.compress(config)


def test_without_a_text_the_plan_says_what_to_do_and_the_model_may_write_one(bench: Bench) -> None:
    with pytest.raises(CompressionError, match="set calibration=generations"):
        bench.compress({}, calibration=b"")
    output = bench.compress({"calibration": "generations"}, calibration=b"")
    assert output.data["method"] == "quip_sharp"


def test_an_artifact_of_another_layout_is_refused(bench: Bench) -> None:
    artifact = bench.artifact(bench.compress({}))
    assert artifact.manifest["layout"] == LAYOUT
    artifact.manifest["layout"]["version"] = 2
    with pytest.raises(CompressionError, match="a layout that this version does not know"):
        LatticeTensors(artifact)


def test_lines_that_do_not_fit_their_tensors_are_refused(bench: Bench) -> None:
    artifact = bench.artifact(bench.compress({}))
    name = "model.layers.0.self_attn.q_proj.weight"
    for change in ({"pieces": [name]}, {"bits": 3}, {"rotation": {}}):
        original = dict(artifact.manifest["tensors"][name])
        artifact.manifest["tensors"][name] |= change
        with LatticeTensors(artifact) as made, pytest.raises(CompressionError, match="does not fit its line"):
            made.tensor(name, torch.float32)
        artifact.manifest["tensors"][name] = original


def test_published_settings_are_the_defaults() -> None:
    config = QuipSharpConfig()
    assert (config.sign_rate, config.passes, config.damping, config.learning_rate) == (5e-4, 10, 0.01, 5e-5)
    assert RHO == {2: 0.9, 3: 0.98, 4: 1.03}
    assert QuipSharpConfig(num_bits=4).sign_rate == 5e-5
    assert asdict(config)["fuse"]


def test_the_restored_folder_is_a_plain_one(bench: Bench, tmp_path: Path) -> None:
    output = bench.compress({})
    artifacts.restore(None, bench.artifact(output), tmp_path / "model", lambda done, total, unit: None)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    restored, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", bench.folder))
    assert restored.keys() == own.keys()
    said = json.loads(bench.artifact(output).paths["config.json"].read_text())
    assert said["quantization_config"] == {"quant_method": "deltaworks_quip_sharp", "bits": 2}
