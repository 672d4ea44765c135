"""Evaluations as tables with verdicts, and the sample sets they were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import Max, QuerySet

from dashboard.formats import fixed, places_for, points_words, significant
from dashboard.glossary import METRICS, SHARE_METRICS, Words, metric_label
from dashboard.models import Evaluation, SampleSet
from dashboard.selectors.approvals import policy_active
from dashboard.verdicts import Verdict, VerdictKind, margin_for, metric_verdict, verdict_words

TONES: dict[VerdictKind, str] = {
    VerdictKind.BETTER: "good",
    VerdictKind.EQUAL: "good",
    VerdictKind.WORSE: "bad",
    VerdictKind.UNCLEAR: "caution",
}


@dataclass(frozen=True)
class Figure:
    """A value with its interval, written out with as many places as the interval deserves."""

    value: str
    low: str
    high: str
    exact: str


@dataclass(frozen=True)
class MetricRow:
    name: str
    label: str
    meaning: Words
    unit: str
    samples: int
    higher_is_better: bool
    cells: list[Figure | None]
    difference: Figure | None
    verdict: Verdict | None
    words: str
    tone: str


def evaluation_list(limit: int = 100) -> list[Evaluation]:
    return list(
        Evaluation.objects.select_related("variant", "artifact", "text_set", "choice_set", "job__created_by")[:limit]
    )


def evaluation_get(pk: int) -> Evaluation:
    return Evaluation.objects.select_related(
        "variant__base", "artifact__base", "text_set", "choice_set", "job__created_by"
    ).get(pk=pk)


def policy_rules() -> list[dict[str, Any]]:
    """The rules in force; their limits are the margins of every verdict."""
    policy = policy_active()
    return list(policy.rules) if policy else []


def metric_rows(results: Mapping[str, Any], rules: Sequence[Mapping[str, Any]], target: str = "") -> list[MetricRow]:
    """One row a metric: every target's value, the difference of ``target`` to the reference, and its verdict."""
    targets = list(results.get("targets", []))
    compared = target or ("compressed" if "compressed" in targets else targets[0] if targets else "")
    return [_row(metric, targets, compared, rules) for metric in results.get("metrics", [])]


def _row(
    metric: Mapping[str, Any], targets: Sequence[str], target: str, rules: Sequence[Mapping[str, Any]]
) -> MetricRow:
    name = str(metric["name"])
    difference = metric.get("differences", {}).get(target)
    values = [metric["values"].get(one) for one in targets]
    places = _places(name, [*values, difference])
    verdict = metric_verdict(metric, target, rules)
    margin = margin_for(metric, rules)
    share = name in SHARE_METRICS
    written = points_words(margin, places) if share else significant(margin, 2)
    size = abs(float(difference["value"])) if difference and difference.get("value") is not None else None
    amount = "" if size is None else points_words(size, places) if share else fixed(size, places)
    return MetricRow(
        name=name,
        label=metric_label(name),
        meaning=METRICS[name].meaning if name in METRICS else "",
        unit="%" if name in SHARE_METRICS else str(metric.get("unit") or ""),
        samples=int(metric.get("samples") or 0),
        higher_is_better=bool(metric.get("higher_is_better")),
        cells=[_figure(name, value, places) for value in values],
        difference=_figure(name, difference, places, sign=True),
        verdict=verdict,
        words=verdict_words(verdict, written, amount) if verdict else "",
        tone=TONES[verdict.kind] if verdict else "neutral",
    )


def _places(name: str, values: Sequence[Mapping[str, Any] | None]) -> int:
    """Decimal places that give the narrowest interval two digits; the same along a row, so that it lines up."""
    factor = 100 if name in SHARE_METRICS else 1
    halves = [
        factor * (float(value["high"]) - float(value["low"])) / 2
        for value in values
        if value and value.get("low") is not None and value.get("high") is not None
    ]
    return min(places_for(*halves), 1 if name in SHARE_METRICS else 4)


def _figure(name: str, value: Mapping[str, Any] | None, places: int, *, sign: bool = False) -> Figure | None:
    if not value or value.get("value") is None:
        return None
    factor = 100 if name in SHARE_METRICS else 1

    def write(number: float | None) -> str:
        return fixed(None if number is None else factor * float(number), places, sign=sign)

    return Figure(write(value["value"]), write(value.get("low")), write(value.get("high")), repr(value["value"]))


def sample_set_list() -> QuerySet[SampleSet]:
    return SampleSet.objects.select_related("created_by").order_by("name", "-version")


def sample_set_choices(kind: str) -> QuerySet[SampleSet]:
    """The newest version of each set of ``kind``."""
    newest = SampleSet.objects.filter(kind=kind).values("name").annotate(version=Max("version"))
    pairs = {(one["name"], one["version"]) for one in newest}
    found = SampleSet.objects.filter(kind=kind)
    keep = [one.pk for one in found.only("pk", "name", "version") if (one.name, one.version) in pairs]
    return SampleSet.objects.filter(pk__in=keep).order_by("name")
