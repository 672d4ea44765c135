"""Targets are met or refused with the nearest there is; finer forms load, restore and distil as they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression_worker.artifact import Artifact, load_compressed_model
from compression_worker.checkpoints import Checkpoint, load_model
from compression_worker.contracts import CompressionError, Json, StepOutput
from compression_worker.evaluation.fidelity import token_divergences
from compression_worker.methods.bitdelta import merge
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from tests.compression_worker.methods.test_bitdelta import Bench


@pytest.fixture(name="bench")
def fixture_bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def models(bench: Bench, output: StepOutput) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The compressed model and the variant, both in fp32."""
    compressed = load_compressed_model(bench.store, bench.base, output.data["artifact"], dtype=torch.float32)
    return compressed, load_model(Checkpoint.open(bench.store, bench.variant), dtype=torch.float32)


def divergence(bench: Bench, output: StepOutput) -> float:
    compressed, variant = models(bench, output)
    tokens = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        return float(token_divergences(variant(tokens).logits, compressed(tokens).logits).mean())


@pytest.mark.parametrize("ratio", [1.8, 2.6])
def test_a_target_ratio_is_met_within_two_percent(bench: Bench, ratio: float) -> None:
    output = bench.compress({"target_ratio": ratio, "distill_steps": 0})
    assert output.data["true_ratio"] == pytest.approx(ratio, rel=0.02)
    assert output.data["figures"]["target"]["expected"] == pytest.approx(output.data["true_ratio"], rel=0.005)
    assert {matrix["coding"] for matrix in output.data["figures"]["matrices"]} - {"tensor"}
    assert divergence(bench, output) < divergence(bench, bench.compress({"distill_steps": 0}))


def test_a_target_divergence_is_met_within_two_percent(bench: Bench) -> None:
    output = bench.compress({"target_kl": 0.01})
    target = output.data["figures"]["target"]
    assert 0.98 * 0.01 <= target["reached"] <= 1.02 * 0.01
    assert output.data["config"]["distill_steps"] == 0
    assert 0.2 * 0.01 < divergence(bench, output) < 5 * 0.01


def test_what_a_target_chose_is_distilled_dropped_matrices_among_it(bench: Bench) -> None:
    target = {"target_ratio": 5.0, "learning_rate": 0.02, "learning_rate_unit": "relative", "schedule": "constant"}
    output = bench.compress(target | {"distill_steps": 30})
    codings = {matrix["coding"] for matrix in output.data["figures"]["matrices"]}
    assert codings & {"dropped", "rank 4", "rank 16"}
    losses = output.data["figures"]["distillation"]["losses"]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_target_ratio_counts_the_loss_curve_of_a_distillation(bench: Bench) -> None:
    output = bench.compress({"target_ratio": 1.8, "distill_steps": 600, "batch_size": 1, "sequence_length": 8})
    assert output.data["true_ratio"] == pytest.approx(1.8, rel=0.02)


@pytest.mark.parametrize(
    "config",
    [{"scale": "group", "group_size": 24, "masks": 2, "residual_rank": 2}, {"scale_fit": "activations"}],
    ids=["finer", "one scale that was fitted"],
)
def test_the_error_of_a_matrix_is_that_of_its_distilled_scales(bench: Bench, config: Json) -> None:
    training = {"distill_steps": 4, "learning_rate": 0.3, "learning_rate_unit": "relative"}
    initial, distilled = (bench.compress(config | steps) for steps in ({"distill_steps": 0}, training))
    before, after = (
        {line["name"]: line["relative_error"] for line in output.data["figures"]["matrices"]}
        for output in (initial, distilled)
    )
    variant = load_file(bench.variant_dir / "model.safetensors")
    base = load_file(bench.base_dir / "model.safetensors")
    artifact = Artifact.open_store(bench.store, distilled.data["artifact"])
    with merge.MergedSigns(Checkpoint.open(bench.store, bench.base), artifact) as merged:
        for name, error in after.items():
            delta = variant[name].float() - base[name].float()
            lost = merged.tensor(name, torch.float32) - variant[name].float()
            assert error == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-3), name
            assert error != before[name]


def test_a_ratio_out_of_reach_is_refused_with_the_nearest(bench: Bench) -> None:
    with pytest.raises(CompressionError, match=r"has [\d,]+ bytes, a ratio of \d") as refusal:
        bench.compress({"target_ratio": 5000.0, "distill_steps": 0})
    assert refusal.value.code == "target_unreachable"


def test_more_bytes_than_can_be_used_is_said(bench: Bench) -> None:
    output = bench.compress({"target_ratio": 0.3, "distill_steps": 0})
    assert "asks for more bytes than it can use" in bench.logs()
    assert divergence(bench, output) < 1e-3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_ratio": 12.0, "target_kl": 0.1}, "choose one of them"),
        ({"target_kl": 0.1, "distill_steps": 5}, "must be 0"),
        ({"target_ratio": -1.0}, "must be above 0"),
        ({"masks": 0}, "from 1 to 8"),
        ({"scale": "block"}, "tensor, row, column, group"),
        ({"embeddings": "int2"}, "raw, sign, int4, int8"),
    ],
)
def test_settings_that_cannot_be_are_refused(config: Json, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        BitDeltaConfig(**config)


FINER = [
    {"scale": "row"},
    {"scale": "group", "group_size": 24, "masks": 2},
    {"residual_rank": 4, "embeddings": "sign"},
    {"scale_fit": "activations", "embeddings": "int4"},
]


@pytest.mark.parametrize("config", FINER, ids=str)
def test_finer_forms_are_nearer_and_give_the_same_bytes_again(bench: Bench, config: Json, tmp_path: Path) -> None:
    settings = config | {"distill_steps": 0}
    output = bench.compress(settings)
    assert Bench(tmp_path / "again").compress(settings).blobs == output.blobs
    assert sum(part["bytes"] for part in output.data["ledger"]) == output.data["artifact_bytes"]
    blocks_only = bench.compress({"distill_steps": 0, "embeddings": config.get("embeddings", "raw")})
    if config.get("scale_fit") != "activations":
        assert divergence(bench, output) < divergence(bench, blocks_only)
    artifact = Artifact.open_store(bench.store, output.data["artifact"])
    model = models(bench, output)[0].state_dict()
    with merge.MergedSigns(Checkpoint.open(bench.store, bench.base), artifact) as merged:
        for name in merged.table:
            assert torch.equal(model[name], merged.tensor(name, torch.float32)), name


@pytest.mark.parametrize(
    "config",
    [{}, {"scale": "row"}, {"scale": "column"}, {"scale": "group", "group_size": 24, "masks": 2}, {"masks": 3}],
    ids=str,
)
def test_packed_and_merged_models_answer_alike(bench: Bench, config: Json) -> None:
    output = bench.compress(config | {"distill_steps": 0})
    base = Checkpoint.open(bench.store, bench.base)
    artifact = Artifact.open_store(bench.store, output.data["artifact"])
    dense = merge.load_model(base, artifact, dtype=torch.float32)
    packed = merge.load_model(base, artifact, dtype=torch.float32, packed=True)
    assert sum(isinstance(module, merge.PackedLinear) for module in packed.modules()) == 14
    tokens = torch.arange(12).view(1, 12)
    torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [FINER[1], FINER[2]], ids=str)
def test_finer_scales_are_distilled(bench: Bench, config: Json) -> None:
    steps = {"learning_rate": 0.02, "learning_rate_unit": "relative", "schedule": "constant"}
    initial = bench.compress(config | {"distill_steps": 0})
    distilled = bench.compress(config | steps | {"distill_steps": 30})
    losses = distilled.data["figures"]["distillation"]["losses"]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert initial.blobs["scales.safetensors"] != distilled.blobs["scales.safetensors"]
    assert initial.blobs["codes-00000.safetensors"] == distilled.blobs["codes-00000.safetensors"]


def test_the_published_form_keeps_the_layout_of_the_first_release(bench: Bench) -> None:
    published = Artifact.open_store(bench.store, bench.compress({"distill_steps": 0}).data["artifact"])
    finer = Artifact.open_store(bench.store, bench.compress({"distill_steps": 0, "scale": "row"}).data["artifact"])
    assert published.manifest["layout"]["version"] == 1
    assert finer.manifest["layout"]["version"] == 2
