"""The command: see the package. Exits 1 when an artifact of ours could not be made."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compression_worker.artifact import Artifact
from compression_worker.artifact import load_model as load_artifact
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model, load_tokenizer
from compression_worker.contracts import Json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.generation import greedy_answers
from compression_worker.evaluation.windows import cut_windows, measure_windows
from compression_worker.runner import prepare_torch
from compression_worker.samples import TEXT, parse_samples, read_samples
from compression_worker.store import Store
from tests.benchmarks.bench_bitdelta import record
from tests.benchmarks.delta_peers.measure import Remembered, compare, figures, places
from tests.benchmarks.delta_peers.tables import WORDS
from tests.benchmarks.quantizers import __doc__ as description
from tests.benchmarks.quantizers import making
from tests.benchmarks.quantizers.making import Cost, Refused
from tests.benchmarks.quantizers.peers import PEERS

COLUMNS = (
    *("form", "bits/weight, linears", "whole file", "MB", "perplexity", "KL", "top-1 %"),
    *("CPU s", "peak MB", "KL against the best peer of as many bits"),
)
LEAST_BITS = {"round to nearest": 2, "HQQ": 2, "GPTQModel": 4}
"""Fewest bits at which a peer runs, 3 for others: at 2 bits grids give noise, and GPTQModel takes many minutes."""
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils when",
    "The most important thing about music is",
)


@dataclass(frozen=True)
class Line:
    """One form: what it costs, how many bits it takes, and what it reads on each window."""

    name: str
    bits: int
    windows: list[Json]
    cost: Cost | None
    linear_bits: float
    whole_bits: float | None
    size: int | None
    peer: bool
    answers: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quantizers", description=description)
    parser.add_argument("--model", type=Path, required=True, help="the model, a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="calibration text: TXT, or JSONL with 'text'")
    parser.add_argument("--eval-text", type=Path, required=True, help="other text to measure on")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows of 512 tokens (%(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="windows to measure on at most (%(default)s)")
    parser.add_argument("--window-length", type=int, default=256, help="tokens of a window (%(default)s)")
    parser.add_argument("--group", type=int, default=64, help="group size of the peers (%(default)s)")
    parser.add_argument("--rows", type=Path, default=making.ROWS, help="the rows of ours (%(default)s)")
    parser.add_argument("--peers", default=";".join(PEERS), help="peers, by semicolons (%(default)s)")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python in which peers are installed")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="keep artifacts of ours there with their cost; use those that are there",
    )
    parser.add_argument("--out", type=Path, help="a file for the table; standard output without")
    parser.add_argument("--record", action="store_true", help="add the figures to results.csv")
    args = parser.parse_args()
    prepare_torch()
    with tempfile.TemporaryDirectory(prefix="deltaworks-quantizers-") as folder:
        contest = Contest(args, Path(folder))
        for _ in contest.lines():
            text = contest.markdown()
            if args.out:  # after each form, since a run can take an hour
                args.out.write_text(text, encoding="utf-8")
    if not args.out:
        sys.stdout.write(text)
    if args.record:
        contest.keep_records()
    return int(contest.failed)


class Contest:
    """The forms of one model, made and measured one after another."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.config = EvaluationConfig(window_tokens=args.window_length, max_windows=args.windows)
        self.failed = False
        self.notes: list[str] = []
        store = Store(scratch / "store", durable=False)
        self.checkpoint = Checkpoint.open(store, attach_folder(store, args.model))
        self.tokenizer = load_tokenizer(self.checkpoint)
        samples = read_samples(parse_samples(args.eval_text.read_bytes(), TEXT).data)
        self.cut = cut_windows(self.tokenizer, samples, self.config)
        whole = load_model(self.checkpoint, dtype=torch.float32)
        self.reference = Remembered(whole, self.cut)
        width = 8 * self.checkpoint.manifest["weight_bytes"] / self.checkpoint.manifest["parameters"]
        size = self.checkpoint.manifest["weight_bytes"]
        windows = measure_windows(whole, whole, self.cut, _silent)
        self.found = [Line("uncompressed", 16, windows, None, width, width, size, True, self._answers(whole))]

    def lines(self) -> Iterator[Line]:
        """Ours, then peers, the slow one last."""
        for row in making.listed(self.args.rows, ()):
            yield from self._kept(row.name, lambda row=row: self._ours(row), ours=True)
        names = [name for name in self.args.peers.split(";") if name]
        jobs = [(name, bits) for name in names for bits in (4, 3, 2) if bits >= LEAST_BITS.get(name, 3)]
        for name, bits in jobs:
            yield from self._kept(f"{name}, {bits} bits", lambda name=name, bits=bits: self._peer(name, bits))

    def _kept(self, name: str, make: Any, *, ours: bool = False) -> Iterator[Line]:
        try:
            line = make()
        except Refused as error:
            self.failed |= ours
            self.notes.append(f"{name}: {error}")
            return
        self.found.append(line)
        yield line

    def _peer(self, name: str, bits: int) -> Line:
        out = self.scratch / "peer"
        shutil.rmtree(out, ignore_errors=True)
        tokens, python = 512 * self.args.samples, self.args.peer_python
        cost = making.make_peer(
            name, bits, self.args.group, self.args.model, self.args.text, out, tokens, python=python
        )
        model = load_model(self.checkpoint, dtype=torch.float32)
        where = places(model, self.checkpoint.names)
        with torch.no_grad():
            for tensor, weight in load_file(out / "weights.safetensors").items():
                where[tensor].copy_(weight)
        linear_bits = json.loads((out / "size.json").read_text())["bits_per_weight"]
        return self._measured(f"{name}, {bits} bits", bits, model, cost, linear_bits, None, None, peer=True)

    def _ours(self, row: making.Row) -> Line:
        row = row.with_calibration(self.args.samples)
        if self.args.keep:
            out, cost = making.kept(row, self.args.model, self.args.text, self.args.keep)
        else:
            out = self.scratch / "ours"
            shutil.rmtree(out, ignore_errors=True)
            cost = making.make(row, self.args.model, self.args.text, out)
        artifact = Artifact.open_folder(out)
        said = artifact.summary()
        linears = artifact.manifest["figures"]["linears"]["bits_per_weight"]
        model = load_artifact(None, artifact, "cpu", torch.float32)
        whole = said["bits_per_weight"]
        return self._measured(row.name, row.bits, model, cost, linears, whole, said["artifact_bytes"], peer=False)

    def _measured(
        self,
        name: str,
        bits: int,
        model: Any,
        cost: Cost,
        linears: float,
        whole: float | None,
        size: int | None,
        *,
        peer: bool,
    ) -> Line:
        windows = measure_windows(model, self.reference, self.cut, _silent)
        return Line(name, bits, windows, cost, linears, whole, size, peer, self._answers(model))

    def _answers(self, model: Any) -> list[str]:
        return greedy_answers(model, self.tokenizer, list(PROMPTS), 24, _silent)

    def markdown(self) -> str:
        """The table, what is missing, and what the two-bit forms write."""
        lines = sorted(self.found, key=lambda line: (-line.bits, not line.peer))
        found = figures({str(at): line.windows for at, line in enumerate(lines)}, "0", self.config)
        rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
        rows += [self._cells(at, line, found) for at, line in enumerate(lines)]
        blocks = ["\n".join("| " + " | ".join(row) + " |" for row in rows)]
        if pairs := list(self._pairs()):
            blocks.append("Ours beside ours, KL of the first minus KL of the second:\n\n" + "\n".join(pairs))
        if self.notes:
            blocks.append("Not in the table:\n\n" + "\n".join(f"- {note}" for note in self.notes))
        spoken = [line for line in lines if line.bits in (2, 16)]
        for at, prompt in enumerate(PROMPTS):
            said = "\n".join(f"- {line.name}: {' '.join(line.answers[at].split())}" for line in spoken)
            blocks.append(f"*{prompt}* …\n\n{said}")
        return "\n\n".join(blocks) + "\n"

    def _pairs(self) -> Iterator[str]:
        """The paired differences that the rows' file asks for."""
        known = {line.name: line for line in self.found}
        for first, second in making.pairs(self.args.rows):
            if first in known and second in known:
                found = compare(known[first].windows, known[second].windows, self.config)
                yield (
                    f"- {first} − {second}: {found.difference:+.4f} ({found.low:+.4f} … {found.high:+.4f}), "
                    f"{WORDS[found.verdict.kind]}"
                )

    def _cells(self, at: int, line: Line, found: dict[str, Json]) -> list[str]:
        perplexity, kl, top = (found[name][str(at)] for name in ("perplexity", "kl_divergence", "top1_agreement"))
        return [
            line.name,
            f"{line.linear_bits:.3f}",
            f"{line.whole_bits:.3f}" if line.whole_bits else "",
            f"{line.size / 1e6:.1f}" if line.size else "",
            f"{perplexity['value']:.4g} ({perplexity['low']:.4g}–{perplexity['high']:.4g})",
            f"{kl['value']:.4f} ({kl['low']:.4f}–{kl['high']:.4f})",
            f"{100 * top['value']:.1f} ({100 * top['low']:.1f}–{100 * top['high']:.1f})",
            f"{line.cost.processor:.0f}" if line.cost else "",
            f"{line.cost.peak / 1e6:.0f}" if line.cost else "",
            self._against(line),
        ]

    def _against(self, line: Line) -> str:
        peers = [one for one in self.found[1:] if one.peer and one.bits == line.bits]
        if line.peer or not peers:
            return ""
        best = min(peers, key=lambda one: sum(window["kl"] for window in one.windows))
        found = compare(line.windows, best.windows, self.config)
        return (
            f"{best.name}: {found.difference:+.4f} ({found.low:+.4f} … {found.high:+.4f}) {WORDS[found.verdict.kind]}"
        )

    def keep_records(self) -> None:
        """Lines of results.csv: the KL of each form, and what it costs."""
        for line in self.found[1:]:
            tokens, kl, nll = (sum(window[key] for window in line.windows) for key in ("tokens", "kl", "nll"))
            cost = f", {line.cost.processor:.0f} CPU s, {line.cost.peak / 1e6:.0f} MB" if line.cost else ""
            perplexity = float(torch.tensor(nll / tokens, dtype=torch.float64).exp())
            unit = f"nats/token; {line.linear_bits:.3f} bits, perplexity {perplexity:.4g}{cost}"
            record(line.name, kl / tokens, unit, benchmark="quantizers")


def _silent(done: int, total: int, unit: str) -> None:
    """Forms report for themselves."""


if __name__ == "__main__":
    sys.exit(main())
