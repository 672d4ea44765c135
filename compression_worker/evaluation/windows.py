"""One pass over the windows of a text set: what perplexity and fidelity are made of, window by window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compression_worker.contracts import CompressionError, Json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.fidelity import token_agreements, token_divergences
from compression_worker.evaluation.perplexity import token_losses
from compression_worker.samples import joined_text

BATCH_LOGITS = 1 << 25  # numbers in one batch of logits: 128 MB in float32
CHARACTERS_PER_TOKEN = 16  # more than any tokenizer gives on average: cuts the text before encoding it
DIGITS = 9


def cut_windows(tokenizer: Any, samples: list[Json], config: EvaluationConfig) -> torch.Tensor:
    """Token ids [windows, window_tokens]: the set as one running text, cut without overlap, no token added.

    What is left behind the last whole window is dropped. Refuses a set of less than two windows: it gives no interval.
    """
    wanted = config.window_tokens * config.max_windows
    text = joined_text(samples)[: wanted * CHARACTERS_PER_TOKEN]
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(tokens) // config.window_tokens, config.max_windows)
    if count < 2:
        needed = 2 * config.window_tokens
        raise CompressionError(
            "too_little_text",
            f"the text set gives {len(tokens):,} tokens, and two windows of {config.window_tokens} need {needed:,}: "
            "add text or lower window_tokens",
        )
    return torch.tensor(tokens[: count * config.window_tokens]).view(count, config.window_tokens)


def check_windows(windows: torch.Tensor, model: Any) -> None:
    """Refuse windows that the model cannot read: too long for its context, or tokens outside its vocabulary."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context and windows.shape[1] > context:
        raise CompressionError(
            "window_too_long",
            f"window_tokens is {windows.shape[1]}, and the model reads at most {context} tokens: lower it",
        )
    vocabulary = int(model.config.vocab_size)
    if int(windows.max()) >= vocabulary:
        raise CompressionError(
            "vocabulary_mismatch",
            f"the tokenizer gives token {int(windows.max())}, and the model has a vocabulary of {vocabulary}: "
            "the tokenizer belongs to another model",
        )


@torch.inference_mode()
def measure_windows(
    model: Any, reference: Any | None, windows: torch.Tensor, progress: Callable[[int, int, str], None]
) -> list[Json]:
    """For each window: ``tokens`` scored, and the sums ``nll``, ``kl`` (nats) and ``agreements`` over them.

    ``reference`` None leaves the last two out; a model beside itself agrees without a second pass.
    """
    values: list[Json] = []
    for ids in windows.split(_batch_size(windows, model)):
        values += _measure_batch(model, reference, ids.to(model.device))
        progress(len(values), len(windows), "windows")
    return values


def _measure_batch(model: Any, reference: Any | None, ids: torch.Tensor) -> list[Json]:
    logits = model(input_ids=ids, use_cache=False).logits
    losses = token_losses(logits, ids)
    if not bool(torch.isfinite(losses).all()):
        raise CompressionError("not_finite", "the model's output has NaN or infinity: its weights are damaged")
    values: list[Json] = [{"tokens": row.numel(), "nll": rounded(row.sum().item())} for row in losses]
    if reference is None:
        return values
    if reference is model:
        return [value | {"kl": 0.0, "agreements": value["tokens"]} for value in values]
    expected = reference(input_ids=ids, use_cache=False).logits
    if expected.shape != logits.shape:
        raise CompressionError(
            "vocabulary_mismatch",
            f"the reference names {expected.shape[-1]:,} tokens and the target {logits.shape[-1]:,}: they cannot be "
            "compared token by token; leave the reference out",
        )
    divergences, agreements = token_divergences(expected, logits), token_agreements(expected, logits)
    for value, divergence, agreement in zip(values, divergences, agreements, strict=True):
        value |= {"kl": rounded(divergence.sum().item()), "agreements": int(agreement.sum())}
    return values


def rounded(value: float) -> float:
    """Nine significant digits: far finer than any interval, coarser than the noise of a sum in another order."""
    return float(f"{value:.{DIGITS}g}")


def _batch_size(windows: torch.Tensor, model: Any) -> int:
    return max(1, min(8, BATCH_LOGITS // (windows.shape[1] * int(model.config.vocab_size))))
