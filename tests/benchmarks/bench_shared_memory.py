"""Memory of a DeltaLLM artifact while it writes: the shared form beside the same model with every weight of its own.

    python -m tests.benchmarks.bench_shared_memory --artifact FOLDER

Each form is loaded and writes in a process of its own, in fp32 on a CPU. What is compared is the most that the process
held while it wrote over what it held when everything was imported, so that weights, activations and the cache of keys
and values all count. A small model writes first, so that what a first run brings in is there before. The shared form has to hold at most ``dense * (1 - 0.9 * reduction)``, where the reduction is that
of the parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
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
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare_torch()
    if args.form:
        sys.stdout.write(json.dumps(measured(args.artifact, args.form, args.tokens)))
        return 0
    shared, dense = (child(args.artifact, form, args.tokens) for form in FORMS)
    reduction = reduction_of(args.artifact)
    record("dense form", dense / 1e6, f"MB while writing {args.tokens} tokens", benchmark="shared_memory")
    record("shared form", shared / 1e6, f"MB, {100 * reduction:.2f} % fewer parameters", benchmark="shared_memory")
    kept = record("shared / dense", shared / dense, "of the memory", 1 - SHARE * reduction, benchmark="shared_memory")
    return int(not kept)


def reduction_of(artifact: Path) -> float:
    """The share of parameters that sharing took away."""
    figures = Artifact.open_folder(artifact).manifest["figures"]
    return float(figures["sharing"]["parameters"]["reduction"])


def child(artifact: Path, form: str, tokens: int) -> int:
    """Bytes of one form, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_shared_memory", "--artifact", str(artifact.absolute())]
    command += ["--form", form, "--tokens", str(tokens)]
    return int(json.loads(subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE).stdout))


@given_back()
def measured(artifact: Path, form: str, tokens: int) -> int:
    """The most that this process holds while the model writes, over what it held before the model was there."""
    found = Artifact.open_folder(artifact)
    _written(LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)), 2)
    before = settled()
    model = load_model(None, found, "cpu", torch.float32, dense=form == "dense")
    settled()
    _written(model, tokens)
    return peak_bytes() - before


def settled() -> int:
    """Give back what is free, have the high-water mark begin anew, and say what is held now, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    return peak_bytes()


def _written(model: Any, tokens: int) -> None:
    prompt = torch.ones((1, 8), dtype=torch.int64)
    model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)


if __name__ == "__main__":
    sys.exit(main())
