"""What a study can try on a checkpoint: methods, each at the bit widths that its settings allow; what that needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from django.utils.translation import gettext as _

from compression_worker.catalog import METHODS
from compression_worker.contracts import CompressionError
from compression_worker.evaluation.config import EvaluationConfig
from dashboard.formats import byte_words
from dashboard.models import Checkpoint, SampleSet
from dashboard.selectors.preflight import (
    Preflight,
    Site,
    compression_inputs,
    compression_preflight,
    evaluation_inputs,
    evaluation_preflight,
)
from dashboard.selectors.registry import method_label
from dashboard.selectors.sizes import fits

WIDTHS = (2, 3, 4, 8)
WIDTH_FIELDS = ("bits", "num_bits")
"""How methods call the setting: bits of a code."""
TOKENS_FIELD = "tokens"
"""How methods call the setting: tokens to train on."""
MOST = 24
"""Trials in one study: more are better asked for after a look at the first."""


@dataclass(frozen=True, order=True)
class Way:
    """One way of compressing. ``bits`` None: the method has no choice of them, and its own settings are used."""

    method: str
    bits: int | None = None

    @property
    def key(self) -> str:
        """As a form sends it."""
        return f"{self.method}:{self.bits or ''}"

    @property
    def label(self) -> str:
        return way_label(self.method, self.bits)

    def config(self, tokens: int | None = None) -> Any:
        """The method's own settings at this width, and trained on so many ``tokens`` where it trains.

        Raises what the config class raises.
        """
        given = {} if self.bits is None else {_width_field(self.method): self.bits}
        if tokens is not None and self.trains:
            given[TOKENS_FIELD] = tokens
        return METHODS[self.method].config_class()(**given)

    @property
    def trains(self) -> bool:
        """Whether the method asks for a number of training tokens."""
        return TOKENS_FIELD in {one.name for one in fields(METHODS[self.method].config_class())}

    @property
    def reads_text(self) -> bool:
        return bool(getattr(self.config(), "calibrates", False))


def way_label(method: str, bits: int | None) -> str:
    """``GPTQ, 4 bits``."""
    name = method_label(method)
    return _("%(method)s, %(bits)s bits") % {"method": name, "bits": bits} if bits else name


def _width_field(method: str) -> str:
    known = {one.name for one in fields(METHODS[method].config_class())}
    return next((name for name in WIDTH_FIELDS if name in known), "")


def bit_widths(method: str) -> tuple[int, ...]:
    """The widths of :data:`WIDTHS` that the method's settings allow; none where it has no such setting."""
    return tuple(bits for bits in WIDTHS if _width_field(method) and _is_possible(Way(method, bits)))


def _is_possible(way: Way) -> bool:
    known = {one.name: one for one in fields(METHODS[way.method].config_class())}
    choices = known[_width_field(way.method)].metadata.get("choices")
    if choices and way.bits not in choices:
        return False
    try:
        way.config()
    except (CompressionError, TypeError, ValueError):
        return False
    return True


def ways_of(method: str) -> list[Way]:
    """Every way of one method: a way for each width, or one with its own settings."""
    return [Way(method, bits) for bits in bit_widths(method)] or [Way(method)]


def ways_for(checkpoint: Checkpoint | None) -> list[Way]:
    """Every way that fits ``checkpoint``, in the order of the catalogue."""
    return [way for method in METHODS if fits(method, checkpoint) for way in ways_of(method)]


@dataclass(frozen=True)
class Forecast:
    """What one way would come to."""

    way: Way
    preflight: Preflight

    @property
    def ratio(self) -> float | None:
        size = self.preflight.estimate.result_bytes
        return self.preflight.estimate.source_bytes / size if size else None


@dataclass(frozen=True)
class StudyForecast:
    """All of it before anything is queued.

    ``needed_bytes``: what all jobs together will write, and the largest of them once more.
    """

    ways: list[Forecast]
    evaluation: Preflight
    needed_bytes: int
    free: int | None

    @property
    def problems(self) -> list[str]:
        """Why it cannot be queued as it stands, a sentence each."""
        found = [
            _("%(way)s: %(words)s") % {"way": one.way.label, "words": one.preflight.words}
            for one in self.ways
            if not one.preflight.fits
        ]
        if not self.evaluation.fits:
            found.append(_("Evaluation: %(words)s") % {"words": self.evaluation.words})
        if not found and self.free is not None and self.needed_bytes > self.free:
            values = {"needed": byte_words(self.needed_bytes), "free": byte_words(self.free)}
            found.append(
                _("Together they need %(needed)s of free room, and the store has %(free)s: choose fewer.") % values
            )
        return found

    @property
    def seconds(self) -> float | None:
        """Of computing, one job after another; None while a part of it was never measured."""
        spans = [one.hours for one in (*(one.preflight for one in self.ways), *[self.evaluation] * len(self.ways))]
        known = [hours.span.middle for hours in spans if hours.span and not hours.unmeasured]
        return sum(known) if len(known) == len(spans) else None


def study_forecast(
    checkpoint: Checkpoint,
    ways: Sequence[Way],
    *,
    calibration: SampleSet | None,
    sets: tuple[SampleSet | None, SampleSet | None],
    config: EvaluationConfig,
    queue: str,
    tokens: int | None = None,
) -> StudyForecast:
    """``sets``: the text set and the choice set of the evaluations; ``tokens``: see :meth:`Way.config`."""
    site = Site.now()
    found = [_forecast(way, checkpoint, calibration, queue, site, tokens) for way in ways]
    largest = max((one.preflight.estimate.result_bytes for one in found), default=0)
    given = replace(evaluation_inputs(checkpoint, None, *sets), artifact_bytes=largest)
    evaluation = evaluation_preflight(config, given, queue)
    written = [one.preflight.estimate.needed_bytes // 2 for one in found]
    written += [evaluation.estimate.needed_bytes // 2] * len(found)
    return StudyForecast(found, evaluation, sum(written) + max(written, default=0), site.free)


def _forecast(
    way: Way, checkpoint: Checkpoint, calibration: SampleSet | None, queue: str, site: Site, tokens: int | None
) -> Forecast:
    inputs = compression_inputs(way.method, checkpoint, calibration if way.reads_text else None)
    return Forecast(way, compression_preflight(way.method, way.config(tokens), inputs, queue, site=site))
