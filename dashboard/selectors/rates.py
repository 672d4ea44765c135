"""How fast work goes here: seconds for a unit of work, measured by the newest finished steps of each kind.

Nothing is assumed: a kind that has not been computed here has no rate.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db import connection

from compression_worker.catalog import load, need
from compression_worker.preflight import Estimate

NEWEST = 30
LOW, MIDDLE, HIGH = 0.1, 0.5, 0.9
NEWEST_STEPS = """
    SELECT k.kind, s.params, s.seconds, s.on_gpu, j.estimate -> 'sizes'
    FROM unnest(%(kinds)s::text[]) AS k(kind)
    CROSS JOIN LATERAL (
        SELECT job_id, params, (data #>> '{measured,seconds}')::float AS seconds,
               (data -> 'measured') ? 'gpu_peak_memory_bytes' AS on_gpu
        FROM dashboard_step
        WHERE kind = k.kind AND state = 'done' AND NOT reused
        ORDER BY id DESC LIMIT %(newest)s
    ) s
    JOIN dashboard_job j ON j.id = s.job_id
    WHERE s.seconds IS NOT NULL AND jsonb_typeof(j.estimate) = 'object'
"""


@dataclass(frozen=True)
class Span:
    """A quantity with its 10-90 % interval."""

    low: float
    middle: float
    high: float

    def times(self, factor: float) -> Span:
        return Span(self.low * factor, self.middle * factor, self.high * factor)

    def plus(self, other: Span) -> Span:
        return Span(self.low + other.low, self.middle + other.middle, self.high + other.high)


NOTHING = Span(0.0, 0.0, 0.0)
Rates = Mapping[tuple[str, bool], Span]
"""(kind of step, on a GPU) -> seconds for a unit of its work."""


def measured_rates(kinds: Collection[str]) -> Rates:
    """The rates of ``kinds``, where there are any, in one query."""
    with connection.cursor() as cursor:
        cursor.execute(NEWEST_STEPS, {"kinds": sorted(kinds), "newest": NEWEST})
        rows = cursor.fetchall()
    found: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for kind, params, seconds, on_gpu, sizes in rows:
        work = _work(kind, _parsed(params), _parsed(sizes))
        if work > 0:
            found[kind, bool(on_gpu)].append(seconds / work)
    return {key: Span(*(quantile(values, share) for share in (LOW, MIDDLE, HIGH))) for key, values in found.items()}


def _parsed(value: Any) -> Any:
    """A raw query gives a JSON column as text."""
    return json.loads(value) if isinstance(value, str | bytes) else value


def _work(kind: str, params: dict[str, Any], sizes: Mapping[str, float]) -> float:
    """The work of a finished step; nothing when its job was estimated by other code."""
    path = need(kind).work
    try:
        return float(load(path)(params, sizes)) if path else 1.0
    except (KeyError, TypeError, ValueError):
        return 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the values in their order."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Hours:
    """Seconds of work in all, where measured; ``unmeasured`` lists the kinds of step that are not in it."""

    span: Span | None
    unmeasured: tuple[str, ...]


def time_needed(estimate: Estimate, rates: Rates, on_gpu: bool) -> Hours:
    """One worker, one step after another. ``on_gpu``: whether steps that need the device find a GPU."""
    total, missing = NOTHING, []
    for step in estimate.steps:
        rate = rates.get((step.kind, on_gpu and need(step.kind).device))
        if rate is None:
            missing.append(step.kind)
        else:
            total = total.plus(rate.times(step.units))
    return Hours(None if len(missing) == len(estimate.steps) else total, tuple(missing))
