"""The command: see the package. Exits 1 when an artifact of ours could not be made."""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compression_worker.artifact import Artifact
from compression_worker.artifact import load_model as load_artifact
from compression_worker.checkpoints import load_model
from compression_worker.contracts import Json
from compression_worker.evaluation.choice import answer_choices
from compression_worker.evaluation.generation import greedy_answers
from compression_worker.evaluation.summary import choice_metrics
from compression_worker.evaluation.windows import measure_windows
from compression_worker.samples import CHOICE, parse_samples, read_samples
from tests.benchmarks.bench_bitdelta import record
from tests.benchmarks.bench_shared_memory import most, settled
from tests.benchmarks.contest import Contest, cells, run, silent, with_arguments
from tests.benchmarks.delta_peers.measure import Remembered, figures
from tests.benchmarks.layer_sharing import __doc__ as description
from tests.benchmarks.layer_sharing.peers import PEERS, Impossible, parameters
from tests.benchmarks.layer_sharing.rows import SharingRow, listed
from tests.benchmarks.layer_sharing.training import Lesson, merged, prepared
from tests.benchmarks.quantizers import making

COLUMNS = (
    *("form", "parameters", "fewer", "MB", "perplexity", "KL", "choices right %", "running MB", "tokens/s"),
    "KL against the best peer of this size",
)
ROWS = Path(__file__).with_name("rows.toml")
NEW_TOKENS = 48


@dataclass(frozen=True)
class Line:
    """One form at one reduction: what it weighs, what it reads on each window, what it holds and how fast it writes.

    ``running``: bytes of its tensors, and the most that the process grew by while it wrote.
    """

    name: str
    reduction: float
    parameters: int
    size: int
    windows: list[Json]
    choices: list[Json]
    running: int
    speed: float
    peer: bool
    compared: bool = True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.layer_sharing", description=description)
    with_arguments(parser, windows=16, window_length=256)
    parser.add_argument("--choices", type=Path, help="choice questions: JSONL with question, choices and answer")
    parser.add_argument("--reductions", default="0.06,0.12,0.24", help="shares of the parameters (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="training tokens of every form (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="windows of a training step (%(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of LoRA on peers (%(default)s)")
    parser.add_argument("--thin-rate", type=float, default=2e-4, help="learning rate of thin matrices (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--at-once", type=int, default=1, help="artifacts made at a time (%(default)s)")
    parser.add_argument("--keep", type=Path, help="a folder for the artifacts; those that are there are not made again")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the rows of ours (%(default)s)")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE for rows that do not say their own")
    parser.add_argument("--peers", default=";".join(PEERS), help="peers, by semicolons (%(default)s)")
    return run(Sharing, parser.parse_args())


class Sharing(Contest[Line]):
    """Forms of fewer parameters, at each reduction. The model is of the Llama family."""

    refusals = (making.Refused, Impossible)

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        super().__init__(args, scratch)
        self.questions: list[Json] = []
        if args.choices:
            self.questions = read_samples(parse_samples(args.choices.read_bytes(), CHOICE).data)
        self.device: str = args.device
        self.whole = load_model(self.checkpoint, device=self.device, dtype=torch.float32)
        self.reference = Remembered(self.whole, self.cut)
        self.parameters = parameters(self.whole)
        count = max(8, args.tokens // args.window_length)
        self.lesson_windows = self.windows_of(args.text, replace(self.config, max_windows=count)).to(self.device)
        self.lesson: Lesson | None = None
        size = self.checkpoint.manifest["weight_bytes"]
        self.item = size / self.checkpoint.manifest["parameters"]
        self.found = [self._measured("the model itself", 0.0, self.whole, self.parameters, size, peer=True)]
        self.trainable = 0
        self.rows = listed(args.rows)
        self.kept_in = args.keep or scratch / "made"
        self.kept_in.mkdir(parents=True, exist_ok=True)
        self.sharing: dict[tuple[str, float], Json] = {}

    def lines(self) -> Iterator[Line]:
        """At each reduction ours first: as many parameters as the largest of them trains, a peer's adapters have there."""
        for reduction in map(float, self.args.reductions.split(",")):
            self.trainable = 0
            self._make_ahead(reduction)
            for row in (one for one in self.rows if one.made_at(reduction)):
                yield from self.kept(f"{row.name}, {reduction:.0%}", partial(self._ours, row, reduction), ours=True)
            for name in filter(None, self.args.peers.split(";")):
                yield from self.kept(f"{name}, {reduction:.0%}", partial(self._peer, name, reduction), ours=False)

    def _make_ahead(self, reduction: float) -> None:
        """Where several artifacts are made at a time: first those with groups of their own, then those that take these."""
        rows = [row for row in self.rows if row.made_at(reduction)]
        for some in ([row for row in rows if not row.groups_of], [row for row in rows if row.groups_of]):
            if self.args.at_once > 1 and some:
                with ThreadPoolExecutor(self.args.at_once) as pool:
                    for made in [pool.submit(self._made, row, reduction) for row in some]:
                        with contextlib.suppress(making.Refused):  # told when its turn in the table comes
                            made.result()

    def _made(self, row: SharingRow, reduction: float) -> Artifact:
        args = self.args
        usual = {
            "target_reduction": reduction,
            "tokens": args.tokens,
            "window_tokens": args.window_length,
            "batch_size": args.batch,
            **dict(setting.split("=", 1) for setting in args.set),
        }
        if row.groups_of and (row.groups_of, reduction) not in self.sharing:
            raise making.Refused(f"'{row.groups_of}' was not made at {reduction:.0%}")
        filled = row.among(self.sharing.get((row.groups_of, reduction)), usual)
        out, cost = making.kept(filled, args.model, args.text, self.kept_in, self.device)
        print(f"{row.name}, {reduction:.0%}: {cost.processor:.0f} s", file=sys.stderr, flush=True)
        artifact = Artifact.open_folder(out)
        self.sharing[row.name, reduction] = artifact.manifest["figures"]["sharing"]
        return artifact

    def _ours(self, row: SharingRow, reduction: float) -> Line:
        artifact = self._made(row, reduction)
        model = load_artifact(None, artifact, self.device, torch.float32)
        counts = self.sharing[row.name, reduction]["parameters"]
        shared = [line for line in artifact.manifest["tensors"].values() if line["kind"] == "shared"]
        trained = sum(line["rank"] * sum(line["shape"]) for line in shared if "rank" in line)
        self.trainable = max(self.trainable, trained)
        size = artifact.summary()["artifact_bytes"]
        return self._measured(row.name, reduction, model, counts["after"], size, peer=False, compared=row.bits == 16)

    def _peer(self, name: str, reduction: float) -> Line:
        torch.manual_seed(0)
        model = copy.deepcopy(self.whole)
        PEERS[name](model, self.lesson_windows[:8], int(reduction * self.parameters))
        left = parameters(model)
        if self.args.tokens:
            self.lesson = self.lesson or Lesson(self.whole, self.lesson_windows, self.args.batch)
            trained, rate = prepared(model, self.trainable), self.args.rate
            if name.startswith("SVD"):
                rate = self.args.thin_rate
            self.lesson.teach(model, trained, rate)
        return self._measured(name, reduction, merged(model), left, round(left * self.item), peer=True)

    def _measured(
        self,
        name: str,
        reduction: float,
        model: Any,
        count: int,
        size: int,
        *,
        peer: bool,
        compared: bool = True,
    ) -> Line:
        reference = model if model is self.whole else self.reference
        windows = measure_windows(model, reference, self.cut, silent)
        choices = answer_choices(model, self.tokenizer, self.questions, silent) if self.questions else []
        # Of a processor others take time as well, of a GPU its own clock is not read.
        clock = time.process_time if self.device == "cpu" else time.monotonic
        before = settled(self.device)
        started = clock()
        (answer,) = greedy_answers(model, self.tokenizer, ["The"], NEW_TOKENS, silent)
        seconds = clock() - started
        speed = len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) / seconds
        running = held_bytes(model) + most(self.device) - before
        return Line(name, reduction, count, size, windows, choices, running, speed, peer, compared)

    def markdown(self) -> str:
        """The table, and what is not in it."""
        text = {str(at): line.windows for at, line in enumerate(self.found)}
        metrics = figures(text, "0", self.config)
        if self.questions:
            measured = {str(at): {"choices": line.choices} for at, line in enumerate(self.found)}
            (accuracy,) = choice_metrics(measured, "0", self.config)
            metrics["choices"] = accuracy["values"]
        rows = [self._cells(at, line, metrics) for at, line in enumerate(self.found)]
        return "\n\n".join(self.blocks(COLUMNS, rows, list(self._pairs()))) + "\n"

    def _pairs(self) -> Iterator[str]:
        """The paired differences that the rows' file asks for, at each reduction."""
        known = {(line.name, line.reduction): line for line in self.found if not line.peer}
        for pair in making.pairs(self.args.rows):
            for reduction in sorted({reduction for _, reduction in known}):
                first, second = (known.get((name, reduction)) for name in pair)
                if first and second:
                    yield f"- {reduction:.0%}: {first.name} − {second.name}: {self.difference(first, second)}"

    def _cells(self, at: int, line: Line, metrics: dict[str, Json]) -> list[str]:
        fewer = 1 - line.parameters / self.parameters
        return [
            f"{line.name}, {line.reduction:.0%}" if line.reduction else line.name,
            f"{line.parameters:,}",
            f"{100 * fewer:.1f} %",
            f"{line.size / 1e6:.2f}",
            cells(metrics, at, "perplexity", digits=".4g"),
            cells(metrics, at, "kl_divergence"),
            cells(metrics, at, "choices", digits=".0f", times=100) if self.questions else "",
            f"{line.running / 1e6:.2f}",
            f"{line.speed:.1f}",
            self._against(line),
        ]

    def _against(self, line: Line) -> str:
        peers = [one for one in self.found[1:] if one.peer and one.reduction == line.reduction]
        if line.peer or not line.compared or not peers:
            return ""
        best = self.best(peers)
        return f"{best.name}: {self.difference(line, best)}"

    def keep_records(self) -> None:
        """Lines of results.csv: the KL of each form, and what it weighs."""
        for line in self.found[1:]:
            tokens, kl = (sum(window[key] for window in line.windows) for key in ("tokens", "kl"))
            unit = f"nats/token; {line.parameters} parameters, {line.size} bytes, {line.speed:.1f} tokens/s"
            record(f"{line.name}, {line.reduction:.0%}", kl / tokens, unit, benchmark="layer_sharing")


def held_bytes(model: Any) -> int:
    """Bytes of the distinct memory that a model's tensors lie in, fp32 here."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


if __name__ == "__main__":
    sys.exit(main())
