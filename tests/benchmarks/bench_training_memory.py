"""Memory of training: INT2.1's adapters on a packed base beside LoRA on dense weights and beside every weight trained.

    python -m tests.benchmarks.bench_training_memory --model FOLDER --packed ARTIFACT

Each way trains two optimizer steps of the same windows on a CPU in a process of its own, with each block computed twice
(checkpointing) and AdamW. What is compared is the most that the process held over what it held when everything was
imported: the kernel's high-water mark, so that weights, gradients, moments, activations and whatever a library keeps
all count. The allocator gives
freed memory back in all of them, as it does in the product's training. bf16 takes many minutes on a processor without instructions for it. A base that is read from a mapped file counts with the pages that were read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

from compression_worker.architecture import blocks_of
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import load_folder
from compression_worker.making.allocation import given_back
from compression_worker.methods.int21 import adapter
from compression_worker.methods.int21 import packed_base as base_method
from compression_worker.methods.int21.config import Int21Config
from compression_worker.methods.int21.training import Student
from compression_worker.quantization.divergence import divergence
from compression_worker.quantization.learning import checkpoint_blocks
from compression_worker.runner import prepare_torch
from tests.benchmarks.bench_bitdelta import PROJECT, peak_bytes, record

RANK, STEPS = 16, 2
LEAST = 4.0
"""How many times less than training every weight in fp32."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model, a Hugging Face folder")
    parser.add_argument(
        "--packed", type=Path, required=True, help="an artifact of it by a method that INT2.1 builds on"
    )
    parser.add_argument("--windows", type=int, default=2, help="windows of a step (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (%(default)s)")
    parser.add_argument("--without", action="append", default=[], choices=list(WAYS)[1:], help="leave a way out")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare_torch()
    if args.way:
        sys.stdout.write(json.dumps(measured(args)))
        return 0
    found = {way: _child(way) for way in WAYS if way not in args.without}
    for way, held in found.items():
        record(way, held / 1e6, f"MB, {args.windows} x {args.length} tokens", benchmark="training_memory")
    for way in list(found)[1:]:
        record(f"{way} / INT2.1", found[way] / found["INT2.1"], "times", benchmark="training_memory")
    full = found.get("every weight, fp32")
    return int(full is not None and full / found["INT2.1"] < LEAST)


def _child(way: str) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.bench_training_memory", *sys.argv[1:], "--way", way]
    return int(json.loads(subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE).stdout))


@given_back()
def measured(args: argparse.Namespace) -> int:
    """Bytes of one way, over those of the process before it has read a weight."""
    before = peak_bytes()
    model, trained = WAYS[args.way](args)
    windows = torch.randint(
        int(model.config.vocab_size), (args.windows, args.length), generator=torch.Generator().manual_seed(0)
    )
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
    for _ in range(STEPS):
        divergence(model(windows, use_cache=False).logits, None, windows).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_bytes() - before


def packed(args: argparse.Namespace) -> tuple[Any, list[torch.nn.Parameter]]:
    base = Artifact.open_folder(args.packed)
    config = Int21Config(base_method=base.manifest["method"], num_bits=base.manifest["config"]["num_bits"], rank=RANK)
    student = Student.on(base, config, "cpu")
    adapter.put(student.model, student.paths, adapter.fresh(base_method.sides(base), RANK, 0))
    return student.model, list(student.factors.values())


def lora(dtype: torch.dtype, args: argparse.Namespace) -> tuple[Any, list[torch.nn.Parameter]]:
    model: Any = _checkpointed(load_folder(args.model, dtype=dtype)).requires_grad_(False)
    linears = [
        name for path, block in blocks_of(model) for name, one in block.named_modules(prefix=path) if _linear(one)
    ]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=linears), model)
    trained = [one for one in model.parameters() if one.requires_grad]
    for one in trained:
        one.data = one.data.float()
    return model, trained


def whole(args: argparse.Namespace) -> tuple[Any, list[torch.nn.Parameter]]:
    model: Any = _checkpointed(load_folder(args.model, dtype=torch.float32)).requires_grad_(True)
    return model, list(model.parameters())


def _linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def _checkpointed(model: Any) -> Any:
    checkpoint_blocks(model, model.config.to_dict())
    return model.train()


WAYS: dict[str, Callable[[argparse.Namespace], tuple[Any, list[torch.nn.Parameter]]]] = {
    "INT2.1": packed,
    "LoRA, bf16": partial(lora, torch.bfloat16),
    "LoRA, fp32": partial(lora, torch.float32),
    "every weight, fp32": whole,
}

if __name__ == "__main__":
    sys.exit(main())
