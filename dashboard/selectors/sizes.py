"""Bytes before a job runs: what a method's artifacts came to, and what it would come to for each variant."""

from __future__ import annotations

from dataclasses import dataclass

from compression_worker.catalog import METHODS
from dashboard.lifecycle import ArtifactState
from dashboard.models import Artifact, Checkpoint
from dashboard.selectors.preflight import compression_inputs


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
    forecast, config = METHODS[method].forecaster(), METHODS[method].config_class()()
    variants = Checkpoint.objects.filter(base__isnull=False).select_related("base").order_by("name")
    found = [(one, forecast.estimate(config, compression_inputs(one, None))) for one in variants[:50]]
    return [Prediction(one, made.source_bytes, made.result_bytes) for one, made in found if made.exact]
