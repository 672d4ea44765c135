"""How much text goes through a model that learns at a time. No torch."""

from __future__ import annotations

PASS_TOKENS, PASS_LOGITS = 2048, 1 << 25
"""What goes through the model together, at most: tokens, and numbers in their logits."""


def at_once(batch: int, length: int, vocabulary: int) -> int:
    """Windows that go through the model together: more are no faster, and their logits would fill the memory."""
    return max(1, min(batch, PASS_TOKENS // length, PASS_LOGITS // (length * max(vocabulary, 1))))
