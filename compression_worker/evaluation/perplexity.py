"""Perplexity: the exponential of the mean negative log-likelihood of each next token.

Notation: logits [B, T, V] for tokens ids [B, T]; the first token of a window is given, the T - 1 others are scored.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import log_softmax

CHUNK = 1 << 23  # numbers turned into float64 at a time: 64 MB


def scored_positions(logits: torch.Tensor) -> Iterator[slice]:
    """The T - 1 positions whose next token is scored, in slices that bound the memory of float64."""
    batch, tokens, vocabulary = logits.shape
    step = max(1, CHUNK // (batch * vocabulary))
    for start in range(0, tokens - 1, step):
        yield slice(start, min(start + step, tokens - 1))


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of each scored token, in float64: [B, T - 1]."""
    losses = torch.empty(ids.shape[0], ids.shape[1] - 1, dtype=torch.float64)
    for at in scored_positions(logits):
        log_p = log_softmax(logits[:, at].double(), dim=-1)  # [B, slice, V]
        tokens = ids[:, at.start + 1 : at.stop + 1, None]
        losses[:, at] = -log_p.gather(-1, tokens).squeeze(-1)
    return losses
