"""One run: ours made and measured, then every peer at the size of each of ours."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from compression_worker.contracts import Json
from compression_worker.ledger import bits_per_weight, true_ratio
from tests.benchmarks.delta_peers import ours
from tests.benchmarks.delta_peers.adapter import Adapter
from tests.benchmarks.delta_peers.measure import Evaluator
from tests.benchmarks.delta_peers.pair import Pair
from tests.benchmarks.delta_peers.peers import Peer, baselines
from tests.benchmarks.delta_peers.sizes import (
    Match,
    encode_files,
    match_size,
    nominal_ratio,
    read_weights,
    write_files,
)

SAME = 0.015
"""Artifacts whose sizes differ by less than this are contended for at one size, the largest of them."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measured form. ``windows`` holds the sums by window behind its figures; ``contends``: see ``Row.peers``."""

    name: str
    kept: str
    dial: str = ""
    size: int
    nominal: float
    true: float
    bits: float
    windows: list[Json]
    contends: bool = True


@dataclass
class Round:
    """Artifacts of ours of one size (none where only a ratio was asked for), and the peers that were made as large.

    A peer of but one size is in the round that is nearest to it.
    """

    size: int
    ours: list[Line]
    peers: list[Line] = field(default_factory=list)
    too_large: list[tuple[str, str]] = field(default_factory=list)
    """Label, and what is kept, of each peer that cannot be made so small."""

    @property
    def contended(self) -> bool:
        """Whether peers are made of this size."""
        return not self.ours or any(line.contends for line in self.ours)


@dataclass
class Contest:
    """What a run has found so far. ``notes`` say which rows of ours are missing and why."""

    ends: list[tuple[str, list[Json]]]
    rounds: list[Round]
    notes: list[str]
    failed: bool


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the command was given. ``keep``: a folder where artifacts of ours stay, and are found again."""

    base: Path
    variant: Path
    text: Path
    rows: list[ours.Row]
    ratios: list[float]
    wanted: Callable[[Peer], bool]
    keep: Path | None = None


def hold(
    pair: Pair,
    evaluator: Evaluator,
    given: Inputs,
    scratch: Path,
    watch: Callable[[Contest], None] = lambda contest: None,
) -> Contest:
    """Measure everything; ``scratch`` is for files of the run, ``watch`` sees what there is after each peer."""
    contest = Contest([], [], [], failed=False)
    base = pair.model("base")
    contest.ends = [("base", evaluator.model(base)), ("variant", evaluator.variant())]
    del base
    lines, artifacts = _ours(pair, evaluator, given, scratch, contest)
    contest.rounds = rounds(lines)
    contest.rounds += [Round(round(pair.source_bytes / ratio), []) for ratio in given.ratios]
    contest.rounds.sort(key=lambda one: -one.size)
    side = ours.side_bytes(artifacts, pair)
    watch(contest)
    for peer in filter(given.wanted, [*baselines(), Adapter()]):
        _challenge(peer, pair, evaluator, side, scratch, contest)
        watch(contest)
    return contest


def rounds(lines: list[Line]) -> list[Round]:
    """Lines of about one size together, the largest first."""
    found: list[Round] = []
    for line in sorted(lines, key=lambda line: -line.size):
        if found and line.size >= found[-1].size * (1 - SAME):
            found[-1].ours.append(line)
        else:
            found.append(Round(line.size, [line]))
    return found


def _ours(
    pair: Pair, evaluator: Evaluator, given: Inputs, scratch: Path, contest: Contest
) -> tuple[list[Line], list[ours.Artifact]]:
    lines, artifacts = [], []
    for row in given.rows:
        if not ours.known(row):
            contest.notes.append(f"{row.name}: this version has no method '{row.method}'")
            continue
        started = time.monotonic()
        try:
            out = (given.keep or scratch) / ours.folder_name(row, pair, given.text)
            artifact = ours.make(row, given.base, given.variant, given.text, out)
        except ours.Refused as refusal:
            contest.notes.append(f"{row.name}: {refusal}")
            contest.failed = True
            continue
        summary = artifact.summary()
        line = Line(
            name=row.name,
            kept=ours.kept_words(artifact, pair),
            dial=" ".join(row.set),
            size=summary["artifact_bytes"],
            nominal=summary["nominal_ratio"],
            true=summary["true_ratio"],
            bits=summary["bits_per_weight"],
            windows=evaluator.model(ours.model(artifact, pair)),
            contends=row.peers,
        )
        _say(line, started)
        lines.append(line)
        artifacts.append(artifact)
    return lines, artifacts


def _challenge(peer: Peer, pair: Pair, evaluator: Evaluator, side: int, scratch: Path, contest: Contest) -> None:
    """Measure a peer at each contended size; one without a dial once, in the round that is nearest in size."""
    contended = [one for one in contest.rounds if one.contended]
    if peer.dials(pair) is None:
        line = measured(peer, pair, evaluator, 0.0, side, scratch)
        if contended:
            nearest = min(contended, key=lambda one: abs(one.size - line.size))
            nearest.peers.append(line)
        return
    sizes: dict[float, int] = {}
    lines: dict[float, Line] = {}
    for one in contended:
        match: Match | None = match_size(peer, pair, one.size - side, sizes)
        if match is None:
            one.too_large.append((peer.label, pair.kept_words(peer.scope)))
            continue
        if match.dial not in lines:
            lines[match.dial] = measured(peer, pair, evaluator, match.dial, side, scratch)
        one.peers.append(lines[match.dial])


def measured(peer: Peer, pair: Pair, evaluator: Evaluator, dial: float, side: int, scratch: Path) -> Line:
    """Write a peer's form, count it, read it back, measure what was read."""
    started, folder = time.monotonic(), scratch / "peer"
    size = write_files(encode_files(peer, pair, dial), folder) + side
    weights, nominal = read_weights(peer, pair, folder), nominal_ratio(peer, pair, folder)
    shutil.rmtree(folder)
    line = Line(
        name=peer.label,
        kept=pair.kept_words(peer.scope),
        dial=peer.dial_words(pair, dial),
        size=size,
        nominal=nominal,
        true=true_ratio(pair.source_bytes, size),
        bits=bits_per_weight(size, pair.parameters),
        windows=evaluator.weights(weights),
    )
    _say(line, started)
    return line


def _say(line: Line, started: float) -> None:
    tokens, kl = (sum(window[name] for window in line.windows) for name in ("tokens", "kl"))
    words = f"{line.name} ({line.kept} kept) {line.dial}: {line.size:,} bytes, KL {kl / tokens:.5f}"
    sys.stderr.write(f"{words}, {time.monotonic() - started:.0f} s\n")
    sys.stderr.flush()
