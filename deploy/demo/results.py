"""Measures BitDelta on one pair as docs/results.md shows it: perplexity of all four forms, how far each is from the
variant, and true and nominal ratio.

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

COLUMNS = "pair, perplexity: base, variant, initial, distilled, KL: base, initial, distilled, true, nominal, seconds"
HEADER = f"| {COLUMNS.replace(', ', ' | ')} |\n{'|---' * len(COLUMNS.split(', '))}|"


def compress(store: Store, pair: dict[str, str], calibration: str, config: dict[str, Any]) -> tuple[StepOutput, float]:
    """The artifact's output document, and the seconds that it took."""
    inputs = pair | ({"calibration": calibration} if config["distill_steps"] else {})
    started = time.monotonic()
    plan = PlannedStep(name="plan", kind="bitdelta.plan", params={"config": config}, inputs=inputs)
    return run_plan(store, plan, device="cpu"), time.monotonic() - started


def measure(model: Any, variant: Any, windows: torch.Tensor) -> tuple[float, float]:
    """Perplexity, and the mean KL divergence from the variant's predictions in nats a token."""
    values = measure_windows(model, variant, windows, lambda done, total, unit: None)
    nll, kl, tokens = (sum(value[name] for value in values) for name in ("nll", "kl", "tokens"))
    return math.exp(nll / tokens), kl / tokens


def sample_set(store: Store, path: Path) -> str:
    return store.write_bytes(parse_samples(path.read_bytes(), "text").data)


def row(name: str, store: Store, pair: dict[str, str], text: str, calibration: str, config: dict[str, Any]) -> str:
    windows = cut_windows(
        load_tokenizer(Checkpoint.open(store, pair["variant"])),
        read_samples(store.read_bytes(text)),
        EvaluationConfig(),
    )
    variant = load_model(Checkpoint.open(store, pair["variant"]), dtype=torch.float32)
    base = load_model(Checkpoint.open(store, pair["base"]), dtype=torch.float32)
    found = {"variant": measure(variant, variant, windows), "base": measure(base, variant, windows)}
    del base
    seconds = {}
    for target, steps in (("initial", 0), ("distilled", config["distill_steps"])):
        output, seconds[target] = compress(store, pair, calibration, config | {"distill_steps": steps})
        model = load_compressed_model(store, pair["base"], output.data["artifact"], dtype=torch.float32)
        found[target] = measure(model, variant, windows)
    figures = [f"{found[target][0]:.3f}" for target in ("base", "variant", "initial", "distilled")]
    figures += [f"{found[target][1]:.4f}" for target in ("base", "initial", "distilled")]
    figures += [f"{output.data['true_ratio']:.2f}", f"{output.data['nominal_ratio']:.2f}"]
    took = f"{seconds['initial']:.1f} + {seconds['distilled'] - seconds['initial']:.1f}"
    return "| " + " | ".join([name, *figures, took]) + " |"


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
