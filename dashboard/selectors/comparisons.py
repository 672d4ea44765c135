"""Artifacts of one variant side by side: what each measured in a quality, against the bytes that it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from dashboard.glossary import SHARE_METRICS, metric_label
from dashboard.lifecycle import ArtifactState
from dashboard.models import Evaluation
from dashboard.pictures import Point, Quality
from dashboard.selectors.registry import ArtifactRow, method_label, short_name

COMPARED = ("kl_divergence", "choice_accuracy", "perplexity")
"""Fidelity, the score of a task, and how well the text is predicted: one picture for each that was measured."""
CHOICE_METRICS = frozenset({"choice_accuracy"})


@dataclass(frozen=True)
class Comparison:
    """The points of one picture. ``left_out``: artifacts whose figure was measured on other samples."""

    name: str
    quality: Quality
    points: list[Point]
    left_out: int

    @property
    def note(self) -> str:
        if not self.left_out:
            return ""
        return ngettext(
            "%(count)s artifact was measured on other samples and is not shown: such figures do not compare.",
            "%(count)s artifacts were measured on other samples and are not shown: such figures do not compare.",
            self.left_out,
        ) % {"count": self.left_out}


@dataclass(frozen=True)
class _Measured:
    """An artifact's figure in one metric, and on which samples."""

    row: ArtifactRow
    evaluation: Evaluation
    metric: Mapping[str, Any]

    @property
    def samples(self) -> tuple[object, ...]:
        """Figures compare only where this is equal."""
        one, config = self.evaluation, self.evaluation.results.get("config") or {}
        if self.metric["name"] in CHOICE_METRICS:
            return one.choice_set_id, self.metric.get("samples")
        return one.text_set_id, self.metric.get("samples"), config.get("window_tokens")


def comparisons(rows: Sequence[ArtifactRow]) -> list[Comparison]:
    """One for each quality that was measured of a published artifact; no further query."""
    published = [row for row in rows if row.artifact.state == ArtifactState.PUBLISHED]
    made = (_comparison(name, published) for name in COMPARED)
    return [one for one in made if one is not None]


def _comparison(name: str, rows: Sequence[ArtifactRow]) -> Comparison | None:
    by_row = [found for row in rows if (found := list(_measured(row, name)))]
    if not by_row:
        return None
    newest = max((found[0] for found in by_row), key=lambda one: (one.evaluation.created_at, one.evaluation.pk))
    alike = [next((one for one in found if one.samples == newest.samples), None) for found in by_row]
    shown = [one for one in alike if one is not None]
    points = [_point(one) for one in shown]
    full = newest.metric["values"].get("variant")
    if _known(full):
        label = _("full precision")
        points.insert(0, _drawn(label, label, newest.row.artifact.source_bytes, full))
    quality = Quality(metric_label(name), bool(newest.metric["higher_is_better"]), name in SHARE_METRICS)
    return Comparison(name, quality, points, len(by_row) - len(shown))


def _measured(row: ArtifactRow, name: str) -> Iterable[_Measured]:
    """Newest first."""
    for evaluation in row.evaluations:
        for metric in evaluation.results.get("metrics", []):
            if metric["name"] == name and _known(metric["values"].get("compressed")):
                yield _Measured(row, evaluation, metric)


def _known(value: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    return value is not None and value.get("value") is not None and math.isfinite(float(value["value"]))


def _point(one: _Measured) -> Point:
    artifact = one.row.artifact
    return _drawn(
        short_name(artifact),
        method_label(artifact.method),
        artifact.artifact_bytes,
        one.metric["values"]["compressed"],
        reverse("artifact-detail", args=[artifact.pk]),
        one.row.about,
    )


def _drawn(
    label: str, family: str, size_bytes: int, value: Mapping[str, Any], href: str = "", about: str = ""
) -> Point:
    middle = float(value["value"])
    low, high = value.get("low"), value.get("high")
    return Point(
        label=label,
        family=family,
        size_bytes=size_bytes,
        value=middle,
        low=middle if low is None else float(low),
        high=middle if high is None else float(high),
        href=href,
        about=about,
    )
