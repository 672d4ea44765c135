"""Methods before a job runs: which fit a checkpoint, what their artifacts came to, what they would come to."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import F, FloatField, Max, Min, QuerySet
from django.utils.translation import gettext as _

from compression_worker.catalog import METHODS, Method
from dashboard.lifecycle import ArtifactState
from dashboard.models import Artifact, Checkpoint
from dashboard.selectors.preflight import compression_inputs


@dataclass(frozen=True)
class Prediction:
    checkpoint: Checkpoint
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


@dataclass(frozen=True)
class Family:
    """Methods that do the same kind of thing, under a heading that says which."""

    name: str
    title: str
    about: str
    cards: list[Card]


def fits(method: str, checkpoint: Checkpoint | None) -> bool:
    """Whether ``method`` can compress ``checkpoint``: a difference needs a base. Before one is chosen, all do."""
    return checkpoint is None or not METHODS[method].needs_base or checkpoint.base_id is not None


def compressible(method: str) -> QuerySet[Checkpoint]:
    """The checkpoints that ``method`` can compress, bases with them where it needs none."""
    checkpoints = Checkpoint.objects.select_related("base").order_by("name")
    return checkpoints.filter(base__isnull=False) if METHODS[method].needs_base else checkpoints


def method_families(checkpoint: Checkpoint | None = None, *, also: str = "") -> list[Family]:
    """The cards of the methods that fit ``checkpoint``, and of ``also``, by what they compress; in one query."""
    cards = [card for card in method_cards() if card.name == also or fits(card.name, checkpoint)]
    found = [
        Family(
            "difference",
            _("The difference between a variant and its base"),
            _("Small, and of use beside the base alone: for many variants of one base."),
            [card for card in cards if card.method.needs_base],
        ),
        Family(
            "whole",
            _("A whole model by itself"),
            _("Needs no base, to compress or to answer: for base models and for variants."),
            [card for card in cards if not card.method.needs_base],
        ),
    ]
    return [family for family in found if family.cards]


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
    """The predicted artifact bytes of each checkpoint that the method could compress, from its configuration alone."""
    forecast, config = METHODS[method].forecaster(), METHODS[method].config_class()()
    checkpoints = compressible(method)[:50]
    found = [(one, forecast.estimate(config, compression_inputs(method, one, None))) for one in checkpoints]
    return [Prediction(one, made.source_bytes, made.result_bytes) for one, made in found if made.exact]
