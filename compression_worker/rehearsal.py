"""Rehearsing a rollback: load a full-precision checkpoint from the store as a server would, and have it answer.

The step's output is the evidence behind a rollback certificate: each file and each tensor matched its digest, the
model held exactly those values, and it answered.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch

from compression_worker.checkpoints import Checkpoint, load_model, load_tokenizer
from compression_worker.contracts import CompressionError, StepContext, StepOutput
from compression_worker.faults import failpoint

ANSWER_TOKENS = 32


def rehearse_step(context: StepContext) -> StepOutput:
    """Re-hash, load and question the checkpoint named as input ``variant``."""
    started = time.monotonic()
    with Checkpoint.open(context.store, context.spec.inputs["variant"]) as checkpoint:
        size = checkpoint.manifest["size_bytes"]
        _verify_files(context, checkpoint, size)
        model = load_model(checkpoint, device=context.device)
        _compare_tensors(checkpoint, model)
        prompt = context.spec.params["prompt"]
        answer = _answer(model, load_tokenizer(checkpoint), prompt)
    failpoint("rehearse.restored")
    context.measure("seconds", time.monotonic() - started)
    context.log(f"full precision verified and loaded; it answers: {answer}", "info")
    return StepOutput(
        data={
            "files": len(checkpoint.manifest["files"]),
            "bytes": size,
            "tensors": len(checkpoint.manifest["tensors"]),
            "prompt": prompt,
            "answer": answer,
        }
    )


def _verify_files(context: StepContext, checkpoint: Checkpoint, total: int) -> None:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        context.progress(done, total, "bytes")

    checkpoint.verify(advance)


def _compare_tensors(checkpoint: Checkpoint, model: Any) -> None:
    """Each tensor's bytes must match the manifest, and what the model holds must match the tensor."""
    held = model.state_dict()
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        if tensor_sha256(tensor) != checkpoint.manifest["tensors"][name]["sha256"]:
            raise CompressionError("damaged_tensor", f"tensor '{name}' does not match its digest: import it again")
        if name in held and not torch.equal(held[name].cpu(), tensor.to(held[name].dtype)):
            raise CompressionError("damaged_tensor", f"the loaded model holds other values for tensor '{name}'")


def tensor_sha256(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's bytes as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, prompt: str) -> str:
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = tokens["input_ids"].shape[1]
    if not length:
        raise CompressionError("empty_prompt", "the prompt has no token: give a sentence")
    if not torch.isfinite(model(**tokens).logits).all():
        raise CompressionError("not_finite", "the full-precision model computes values that are not finite")
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS, pad_token_id=_padding(tokenizer))
    return str(tokenizer.decode(answer[0, length:], skip_special_tokens=True))


def _padding(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
