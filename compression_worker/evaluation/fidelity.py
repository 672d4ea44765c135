"""How closely a model follows the uncompressed variant: KL divergence and top-1 agreement, token by token.

KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)) in nats, with P the variant's next-token distribution and Q the target's,
at the positions that perplexity scores. Agreement: do both put the same token first?
"""

from __future__ import annotations

import torch
from torch.nn.functional import log_softmax

from compression_worker.evaluation.perplexity import scored_positions


def token_divergences(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || target) in nats at each scored position of logits [B, T, V], in float64: [B, T - 1]."""
    divergences = torch.empty(logits.shape[0], logits.shape[1] - 1, dtype=torch.float64)
    for at in scored_positions(logits):
        log_p = log_softmax(reference[:, at].double(), dim=-1)
        log_q = log_softmax(logits[:, at].double(), dim=-1)
        divergences[:, at] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergences.clamp_(min=0.0)  # rounding alone can take it below zero


def token_agreements(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether both name the same most likely token, at each scored position: bool [B, T - 1]."""
    return (reference[:, :-1].argmax(-1) == logits[:, :-1].argmax(-1)).cpu()
