"""Measures BitDelta on one pair as docs/results.md shows it: perplexity of all four forms, and true and nominal ratio.

``python -m deploy.demo.results --base DIR --variant DIR --text FILE --calibration FILE --set distill_steps=50`` prints
one row of the table. Base, variant, initial and distilled form read the same windows, in float32.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from compression_worker.artifact import load_compressed_model
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model, load_tokenizer
from compression_worker.contracts import PlannedStep, StepOutput
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.windows import cut_windows, measure_windows
from compression_worker.methods.bitdelta.compress import CHUNK_STEPS
from compression_worker.runner import prepare_torch, run_plan
from compression_worker.samples import parse_samples, read_samples
from compression_worker.store import Store

HEADER = """| pair | base | variant | initial | distilled | gain kept: initial | distilled | true | nominal | seconds |
|---|---|---|---|---|---|---|---|---|---|"""


def compress(store: Store, pair: dict[str, str], calibration: str, config: dict[str, Any]) -> tuple[StepOutput, float]:
    """The artifact's output document, and the seconds that it took."""
    inputs = pair | ({"calibration": calibration} if config["distill_steps"] else {})
    started = time.monotonic()
    plan = PlannedStep(name="plan", kind="bitdelta.plan", params={"config": config}, inputs=inputs)
    return run_plan(store, plan, device="cpu"), time.monotonic() - started


def perplexity(model: Any, windows: torch.Tensor) -> float:
    values = measure_windows(model, None, windows, lambda done, total, unit: None)
    return math.exp(sum(value["nll"] for value in values) / sum(value["tokens"] for value in values))


def sample_set(store: Store, path: Path) -> str:
    return store.write_bytes(parse_samples(path.read_bytes(), "text").data)


def gain_kept(base: float, variant: float, found: float) -> str:
    """Of the fall of log-perplexity from base to variant, how much the compressed form keeps."""
    return f"{100 * (math.log(base) - math.log(found)) / (math.log(base) - math.log(variant)):.1f} %"


def row(name: str, store: Store, pair: dict[str, str], text: str, calibration: str, config: dict[str, Any]) -> str:
    windows = cut_windows(
        load_tokenizer(Checkpoint.open(store, pair["variant"])),
        read_samples(store.read_bytes(text)),
        EvaluationConfig(),
    )
    found = {}
    for target in ("base", "variant"):
        model = load_model(Checkpoint.open(store, pair[target]), dtype=torch.float32)
        found[target] = perplexity(model, windows)
    seconds = {}
    for target, steps in (("initial", 0), ("distilled", config["distill_steps"])):
        output, seconds[target] = compress(store, pair, calibration, config | {"distill_steps": steps})
        artifact = output.data["artifact"]
        found[target] = perplexity(load_compressed_model(store, pair["base"], artifact, dtype=torch.float32), windows)
    kept = [gain_kept(found["base"], found["variant"], found[target]) for target in ("initial", "distilled")]
    figures = [f"{found[target]:.3f}" for target in ("base", "variant", "initial", "distilled")]
    ratios = [f"{output.data['true_ratio']:.2f}", f"{output.data['nominal_ratio']:.2f}"]
    took = f"{seconds['initial']:.1f} + {seconds['distilled'] - seconds['initial']:.1f}"
    return "| " + " | ".join([name, *figures, *kept, *ratios, took]) + " |"


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--base", "--variant", "--text", "--calibration"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--name", default="pair")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    prepare_torch()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        pair = {name: attach_folder(store, getattr(args, name)) for name in ("base", "variant")}
        sets = [sample_set(store, path) for path in (args.text, args.calibration)]
        config = {"distill_steps": 50} | dict(args.set)
        print(HEADER)
        print(row(args.name, store, pair, *sets, config))
        print(f"windows of 256 tokens; seconds: extraction + distillation in chunks of {CHUNK_STEPS} steps")


if __name__ == "__main__":
    main()
