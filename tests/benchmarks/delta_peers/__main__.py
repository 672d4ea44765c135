"""The command: see the package. Exits 1 when an artifact of ours could not be made."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from compression_worker.contracts import CompressionError
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.runner import prepare_torch
from compression_worker.samples import TEXT, parse_samples, read_samples
from compression_worker.store import Store
from tests.benchmarks.delta_peers import __doc__ as description
from tests.benchmarks.delta_peers import contest, ours, tables
from tests.benchmarks.delta_peers.measure import Evaluator
from tests.benchmarks.delta_peers.pair import Pair
from tests.benchmarks.delta_peers.peers import Peer


def main() -> int:
    args = parser().parse_args()
    try:
        return run(args)
    except CompressionError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.delta_peers",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--base", type=Path, required=True, help="the base, a Hugging Face folder")
    made.add_argument("--variant", type=Path, required=True, help="its fine-tune, a Hugging Face folder")
    made.add_argument("--text", type=Path, required=True, help="calibration text: TXT, or JSONL with 'text'")
    made.add_argument("--eval-text", type=Path, required=True, help="text to measure on, of the same forms")
    made.add_argument("--windows", type=int, default=40, help="windows to measure on at most (%(default)s)")
    made.add_argument("--window-length", type=int, default=256, help="tokens of a window (%(default)s)")
    made.add_argument("--steps", type=int, default=200, help="what {steps} is in the rows (%(default)s)")
    made.add_argument("--rows", type=Path, default=ours.ROWS, help="the rows of ours (%(default)s)")
    made.add_argument(
        "--ratio", type=float, action="append", default=[], help="also measure peers at this true ratio (repeatable)"
    )
    made.add_argument("--keep", type=Path, metavar="DIR", help="keep artifacts of ours there; use those that are there")
    made.add_argument(
        "--only", action="append", default=[], metavar="WORDS", help="peers whose label has these words (repeatable)"
    )
    made.add_argument("--name", default="pair", help="what the pair is called in results.csv")
    made.add_argument("--out", type=Path, help="a file for the tables; standard output without")
    made.add_argument("--record", action="store_true", help="add the figures to results.csv")
    return made


def run(args: argparse.Namespace) -> int:
    prepare_torch()
    config = EvaluationConfig(window_tokens=args.window_length, max_windows=args.windows)
    samples = read_samples(parse_samples(args.eval_text.read_bytes(), TEXT).data)
    with tempfile.TemporaryDirectory(prefix="deltaworks-peers-") as folder:
        scratch = Path(folder)
        pair = Pair(Store(scratch / "store", durable=False), args.base, args.variant)
        given = contest.Inputs(
            base=args.base,
            variant=args.variant,
            text=args.text,
            rows=ours.listed(args.rows, args.steps),
            ratios=args.ratio,
            wanted=lambda peer: asked_for(peer, args.only),
            keep=args.keep,
        )
        evaluator = Evaluator(pair, samples, config)

        def watch(found: contest.Contest) -> None:
            if args.out:  # after each peer, since a run can take hours
                args.out.write_text(tables.markdown(found, config, len(evaluator.windows)), encoding="utf-8")

        found = contest.hold(pair, evaluator, given, scratch, watch)
    if not args.out:
        sys.stdout.write(tables.markdown(found, config, len(evaluator.windows)))
    if args.record:
        tables.keep_records(found, args.name)
    return 1 if found.failed else 0


def asked_for(peer: Peer, words: list[str]) -> bool:
    """Whether a label has any of the words; each has where none is given."""
    return not words or any(one.lower() in peer.label.lower() for one in words)


if __name__ == "__main__":
    sys.exit(main())
