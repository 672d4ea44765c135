"""DeltaDQ from two folders to an artifact: exact counts, the published grid, parts that rejoin, and honest ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compression_worker.artifact import Artifact, load_compressed_model
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model
from compression_worker.contracts import CompressionError, Json, StepOutput, StepSpec
from compression_worker.methods.deltadq.config import DeltaDQConfig
from compression_worker.methods.deltadq.merge import MergedSparse
from compression_worker.methods.deltadq.quantize import (
    Dropout,
    Grid,
    Survivors,
    coded,
    delta_tiles,
    joined,
    loaded,
    quantize,
    separate,
    squares,
    stored,
    survivors,
)
from compression_worker.methods.deltadq.search import candidates
from compression_worker.runner import run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.store import Store
from kernels.group_mask.reference import keep_factors
from tests.tiny import make_tiny_pair

TEXTS = b"".join(json.dumps({"text": f"Sentence {n}: the fox jumps {n} times."}).encode() + b"\n" for n in range(12))
PAPER = torch.tensor([-0.8, -0.52, -0.11, 0.0, 0.19, 0.43, 0.61, 0.7])


class Bench:
    """A store that holds a tiny pair."""

    def __init__(self, folder: Path) -> None:
        self.base_dir, self.variant_dir = make_tiny_pair(folder)
        self.store = Store(folder / "store")
        self.base, self.variant = (attach_folder(self.store, side) for side in (self.base_dir, self.variant_dir))
        self.events: list[Json] = []

    def compress(self, config: Json, *, seed: int = 0, calibration: bytes = TEXTS) -> StepOutput:
        inputs = {"base": self.base, "variant": self.variant}
        if calibration:
            inputs["calibration"] = self.store.write_bytes(parse_samples(calibration, TEXT).data)
        plan = StepSpec(kind="deltadq.plan", params={"config": config}, inputs=inputs, seed=seed)
        return run_plan(self.store, plan, self.events.append, device="cpu")

    def merged(self, output: StepOutput) -> MergedSparse:
        artifact = Artifact.open_store(self.store, output.data["artifact"])
        return MergedSparse(Checkpoint.open(self.store, self.base), artifact)


@pytest.fixture(name="bench")
def fixture_bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_grid_of_the_paper_is_rebuilt_to_the_number() -> None:
    made = quantize(PAPER, 4)
    assert made.grid.scale == pytest.approx(0.1)
    assert made.grid.zero == 8
    assert made.codes.tolist() == [0, 3, 7, 8, 10, 12, 14, 15]
    torch.testing.assert_close(made.values(), torch.tensor([-0.8, -0.5, -0.1, 0.0, 0.2, 0.4, 0.6, 0.7]))
    parts = separate(made.codes, 4, 8)
    assert [(at.tolist(), within.tolist()) for at, within in parts] == [
        ([0], [0]), ([1], [1]), ([], []), ([2], [1]), ([3], [0]), ([4], [0]), ([5], [0]), ([6, 7], [0, 1]),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_codes_rejoin_from_any_number_of_parts(parts: int) -> None:
    codes = torch.randint(0, 16, (5, 77), dtype=torch.uint8)
    assert torch.equal(joined(separate(codes, 4, parts), 4, 385), codes.reshape(-1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("peaked", [False, True])
def test_what_is_stored_comes_back_and_is_never_larger_than_its_bits(bits: int, peaked: bool) -> None:
    values = torch.randn(64, 129, generator=torch.Generator().manual_seed(bits))
    values = values**5 if peaked else values.sign() * values.abs().sqrt()
    made = quantize(values, bits)
    coding, data = stored(made, bits)
    assert len(data) <= -(-values.numel() * bits // 8)
    assert torch.equal(loaded(data, coding, bits, 64, 129), made.codes)
    if peaked and 2 < bits < 16:
        assert coding == "zstd"
        assert len(data) < 0.8 * values.numel() * bits / 8


def test_a_matrix_of_one_value_and_one_of_zeros_are_exact() -> None:
    for value in (0.25, -0.5, 0.0):
        made = quantize(torch.full((3, 4), value), 4)
        assert made.values().tolist() == [[value] * 4] * 3


def test_damaged_codes_are_refused() -> None:
    made = quantize(torch.randn(8, 64) ** 5, 4)
    coding, data = stored(made, 4)
    assert coding == "zstd"
    for damaged in (data[:-1], data[1:], b""):
        with pytest.raises(CompressionError, match="cannot be read"):
            loaded(damaged, coding, 4, 8, 64)
    with pytest.raises(CompressionError, match="cannot be read"):
        loaded(data, coding, 4, 8, 65)


def test_every_group_keeps_its_exact_count_and_the_rescaled_values() -> None:
    delta = torch.randn(7, 70, generator=torch.Generator().manual_seed(2))
    dropout = Dropout(seed=5, tensor=3, alpha=8, group_size=16)
    made = survivors(delta, dropout, 16)
    whole = torch.cat(list(delta_tiles(made.codes, made.grid, dropout, 70)))
    kept = whole != 0
    for start in range(0, 64, 16):
        assert (kept[:, start : start + 16].sum(dim=1) == 2).all()
    assert (kept[:, 64:].sum(dim=1) == 1).all()
    torch.testing.assert_close(whole[:, :64][kept[:, :64]], (8 * delta[:, :64])[kept[:, :64]], rtol=0.01, atol=0.0)
    torch.testing.assert_close(whole[:, 64:][kept[:, 64:]], (6 * delta[:, 64:])[kept[:, 64:]], rtol=0.01, atol=0.0)


@pytest.mark.parametrize("bits", [2, 4, 16])
def test_the_error_taken_from_the_survivors_is_that_of_the_whole_matrix(bits: int) -> None:
    delta = torch.randn(9, 70, generator=torch.Generator().manual_seed(6))
    dropout = Dropout(seed=1, tensor=0, alpha=4, group_size=16)
    made, change = coded(delta, dropout, bits)
    whole = torch.cat(list(delta_tiles(made.codes, made.grid, dropout, 70)))
    assert squares(delta) + change == pytest.approx(float((whole - delta).double().square().sum()), rel=1e-6)


def test_the_expected_delta_is_the_delta() -> None:
    delta = torch.randn(6, 40, generator=torch.Generator().manual_seed(4))
    total = torch.zeros_like(delta)
    for seed in range(800):
        dropout = Dropout(seed=seed, tensor=0, alpha=4, group_size=16)
        made = survivors(delta, dropout, 16)
        total += torch.cat(list(delta_tiles(made.codes, made.grid, dropout, 40)))
    # Standard error of a mean of 800 draws of 0 or 4 d is 0.061 |d|; five of them, and bf16.
    assert ((total / 800 - delta).abs() <= 0.32 * delta.abs() + 1e-4).all()


def test_the_artifact_holds_what_the_settings_say(bench: Bench) -> None:
    output = bench.compress({"alpha": 4, "num_bits": 4, "parts": 8, "group_size": 16})
    assert output.data["nominal_ratio"] == 64
    base, variant = (load_file(side / "model.safetensors") for side in (bench.base_dir, bench.variant_dir))
    with bench.merged(output) as merged:
        for name, entry in merged.table.items():
            if entry["kind"] != "sparse":
                assert torch.equal(merged.tensor(name, torch.bfloat16), variant[name]), name
                continue
            delta = variant[name].float() - base[name].float()
            found = merged.tensor(name, torch.float32) - base[name].float()
            columns = merged.dropout(name).positions(range(len(delta)), delta.shape[1])
            mask = torch.zeros_like(delta, dtype=torch.bool).scatter_(1, columns, True)
            assert (found[~mask] == 0).all()
            rescaled = delta.gather(1, columns) * torch.from_numpy(keep_factors(delta.shape[1], 16, 4))
            # Half a step, and up to one where the rounded zero point pushes an end of the range off the grid.
            lost = (found.gather(1, columns) - rescaled).abs() / merged.grid(name).scale
            assert lost.max() <= 1.01, name
            assert lost.mean() < 0.3, name
    linears = output.data["figures"]["linears"]
    assert linears["true_ratio"] > linears["csr_ratio"]
    assert linears["true_ratio"] < linears["nominal_ratio"]
    assert sum(part["bytes"] for part in output.data["ledger"]) == output.data["artifact_bytes"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_mask(bench: Bench, tmp_path: Path) -> None:
    config = {"group_size": 8}
    first = bench.compress(config).blobs
    assert Bench(tmp_path / "again").compress(config).blobs == first
    other = bench.compress(config, seed=1).blobs
    assert other["codes-00000.safetensors"] != first["codes-00000.safetensors"]


def test_the_group_size_of_least_error_is_found_and_every_candidate_is_reported(bench: Bench) -> None:
    for criterion in ("attention_error", "output_error"):
        search = bench.compress({"group_size_by": criterion}).data["figures"]["search"]
        assert search["criterion"] == criterion
        assert [score["group_size"] for score in search["scores"]] == candidates(8, 128)
        best = min(search["scores"], key=lambda score: score["error"])
        assert search["group_size"] == best["group_size"]
        assert all(score["error"] > 0 for score in search["scores"])


def test_loading_and_restoring_give_the_same_model(bench: Bench) -> None:
    output = bench.compress({"group_size": 16, "embeddings": "int8"})
    model = load_compressed_model(bench.store, bench.base, output.data["artifact"], dtype=torch.float32)
    with bench.merged(output) as merged:
        for name, weight in model.state_dict().items():
            if name in merged.table:
                assert torch.equal(weight, merged.tensor(name, torch.float32)), name
    variant = load_model(Checkpoint.open(bench.store, bench.variant), dtype=torch.float32)
    tokens = torch.arange(20)[None]
    assert (model(tokens).logits - variant(tokens).logits).abs().max() < 5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"parts": 3}, "no power of two: 2 or 4"),
        ({"parts": 16}, "At most 8 parts"),
        ({"num_bits": 9, "parts": 1}, "from 1 to 8"),
        ({"num_bits": 16, "parts": 2}, "set parts to 1"),
        ({"group_size": 20}, "no multiple of alpha 8, .*: 16 or 24 can"),
        ({"bits": 3}, "no setting 'bits'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_can(bench: Bench, config: Json, words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        bench.compress(config)


def test_a_search_without_text_says_what_to_do(bench: Bench) -> None:
    with pytest.raises(CompressionError, match="set group_size"):
        bench.compress({}, calibration=b"")


@pytest.mark.parametrize(
    ("alpha", "bits", "parts", "nominal"),
    [(16, 16, 1, 16), (8, 8, 1, 16), (8, 4, 1, 32), (8, 4, 4, 64), (8, 4, 8, 128), (16, 4, 8, 256), (32, 4, 8, 512)],
)
def test_the_nominal_ratio_is_that_of_the_paper(alpha: int, bits: int, parts: int, nominal: float) -> None:
    assert DeltaDQConfig(alpha=alpha, num_bits=bits, parts=parts).nominal_ratio == nominal


def test_survivors_without_a_grid_are_bfloat16() -> None:
    made = Survivors(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), Grid(1.0, 0.0))
    assert made.values().tolist() == [[1.5, -2.0]]
