"""What benchmarks share that put forms of one model beside each other: its windows, paired differences, the table."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from compression_worker.checkpoints import Checkpoint, attach_folder, load_tokenizer
from compression_worker.contracts import Json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.windows import cut_windows
from compression_worker.runner import prepare_torch
from compression_worker.samples import TEXT, parse_samples, read_samples
from compression_worker.store import Store
from tests.benchmarks.delta_peers.measure import compare
from tests.benchmarks.delta_peers.tables import WORDS


class Form(Protocol):
    """What was measured of one form, window by window."""

    @property
    def name(self) -> str: ...

    @property
    def windows(self) -> list[Json]: ...


Line = TypeVar("Line", bound=Form)


class Contest(Generic[Line]):
    """The forms of one model, made and measured one after another. The first of ``found`` is the model itself."""

    refusals: tuple[type[Exception], ...] = ()
    """How a form says that it cannot be made: it then is a note and no line."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.config = EvaluationConfig(window_tokens=args.window_length, max_windows=args.windows)
        self.failed = False
        self.notes: list[str] = []
        self.found: list[Line] = []
        store = Store(scratch / "store", durable=False)
        self.checkpoint = Checkpoint.open(store, attach_folder(store, args.model))
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.cut = self.windows_of(args.eval_text, self.config)

    def windows_of(self, text: Path, config: EvaluationConfig) -> Any:
        """Tokens of a text file in windows ``(W, T)``."""
        return cut_windows(self.tokenizer, read_samples(parse_samples(text.read_bytes(), TEXT).data), config)

    def lines(self) -> Iterator[Line]:
        """Make one form after another."""
        raise NotImplementedError

    def markdown(self) -> str:
        """What has been found so far."""
        raise NotImplementedError

    def keep_records(self) -> None:
        """Lines of results.csv."""
        raise NotImplementedError

    def kept(self, name: str, make: Callable[[], Line], *, ours: bool) -> Iterator[Line]:
        """The line of a form; where it cannot be made, a note, and a failure if it is one of ours."""
        try:
            line = make()
        except self.refusals as error:
            self.failed |= ours
            self.notes.append(f"{name}: {error}")
            return
        self.found.append(line)
        yield line

    def difference(self, first: Form, second: Form) -> str:
        """KL of the first minus KL of the second with its interval, and what follows."""
        found = compare(first.windows, second.windows, self.config)
        return f"{found.difference:+.4f} ({found.low:+.4f} … {found.high:+.4f}), {WORDS[found.verdict.kind]}"

    def best(self, peers: Sequence[Line]) -> Line:
        """The one that is nearest to the model."""
        return min(peers, key=lambda one: sum(window["kl"] for window in one.windows))

    def blocks(self, columns: Sequence[str], rows: Sequence[Sequence[str]], pairs: Sequence[str]) -> Iterator[str]:
        """The table, the pairs, and what is missing."""
        yield "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))
        if pairs:
            yield "Ours beside ours, KL of the first minus KL of the second:\n\n" + "\n".join(pairs)
        if self.notes:
            yield "Not in the table:\n\n" + "\n".join(f"- {note}" for note in self.notes)


def with_arguments(parser: argparse.ArgumentParser, *, windows: int, window_length: int) -> argparse.ArgumentParser:
    """The arguments that all of them have."""
    parser.add_argument("--model", type=Path, required=True, help="the model, a Hugging Face folder")
    parser.add_argument("--text", type=Path, required=True, help="text to learn from: TXT, or JSONL with 'text'")
    parser.add_argument("--eval-text", type=Path, required=True, help="other text to measure on")
    parser.add_argument("--windows", type=int, default=windows, help="windows to measure on at most (%(default)s)")
    parser.add_argument("--window-length", type=int, default=window_length, help="tokens of a window (%(default)s)")
    parser.add_argument("--out", type=Path, help="a file for the table; standard output without")
    parser.add_argument("--record", action="store_true", help="add the figures to results.csv")
    return parser


def run(contest_of: Callable[[argparse.Namespace, Path], Contest[Any]], args: argparse.Namespace) -> int:
    """Make every form, write the table after each, since a run can take an hour; 1 where one of ours failed."""
    prepare_torch()
    with tempfile.TemporaryDirectory(prefix="deltaworks-contest-") as folder:
        contest = contest_of(args, Path(folder))
        for _ in contest.lines():
            if args.out:
                args.out.write_text(contest.markdown(), encoding="utf-8")
        if not args.out:
            sys.stdout.write(contest.markdown())
        if args.record:
            contest.keep_records()
        return int(contest.failed)


def cells(found: dict[str, Json], at: int, metric: str, *, digits: str = ".4f", times: int = 1) -> str:
    """A figure with its interval."""
    one = found[metric][str(at)]
    value, low, high = (f"{times * one[key]:{digits}}" for key in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def silent(done: int, total: int, unit: str) -> None:
    """Forms report for themselves."""
