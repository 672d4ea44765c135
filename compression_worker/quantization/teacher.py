"""What a full-precision model answers, kept so that it never shares memory with the one that learns from it.

Of each token the ``k`` most likely next ones are stored with their log-probabilities, and the log of what all others
have together. The steps' inputs are a checkpoint (whose manifest names its tokenizer) and a text by digest: answers of
another model, text or tokenizer cannot be taken for these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.checkpoints import load_model
from compression_worker.contracts import CompressionError, PlannedStep, StepContext, StepOutput
from compression_worker.making.inputs import opened
from compression_worker.quantization.windows import calibration_tokens
from compression_worker.tensors import Spec, TensorFile, raw_bytes, write_file

TEXT_FILE, LOGITS_FILE = "text.safetensors", "logits.safetensors"
HELD_OUT, TRAINED = "held_out", "trained"
BATCH_LOGITS = 1 << 25
"""Numbers in one batch of logits."""


@dataclass(frozen=True)
class TopLogits:
    """Of places of text: the ``k`` likeliest tokens, their log-probabilities, and the log of the others' mass.

    ``tokens (..., k)``, ``log_probs (..., k)`` fp32, ``rest (...)`` fp32, minus infinity where k is the vocabulary.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, count: int, temperature: float = 1.0) -> TopLogits:
        """The answers in ``logits (..., V)`` at ``temperature``."""
        whole = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1)
        log_probs, tokens = whole.topk(min(count, whole.shape[-1]), dim=-1)
        rest = whole.scatter_(-1, tokens, -torch.inf).logsumexp(dim=-1)
        return cls(tokens, log_probs, rest)

    def at(self, windows: slice, device: str) -> TopLogits:
        """Those of some windows, on a device."""
        tokens, log_probs, rest = (one[windows].to(device) for one in (self.tokens, self.log_probs, self.rest))
        return TopLogits(tokens.to(torch.int64), log_probs, rest)


def text_planned(source: Mapping[str, str], *, windows: int, length: int, held_out: int, seed: int) -> PlannedStep:
    """The step that cuts the text into windows. ``source`` holds the digests ``variant`` and ``calibration``."""
    return PlannedStep(
        name="training text",
        kind="teacher.text",
        group="teacher",
        params={"windows": windows, "length": length, "held_out": held_out},
        inputs={name: source[name] for name in ("variant", "calibration") if name in source},
        seed=seed,
    )


def logits_planned(variant: str, text: str, part: str, run: range, count: int, temperature: float) -> PlannedStep:
    """The step that keeps what the model ``variant`` answers on windows ``run`` of ``part`` of the text."""
    where = "held-out windows" if part == HELD_OUT else f"windows {run.start} to {run.stop - 1}"
    return PlannedStep(
        name=f"teacher on {where}",
        kind="teacher.logits",
        group="teacher",
        params={"part": part, "first": run.start, "count": len(run), "logits": count, "temperature": temperature},
        inputs={"variant": variant, "text": text},
    )


def text_step(context: StepContext) -> StepOutput:
    """Windows to train on in the order of training, and others that are held out.

    Where the text is short there are fewer held-out windows, and those to train on come round again in another order.
    """
    params = context.spec.params
    wanted, held = params["windows"], params["held_out"]
    found = calibration_tokens(context, opened(context, "variant"), samples=wanted + held, length=params["length"])
    if len(found) < 2:
        raise CompressionError(
            "too_few_tokens",
            f"the text fills {len(found)} window of {params['length']} tokens: one is needed to train on and one to "
            "measure by; give more text, or shorter windows",
        )
    generator = torch.Generator().manual_seed(context.spec.seed)
    order = torch.randperm(len(found), generator=generator)
    if len(found) < wanted + held:
        held = min(held, max(1, len(found) // 5))
    own = found[order[held:]]
    rounds = [own]
    while sum(map(len, rounds)) < wanted:
        rounds.append(own[torch.randperm(len(own), generator=generator)])
    parts = {HELD_OUT: found[order[:held]], TRAINED: torch.cat(rounds)[:wanted]}
    with context.store.writer() as blob:
        flat = {name: rows.to(torch.int32).contiguous() for name, rows in parts.items()}
        write_file(blob, {name: (Spec("I32", tuple(rows.shape)), [raw_bytes(rows)]) for name, rows in flat.items()})
    data = {"windows": wanted, "distinct": min(len(own), wanted), "held_out": held, "length": found.shape[1]}
    return StepOutput(blobs={TEXT_FILE: blob.digest}, data=data)


def logits_step(context: StepContext) -> StepOutput:
    """What the model answers on some windows, at the places whose next token is known."""
    params = context.spec.params
    windows = read_windows(context, params["part"], slice(params["first"], params["first"] + params["count"]))
    checkpoint = opened(context, "variant")
    model: Any = load_model(checkpoint, device=context.device, dtype=computing_dtype(context.device))
    kept = []
    batch = max(1, BATCH_LOGITS // (windows.shape[1] * int(model.config.vocab_size)))
    for rows in windows.split(batch):
        with torch.no_grad():
            logits = model(rows.to(context.device), use_cache=False).logits[:, :-1]
        if not bool(logits.isfinite().all()):
            raise CompressionError("not_finite", "the model's answers are not finite: its weights are damaged")
        kept += [TopLogits.of(one, params["logits"], params["temperature"]).at(slice(None), "cpu") for one in logits]
        context.progress(len(kept), len(windows), "windows")
    tensors = {
        "tokens": torch.stack([one.tokens for one in kept]).to(torch.int32),
        "log_probs": torch.stack([one.log_probs for one in kept]),
        "rest": torch.stack([one.rest for one in kept]),
    }
    with context.store.writer() as blob:
        write_file(blob, {name: (_spec(tensor), [raw_bytes(tensor)]) for name, tensor in tensors.items()})
    return StepOutput(blobs={LOGITS_FILE: blob.digest}, data={"windows": len(kept), "logits": kept[0].tokens.shape[1]})


def read_windows(context: StepContext, part: str, rows: slice = slice(None)) -> torch.Tensor:
    """Some windows ``(W, T)`` int64 of the step given as input ``text``."""
    with TensorFile(context.store.verified_path(context.input("text").blobs[TEXT_FILE])) as file:
        return file.tensor(part)[rows].to(torch.int64)


def read_logits(context: StepContext, name: str) -> TopLogits:
    """What the step given as input ``name`` kept of ``W`` windows of ``T`` tokens: ``(W, T - 1, k)``."""
    with TensorFile(context.store.verified_path(context.input(name).blobs[LOGITS_FILE])) as file:
        return TopLogits(*(file.tensor(name) for name in ("tokens", "log_probs", "rest")))


def computing_dtype(device: str) -> torch.dtype | None:
    """float32 on a CPU; on a GPU the checkpoint's own (None)."""
    return torch.float32 if device == "cpu" else None


def _spec(tensor: torch.Tensor) -> Spec:
    return Spec("I32" if tensor.dtype == torch.int32 else "F32", tuple(tensor.shape))
