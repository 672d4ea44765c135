"""The baselines that our artifacts are measured beside: their bytes are honest, and as many as ours."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_worker import catalog, commands, settings
from compression_worker.checkpoints import Checkpoint
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.samples import parse_samples, read_samples
from compression_worker.store import Store
from dashboard.verdicts import VerdictKind
from tests.benchmarks.delta_peers import contest, ours, sizes, tables
from tests.benchmarks.delta_peers.adapter import Adapter
from tests.benchmarks.delta_peers.measure import Evaluator, compare
from tests.benchmarks.delta_peers.pair import BLOCKS, MATRICES, Pair, decompose
from tests.benchmarks.delta_peers.peers import (
    LowRank,
    OneBit,
    Peer,
    Sparse,
    baselines,
    largest,
    random_mask,
)
from tests.benchmarks.delta_peers.sparse import (
    pack_positions,
    pack_values,
    unpack_positions,
    unpack_values,
)
from tests.tiny import SENTENCES, make_tiny_pair

PEERS = [*baselines(), Adapter()]
IDS = [f"{peer.label}, {len(peer.scope.parts)}" for peer in PEERS]
MIDDLE = 0.3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    base, variant = make_tiny_pair(folder, tied=False)
    return Pair(Store(folder / "store", durable=False), base, variant)


def middle(peer: Peer, pair: Pair) -> float:
    """A dial between a peer's least and greatest."""
    dials = peer.dials(pair)
    if dials is None:
        return 0.0
    dial = dials[0] + MIDDLE * (dials[1] - dials[0])
    return float(round(dial)) if peer.whole_dial else dial


class Blind:
    """A variant that has shapes and no values."""

    def __init__(self, variant: Checkpoint) -> None:
        self._variant = variant

    def tensor(self, name: str) -> torch.Tensor:
        return torch.full_like(self._variant.tensor(name), math.nan)


@pytest.mark.parametrize("peer", PEERS, ids=IDS)
def test_a_form_is_read_back_from_its_counted_files_and_the_base_alone(
    peer: Peer, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sizes.encode_files(peer, pair, middle(peer, pair))
    size = sizes.write_files(files, tmp_path / "form")
    assert size == sum(len(raw) for raw in files.values())
    assert pair.changed  # known before the variant's values are taken away
    wanted = {name: expected(peer, pair, name) for name in pair.names}
    monkeypatch.setattr(pair, "variant", Blind(pair.variant))
    weights = sizes.read_weights(peer, pair, tmp_path / "form")
    assert weights.keys() == wanted.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, wanted[name], rtol=0, atol=tolerance(peer)), name


def expected(peer: Peer, pair: Pair, name: str) -> torch.Tensor:
    """What a form should come to, by its plain definition: no packing, no files."""
    variant = pair.variant.tensor(name).float()
    if name in pair.kept(peer.scope) or "lossless" in peer.label:
        return variant
    delta = pair.delta(name)
    if isinstance(peer, OneBit):
        delta = delta.abs().mean() * torch.where(delta < 0, -1.0, 1.0)
    elif isinstance(peer, Sparse):
        share = middle(peer, pair)
        if peer.random:
            index = pair.compressed(peer.scope).index(name)
            delta = delta / share * random_mask(delta.shape, share, 20_240_211 + index)
        else:
            delta = delta * largest(delta, share)
    else:
        rank = ranks(peer, pair)[name]
        left, singular, right = torch.linalg.svd(delta.double(), full_matrices=False)
        delta = ((left[:, :rank] * singular[:rank]) @ right[:rank]).float()
    return pair.base.tensor(name).float() + delta.view(variant.shape)


def ranks(peer: Peer, pair: Pair) -> dict[str, int]:
    stored = peer.encode(pair, middle(peer, pair))
    if isinstance(peer, LowRank):
        return {name: stored[f"{name}.left"].shape[1] for name in pair.compressed(peer.scope)}
    modules = {name: f"base_model.model.{name.removesuffix('.weight')}" for name in pair.compressed(peer.scope)}
    return {name: stored[f"{key}.lora_A.weight"].shape[0] for name, key in modules.items()}


def tolerance(peer: Peer) -> float:
    """Deltas of the tiny pair lie within 0.06 or so, those of DARE at 0.3 within 0.2."""
    if isinstance(peer, Sparse) and peer.bits == 4:
        return 0.4 / 15 / 2 if peer.random else 0.12 / 15 / 2
    if isinstance(peer, Sparse):
        return 1e-4  # fp16
    return 1e-3 if isinstance(peer, LowRank | Adapter) else 1e-8


def test_magnitude_pruning_keeps_exactly_its_share_and_the_largest(pair: Pair, tmp_path: Path) -> None:
    peer = Sparse(label="pruning", random=False, bits=16)
    sizes.write_files(sizes.encode_files(peer, pair, 0.25), tmp_path / "form")
    weights = sizes.read_weights(peer, pair, tmp_path / "form")
    for name in pair.compressed(BLOCKS):
        changed = weights[name] != pair.base.tensor(name).float()
        assert int(changed.sum()) == round(0.25 * changed.numel()), name
        size = pair.delta(name).abs()
        assert size[changed].min() >= size[~changed].max(), name


@pytest.mark.parametrize("peer", [peer for peer in PEERS if "lossless" not in peer.label and "1 bit" not in peer.label])
def test_the_search_lands_within_two_percent_of_any_size_in_reach(peer: Peer, pair: Pair) -> None:
    known: dict[float, int] = {}
    low, high = (sum(map(len, sizes.encode_files(peer, pair, dial).values())) for dial in peer.dials(pair) or ())
    for share in (0.15, 0.7):
        wanted = round(low + share * (high - low))
        match = sizes.match_size(peer, pair, wanted, known)
        assert match is not None
        assert match.size == sum(map(len, sizes.encode_files(peer, pair, match.dial).values()))
        assert abs(match.size / wanted - 1) <= sizes.EQUAL, (match, wanted)


def test_a_size_out_of_reach_gives_the_largest_form_or_none(pair: Pair) -> None:
    peer = Sparse(label="DARE", random=True, bits=4)
    greatest = sizes.match_size(peer, pair, 10**9, {})
    assert greatest is not None
    assert greatest.dial == 1.0
    assert sizes.match_size(peer, pair, pair.part_bytes(frozenset({"embeddings"})), {}) is None


def test_the_embeddings_count_where_they_are_kept_and_where_they_are_coded(pair: Pair) -> None:
    blocks, matrices = (
        sum(map(len, sizes.encode_files(OneBit(label="1 bit", scope=scope), pair, 0.0).values()))
        for scope in (BLOCKS, MATRICES)
    )
    raw = pair.part_bytes(frozenset({"embeddings", "head"}))
    assert blocks - matrices == pytest.approx(raw * 15 / 16, rel=0.02)


@pytest.mark.parametrize("share", [0.004, 0.06, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 7), (64, 100), (200, 513)])
def test_positions_come_back_in_whatever_form_is_smallest(share: float, shape: tuple[int, int]) -> None:
    mask = random_mask(shape, share, seed=1)
    stored = pack_positions(mask)
    assert torch.equal(unpack_positions(stored, shape), mask)
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) <= -(-mask.numel() // 8)


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000])
def test_four_bit_values_lie_within_half_a_step_of_their_group(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    found = unpack_values(pack_values(values, 4), count)
    for group, back in zip(values.split(256), found.split(256), strict=True):
        step = float(group.max() - group.min()) / 15
        assert (group - back).abs().max() <= 0.51 * step + 2e-3  # the grid itself is fp16


def test_a_decomposition_of_deficient_rank_has_no_noise_made_large() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(40, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    factors = decompose(delta)
    assert torch.isfinite(factors.left).all()
    assert int((factors.singular > 0).sum()) == 3
    assert torch.allclose(factors.left[:, :3] @ factors.right[:3], delta, atol=1e-4)


def test_peft_loads_the_extracted_adapter_and_gives_the_weights_that_were_measured(pair: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peer = Adapter()
    # Not a multiple of the matrices, so that some have one rank more than others.
    sizes.write_files(sizes.encode_files(peer, pair, 45), tmp_path / "adapter")
    weights = sizes.read_weights(peer, pair, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(pair.model("base"), tmp_path / "adapter").merge_and_unload()
    state = model.state_dict()
    assert weights.keys() == state.keys()
    for name, weight in weights.items():
        assert torch.allclose(state[name], weight, rtol=0, atol=1e-6), name


def test_peers_without_rows_of_ours_are_measured_at_a_ratio(pair: Pair, tmp_path: Path) -> None:
    samples = read_samples(parse_samples(("\n\n".join(SENTENCES) * 12).encode(), "text").data)
    config = EvaluationConfig(window_tokens=32, max_windows=4, bootstrap_resamples=200)
    evaluator = Evaluator(pair, samples, config)
    given = contest.Inputs(
        base=tmp_path,
        variant=tmp_path,
        text=tmp_path,
        rows=[],
        ratios=[4.0],
        wanted=lambda peer: peer.label == "magnitude pruning, 4 bits",
    )
    found = contest.hold(pair, evaluator, given, tmp_path)
    (one,) = found.rounds
    (line,) = one.peers  # with the embeddings kept no form is as small as that
    assert line.kept == "norms"
    assert line.true == pytest.approx(4.0, rel=sizes.EQUAL)
    assert one.too_large == [("magnitude pruning, 4 bits", "embeddings, head, norms")]
    ends = dict(found.ends)
    kl = {name: sum(window["kl"] for window in windows) for name, windows in (ends | {"peer": line.windows}).items()}
    assert 0 == kl["variant"] < kl["peer"] < kl["base"]
    text = tables.markdown(found, config, 4)
    assert f"| {line.name} ({line.dial}) | norms | " in text
    assert "with embeddings, head, norms kept as they are, not as small as" in text


@pytest.mark.parametrize(
    ("ours_kl", "kind"),
    [(0.5, VerdictKind.BETTER), (1.0, VerdictKind.EQUAL), (1.05, VerdictKind.EQUAL), (1.5, VerdictKind.WORSE)],
)
def test_the_verdict_on_ours_follows_the_paired_difference(ours_kl: float, kind: VerdictKind) -> None:
    windows = [{"tokens": 10, "nll": 20.0 + at, "kl": 3.0 + at, "agreements": 5} for at in range(8)]
    mine = [window | {"kl": ours_kl * window["kl"]} for window in windows]
    assert compare(mine, windows, EvaluationConfig()).verdict.kind == kind


def test_a_peer_of_another_size_is_no_equal() -> None:
    line: dict[str, Any] = {"name": "", "kept": "", "nominal": 1.0, "true": 1.0, "bits": 1.0, "windows": []}
    mine = contest.Line(**line, size=1000)
    assert tables.unequal(contest.Line(**line, size=1019), mine) == ""
    larger = contest.Line(**line, size=2500)
    assert "2.50 ×" in tables.unequal(larger, mine)
    assert not tables.in_reach(larger, mine)
    near = contest.Line(**line, size=995)
    assert [one.size for one in contest.rounds([near, mine, contest.Line(**line, size=700)])] == [1000, 700]


def test_an_artifact_of_ours_is_made_once_counted_whole_and_known_by_all_that_decides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, variant = make_tiny_pair(tmp_path)
    pair = Pair(Store(tmp_path / "store", durable=False), base, variant)
    text = tmp_path / "text.txt"
    text.write_text("calibration")
    row = ours.Row(name="initial", method="bitdelta", set=("distill_steps=0",))
    made = []

    def compress(row: ours.Row, base: Path, variant: Path, text: Path, out: Path) -> None:
        made.append(out)
        config = settings.parsed(catalog.method(row.method).config_class(), row.set)
        options: dict[str, Any] = {"data": None, "seed": 0, "device": "cpu", "watch": lambda event: None}
        commands.compress(row.method, base=base, model=variant, out=out, config=config, **options)

    monkeypatch.setattr(ours, "compress", compress)  # in this process: a new one would import torch again
    out = tmp_path / ours.folder_name(row, pair, text)
    artifact = ours.make(row, base, variant, text, out)
    assert ours.make(row, base, variant, text, out).digest == artifact.digest
    assert made == [out]
    assert ours.kept_words(artifact, pair) == "embeddings, norms"
    assert ours.side_bytes([artifact], pair) == pair.side_bytes
    assert artifact.summary()["artifact_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    others = [replace(row, set=("distill_steps=1",)), replace(row, calibrated=True)]
    assert len({ours.folder_name(one, pair, text) for one in (row, *others)}) == 3
    (out / "config.json").write_bytes(b"{}")
    with pytest.raises(ours.Refused, match="bytes and has"):
        ours.make(row, base, variant, text, out)


def form(name: str, size: int, kl: float, **more: Any) -> contest.Line:
    windows: list[Any] = [{"tokens": 10, "nll": 20.0 + at, "kl": kl * (10.0 + at), "agreements": 5} for at in range(8)]
    return contest.Line(name=name, kept="norms", size=size, nominal=1.0, true=1.0, bits=1.0, windows=windows, **more)


def test_peers_are_made_only_where_a_row_asks_for_them_and_judge_every_row_of_that_size() -> None:
    lines = [
        form("asks", 990, 1.0),
        form("beside it", 1000, 1.0, contends=False),
        form("alone", 500, 1.0, contends=False),
    ]
    first, second = contest.rounds(lines)
    assert (first.contended, [line.name for line in first.ours]) == (True, ["beside it", "asks"])
    assert not second.contended
    first.peers = [form("near", 1000, 0.5), form("far", 985, 2.0), form("large", 1500, 0.1)]
    ends = [(name, form(name, 0, 1.0).windows) for name in ("base", "variant")]
    found = contest.Contest(ends, [first, second], [], failed=False)
    text = tables.markdown(found, EvaluationConfig(), 8)
    heads, _, *rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")][:5]
    assert heads[-3:] == ["best peer in as many bytes: its KL", "KL of ours − its", "better than |"]
    assert [row[0] for row in rows] == ["| beside it", "| asks", "| alone"]
    assert rows[0][-3] == "near (norms kept): 0.6750"
    assert rows[0][-2].endswith("**worse**")
    assert [row[-1] for row in rows] == ["1 of 2 |", "1 of 2 |", " |"]
    assert rows[2][-3] == "no peer was made of this size"
    assert "- *beside it* (1.0 kB): better than 1 of 2. **Worse** than: near" in text
    assert "- *alone*" not in text


@pytest.mark.parametrize("rows", ["rows.toml", "rows-large.toml"])
def test_every_row_of_ours_has_settings_that_its_method_takes(rows: str) -> None:
    listed = ours.listed(ours.ROWS.with_name(rows), steps=7)
    assert len({row.name for row in listed}) == len(listed)
    for row in filter(ours.known, listed):
        config = catalog.method(row.method).config_class()
        config(**settings.parsed(config, row.set))
