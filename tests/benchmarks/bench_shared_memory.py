"""Memory of a DeltaLLM artifact while it writes: the shared form beside the same model with every weight of its own.

    python -m tests.benchmarks.bench_shared_memory --artifact FOLDER [--device cuda]

Each form is loaded and writes in a process of its own, in fp32. What is compared is the most that the process held
while it wrote over what it held when everything was imported, so that weights, activations and the cache of keys and
values all count; on a GPU, what its tensors held there. A small model writes first, so that what a first run brings in
is there before. The shared form has to hold at most ``dense * (1 - 0.9 * reduction)``, where the reduction is that of
the parameters. On a GPU the forms' tokens per second are told as well.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compression_worker.artifact import Artifact
from compression_worker.machine import forget_peak, peak_bytes
from compression_worker.making.allocation import given_back
from compression_worker.methods.deltallm.compress import load_model
from compression_worker.runner import prepare_torch
from tests.benchmarks.bench_bitdelta import PROJECT, record

FORMS = ("shared", "dense")
SHARE = 0.9
"""Of the reduction, that memory has to fall by."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True, help="a folder that compress deltallm has written")
    parser.add_argument("--tokens", type=int, default=48, help="tokens that are written (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare_torch()
    if args.form:
        sys.stdout.write(json.dumps(measured(args.artifact, args.form, args.tokens, args.device)))
        return 0
    found = {form: child(args.artifact, form, args.tokens, args.device) for form in FORMS}
    reduction, what = reduction_of(args.artifact), f"while writing {args.tokens} tokens, {args.device}"
    shared, dense = (found[form]["bytes"] for form in FORMS)
    told = partial(record, benchmark="shared_memory")
    told("dense form", dense / 1e6, f"MB {what}")
    told("shared form", shared / 1e6, f"MB {what}, {100 * reduction:.2f} % fewer parameters")
    if args.device == "cuda":
        ratio = found["dense"]["seconds"] / found["shared"]["seconds"]
        told("shared form's tokens per second over the dense form's", ratio, f"times, {what}")
    return int(not told("shared / dense", shared / dense, f"of the memory {what}", 1 - SHARE * reduction))


def reduction_of(artifact: Path) -> float:
    """The share of parameters that sharing took away."""
    figures = Artifact.open_folder(artifact).manifest["figures"]
    return float(figures["sharing"]["parameters"]["reduction"])


def child(artifact: Path, form: str, tokens: int, device: str = "cpu") -> dict[str, float]:
    """``bytes`` of one form and the ``seconds`` it wrote for, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_shared_memory", "--artifact", str(artifact.absolute())]
    command += ["--form", form, "--tokens", str(tokens), "--device", device]
    said = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE).stdout
    return {name: float(value) for name, value in json.loads(said).items()}


@given_back()
def measured(artifact: Path, form: str, tokens: int, device: str) -> dict[str, float]:
    """The most that this process holds while the model writes, over what it held before the model was there."""
    found = Artifact.open_folder(artifact)
    small = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    _written(LlamaForCausalLM(small).to(device), 2)
    before = settled(device)
    model = load_model(None, found, device, torch.float32, dense=form == "dense")
    if device == "cuda":
        _written(model, 2)
    settled(device)
    seconds = _written(model, tokens)
    return {"bytes": most(device) - before, "seconds": seconds}


def settled(device: str = "cpu") -> int:
    """Give back what is free, have the high-water mark begin anew, and say what is held now, in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    return peak_bytes()


def most(device: str = "cpu") -> int:
    """The high-water mark since :func:`settled`: of this process, or of its tensors on a GPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()


def _written(model: Any, tokens: int) -> float:
    """Seconds that it took."""
    prompt = torch.ones((1, 8), dtype=torch.int64, device=model.device)
    started = time.monotonic()
    answer = model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    int(answer[0, -1])  # read, so that a GPU has ended
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
