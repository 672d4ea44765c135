"""The command: see the package. Exits 1 when an artifact of ours could not be made."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from compression_worker.artifact import Artifact
from compression_worker.artifact import load_model as load_artifact
from compression_worker.checkpoints import load_model
from compression_worker.contracts import Json
from compression_worker.evaluation.generation import greedy_answers
from compression_worker.evaluation.windows import measure_windows
from tests.benchmarks.bench_bitdelta import record
from tests.benchmarks.contest import Contest, cells, run, silent, with_arguments
from tests.benchmarks.delta_peers.measure import Remembered, figures, places
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
    with_arguments(parser, windows=16, window_length=256)
    parser.add_argument("--samples", type=int, default=8, help="calibration windows of 512 tokens (%(default)s)")
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
    return run(Quantizers, parser.parse_args())


class Quantizers(Contest[Line]):
    """Forms of fewer bits."""

    refusals = (Refused,)

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        super().__init__(args, scratch)
        whole = load_model(self.checkpoint, dtype=torch.float32)
        self.reference = Remembered(whole, self.cut)
        size = self.checkpoint.manifest["weight_bytes"]
        width = 8 * size / self.checkpoint.manifest["parameters"]
        windows = measure_windows(whole, whole, self.cut, silent)
        self.found = [Line("uncompressed", 16, windows, None, width, width, size, True, self._answers(whole))]

    def lines(self) -> Iterator[Line]:
        """Ours, then peers, the slow one last."""
        for row in making.listed(self.args.rows, ()):
            yield from self.kept(row.name, partial(self._ours, row), ours=True)
        names = [name for name in self.args.peers.split(";") if name]
        jobs = [(name, bits) for name in names for bits in (4, 3, 2) if bits >= LEAST_BITS.get(name, 3)]
        for name, bits in jobs:
            yield from self.kept(f"{name}, {bits} bits", partial(self._peer, name, bits), ours=False)

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
        windows = measure_windows(model, self.reference, self.cut, silent)
        return Line(name, bits, windows, cost, linears, whole, size, peer, self._answers(model))

    def _answers(self, model: Any) -> list[str]:
        return greedy_answers(model, self.tokenizer, list(PROMPTS), 24, silent)

    def markdown(self) -> str:
        """The table, what is missing, and what the two-bit forms write."""
        lines = sorted(self.found, key=lambda line: (-line.bits, not line.peer))
        found = figures({str(at): line.windows for at, line in enumerate(lines)}, "0", self.config)
        rows = [self._cells(at, line, found) for at, line in enumerate(lines)]
        blocks = list(self.blocks(COLUMNS, rows, list(self._pairs())))
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
                yield f"- {first} − {second}: {self.difference(known[first], known[second])}"

    def _cells(self, at: int, line: Line, found: dict[str, Json]) -> list[str]:
        return [
            line.name,
            f"{line.linear_bits:.3f}",
            f"{line.whole_bits:.3f}" if line.whole_bits else "",
            f"{line.size / 1e6:.1f}" if line.size else "",
            cells(found, at, "perplexity", digits=".4g"),
            cells(found, at, "kl_divergence"),
            cells(found, at, "top1_agreement", digits=".1f", times=100),
            f"{line.cost.processor:.0f}" if line.cost else "",
            f"{line.cost.peak / 1e6:.0f}" if line.cost else "",
            self._against(line),
        ]

    def _against(self, line: Line) -> str:
        peers = [one for one in self.found[1:] if one.peer and one.bits == line.bits]
        if line.peer or not peers:
            return ""
        best = self.best(peers)
        return f"{best.name}: {self.difference(line, best)}"

    def keep_records(self) -> None:
        """Lines of results.csv: the KL of each form, and what it costs."""
        for line in self.found[1:]:
            tokens, kl, nll = (sum(window[key] for window in line.windows) for key in ("tokens", "kl", "nll"))
            cost = f", {line.cost.processor:.0f} CPU s, {line.cost.peak / 1e6:.0f} MB" if line.cost else ""
            perplexity = float(torch.tensor(nll / tokens, dtype=torch.float64).exp())
            unit = f"nats/token; {line.linear_bits:.3f} bits, perplexity {perplexity:.4g}{cost}"
            record(line.name, kl / tokens, unit, benchmark="quantizers")


if __name__ == "__main__":
    sys.exit(main())
