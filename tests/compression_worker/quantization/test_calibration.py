"""Hessians by blocks against a whole model's inputs; what is refused; what is found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compression_worker.checkpoints import attach_folder
from compression_worker.contracts import CompressionError, PlannedStep, StepContext, StepOutput, StepSpec
from compression_worker.quantization.calibration import (
    HIDDEN_FILE,
    Hessians,
    Sampling,
    SecondMoment,
    packed_triangle,
    planned,
    unpacked_triangle,
)
from compression_worker.runner import Runner, resolve_inputs
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from tests.families import edit_weights, make_family_pair

TEXTS = b"".join(json.dumps({"text": f"Sentence {n}: the fox jumps over the dog."}).encode() + b"\n" for n in range(60))
SAMPLING = Sampling(samples=6, length=32)


class Calibration:
    """The steps that calibrate a tiny model, run one by one in a store of their own."""

    def __init__(self, folder: Path, family: str, texts: bytes = TEXTS) -> None:
        self.folder, _ = make_family_pair(folder, family)
        self.store = Store(folder / "store", durable=False)
        self.inputs = {
            "variant": attach_folder(self.store, self.folder),
            "calibration": self.store.write_bytes(parse_samples(texts, TEXT).data),
        }
        self.digests: list[str] = []

    def run(self, sampling: Sampling = SAMPLING, *, hessians: bool = True, seed: int = 3) -> list[StepOutput]:
        self.digests = []
        steps = planned(sampling, self.inputs, 0, seed, 2, hessians=hessians)
        return [self.step(step) for step in steps]

    def step(self, step: PlannedStep) -> StepOutput:
        inputs = resolve_inputs(step.inputs, self.digests)
        spec = StepSpec(kind=step.kind, params=step.params, inputs=inputs, seed=step.seed)
        digest, output, _ = Runner(store=self.store, device="cpu").compute(spec, lambda event: None)
        self.digests.append(digest)
        return output

    def hessians(self, fingerprint: str) -> Hessians:
        inputs = {f"hessians-{at}": digest for at, digest in enumerate(self.digests[1:])}
        spec = StepSpec(kind="gptq.layers", inputs=inputs)
        nothing = lambda *given: None  # noqa: E731
        context = StepContext(store=self.store, spec=spec, progress=nothing, log=nothing, measure=nothing)
        return Hessians(context, fingerprint)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hessians_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    from compression_worker.tensors import TensorFile

    calibration = Calibration(tmp_path, family)
    outputs = calibration.run()
    found = calibration.hessians(outputs[1].data["fingerprint"])
    with TensorFile(calibration.store.path(outputs[0].blobs["tokens.safetensors"])) as file:
        tokens = file.tensor("tokens").to(torch.int64)
    assert tokens.shape == (6, 32)
    model = AutoModelForCausalLM.from_pretrained(calibration.folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, inputs, name=name: seen.update({name: inputs[0]} if inputs else {}))
    with torch.no_grad():
        model(tokens)
    checked = 0
    for name in [*outputs[1].data["linears"], *outputs[2].data["linears"]]:
        x = seen[name.removesuffix(".weight")].flatten(0, -2).to(torch.float64)
        torch.testing.assert_close(found.of(name).to(torch.float64), 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert found.line(name) | {"hessian": "", "block": 0} == {
            "hessian": "",
            "block": 0,
            "rows": 6 * 32,
            "origin": "own",
        }
        checked += 1
    assert checked == (14 if family == "llama" else 8)


def test_an_expert_with_few_rows_shares_those_of_its_layer(tmp_path: Path) -> None:
    calibration = Calibration(tmp_path, "mixtral")
    outputs = calibration.run(Sampling(samples=1, length=24))
    lines = outputs[1].data["linears"]
    down = [name for name in lines if name.endswith("w2.weight")]
    assert {lines[name]["origin"] for name in down} == {"pooled"}
    assert {lines[name]["rows"] for name in down} == {2 * 24}
    more = calibration.run(Sampling(samples=12, length=64))[1].data["linears"]
    assert "own" in {more[name]["origin"] for name in down}


def test_hessians_of_another_model_are_refused(tmp_path: Path) -> None:
    calibration = Calibration(tmp_path, "llama")
    calibration.run()
    with pytest.raises(CompressionError, match="made from another model") as refused:
        calibration.hessians("0" * 64)
    assert refused.value.code == "wrong_hessians"


def test_the_same_model_and_text_give_the_same_bytes_and_another_text_does_not(tmp_path: Path) -> None:
    calibration = Calibration(tmp_path, "llama")
    calibration.run()
    first = calibration.digests
    calibration.run()
    assert calibration.digests == first
    calibration.run(seed=4)
    assert calibration.digests[0] != first[0]


def test_the_model_can_write_the_text_itself(tmp_path: Path) -> None:
    calibration = Calibration(tmp_path, "llama")
    del calibration.inputs["calibration"]
    outputs = calibration.run(hessians=False)
    assert outputs[0].data == {"windows": 6, "length": 32, "tokens": 192}
    first = calibration.digests
    calibration.run(hessians=False)
    assert calibration.digests == first


def test_too_little_text_is_refused_and_a_little_less_is_said(tmp_path: Path) -> None:
    calibration = Calibration(tmp_path, "llama", b'{"text": "short"}\n')
    with pytest.raises(CompressionError, match="one window is 512: give more text") as refused:
        calibration.run(Sampling(samples=2, length=512))
    assert refused.value.code == "too_few_tokens"
    assert calibration.run(Sampling(samples=9, length=4), hessians=False)[0].data["windows"] < 9


def test_inputs_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    calibration = Calibration(folder, "llama")

    def swell(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.self_attn.v_proj.weight"].fill_(3e38)

    edit_weights(calibration.folder, swell)
    calibration.inputs["variant"] = attach_folder(calibration.store, calibration.folder)
    with pytest.raises(CompressionError, match=r"inputs of 'model.layers.0.self_attn.o_proj.weight' are not finite"):
        calibration.run()


def test_triangles_come_back() -> None:
    matrix = torch.randn(7, 7)
    matrix = matrix + matrix.T
    spec, data = packed_triangle(matrix)
    flat = torch.frombuffer(bytearray(b"".join(data)), dtype=torch.float32)
    assert spec.shape == (28,)
    assert torch.equal(unpacked_triangle(flat), matrix)


def test_a_second_moment_is_the_mean_of_outer_products_times_two() -> None:
    moment, x = SecondMoment(3), torch.randn(2500, 3)
    moment.add(x[:1500])
    moment.add(x[1500:])
    torch.testing.assert_close(moment.hessian(), 2 * x.T @ x / 2500, rtol=1e-5, atol=1e-6)


def test_the_last_step_keeps_no_hidden_states(tmp_path: Path) -> None:
    outputs = Calibration(tmp_path, "llama").run()
    assert [HIDDEN_FILE in output.blobs for output in outputs] == [True, True, False]
