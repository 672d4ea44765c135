"""Bytes before a job runs: what a method's artifacts came to, and what it would come to for each variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dashboard.lifecycle import ArtifactState
from dashboard.models import Artifact, Checkpoint


@dataclass(frozen=True)
class Prediction:
    variant: Checkpoint
    source_bytes: int
    predicted_bytes: int

    @property
    def ratio(self) -> float:
        return self.source_bytes / self.predicted_bytes


def typical_ratio(method: str) -> tuple[float, float] | None:
    """Smallest and largest true ratio of the method's artifacts here; None before the first."""
    ratios = [one.true_ratio for one in Artifact.objects.filter(method=method, state=ArtifactState.PUBLISHED)[:200]]
    return (min(ratios), max(ratios)) if ratios else None


def predictions(method: str) -> list[Prediction]:
    """The predicted artifact bytes of each variant that the method could compress, from its configuration alone."""
    if method != "bitdelta":
        return []
    variants = Checkpoint.objects.filter(base__isnull=False).order_by("name")
    found = [(one, _one_bit_bytes(one)) for one in variants[:50]]
    return [Prediction(one, _weight_bytes(one), size) for one, size in found if size]


def _weight_bytes(checkpoint: Checkpoint) -> int:
    return int(checkpoint.manifest.get("weight_bytes") or checkpoint.size_bytes)


def _one_bit_bytes(checkpoint: Checkpoint) -> int:
    """One bit for each weight of the block linears, everything else as it is, side files carried along."""
    linears = _linear_weights(checkpoint.manifest.get("config") or {})
    weight_bytes = _weight_bytes(checkpoint)
    width = weight_bytes / max(checkpoint.parameters, 1)
    if not linears or linears > checkpoint.parameters:
        return 0
    side_files = max(0, checkpoint.size_bytes - weight_bytes)
    return round(weight_bytes - linears * width + linears / 8 + side_files)


def _linear_weights(config: dict[str, Any]) -> int:
    """Weights of the block linears of a Llama-shaped model; 0 when the configuration does not say."""
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        inner, heads = int(config["intermediate_size"]), int(config["num_attention_heads"])
    except (KeyError, TypeError, ValueError):
        return 0
    head = int(config.get("head_dim") or hidden // heads)
    shared = int(config.get("num_key_value_heads") or heads)
    attention = 2 * hidden * heads * head + 2 * hidden * shared * head
    return layers * (attention + 3 * hidden * inner)
