"""Bytes before a job runs: what a method's artifacts came to, and what it would come to for each variant."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import F, FloatField, Max, Min

from compression_worker.catalog import METHODS, Method
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


@dataclass(frozen=True)
class Card:
    """A method as people choose it: its words, and what its artifacts came to here (None before the first)."""

    name: str
    method: Method
    ratios: tuple[float, float] | None


def method_cards() -> list[Card]:
    """A card for each method of the catalogue, in its order, in one query."""
    ratio = F("source_bytes") * 1.0 / F("artifact_bytes")
    measured = (
        Artifact.objects.filter(state=ArtifactState.PUBLISHED)
        .order_by()
        .values("method")
        .annotate(low=Min(ratio, output_field=FloatField()), high=Max(ratio, output_field=FloatField()))
    )
    ratios = {row["method"]: (row["low"], row["high"]) for row in measured}
    return [Card(name, method, ratios.get(name)) for name, method in METHODS.items()]


def predictions(method: str) -> list[Prediction]:
    """The predicted artifact bytes of each variant that the method could compress, from its configuration alone."""
    forecast, config = METHODS[method].forecaster(), METHODS[method].config_class()()
    variants = Checkpoint.objects.filter(base__isnull=False).select_related("base").order_by("name")
    found = [(one, forecast.estimate(config, compression_inputs(one, None))) for one in variants[:50]]
    return [Prediction(one, made.source_bytes, made.result_bytes) for one, made in found if made.exact]
