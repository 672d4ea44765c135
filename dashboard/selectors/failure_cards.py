"""The card of a job that ended badly or waits for room: its cause, the evidence, and a retry with what usually helps.

The change is found by trying the method's own candidates: less memory where memory ran out, a lower learning rate
where the distillation diverged. One that would not pass the pre-flight is not offered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from django.urls import reverse
from django.utils.translation import gettext as _

from compression_worker import catalog
from compression_worker.contracts import CompressionError
from compression_worker.evaluation import estimate as evaluation
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.preflight import Estimate
from dashboard.failures import Cause, Ending, Failure, classify
from dashboard.formats import byte_words
from dashboard.lifecycle import ATTEMPTS_PER_CAUSE, AttemptOutcome, JobKind, JobState, StepState
from dashboard.models import Artifact, Attempt, Job, SampleSet, Step
from dashboard.selectors.preflight import (
    Preflight,
    change_words,
    changed_fields,
    compression_inputs,
    compression_preflight,
    evaluation_inputs,
    evaluation_preflight,
)
from dashboard.selectors.queues import room_of, serves, workers_alive

LESS_MEMORY = 0.75
"""A change is worth proposing when it takes at most this share of the memory that was too much."""
MEMORY_CAUSES = frozenset({Cause.HOST_MEMORY, Cause.GPU_MEMORY, Cause.KILLED})


@dataclass(frozen=True)
class Retry:
    """A way on: a form that is filled in already. ``changes`` says what differs from the job that failed."""

    href: str
    label: str
    changes: str = ""
    effect: str = ""


@dataclass(frozen=True)
class FailureCard:
    failure: Failure
    step: Step | None
    attempts: list[str]
    retry: Retry | None


def failure_card(job: Job, steps: Sequence[Step]) -> FailureCard | None:
    """None for a job that is not in trouble. ``steps`` with their attempts."""
    if job.state not in (JobState.FAILED, JobState.DEAD, JobState.BLOCKED, JobState.CANCELLED):
        return None
    step = _broken_step(job, steps)
    failure = classify(_ending(job, step))
    return FailureCard(failure, step, _attempts_used(step), _retry(job, failure.cause, step))


def _broken_step(job: Job, steps: Sequence[Step]) -> Step | None:
    if job.state == JobState.BLOCKED:
        return next((step for step in steps if _last(step, AttemptOutcome.BLOCKED)), None)
    return next((step for step in steps if step.state in (StepState.FAILED, StepState.DEAD)), None)


def _last(step: Step, outcome: AttemptOutcome) -> Attempt | None:
    attempts = list(step.attempts.all())
    return attempts[-1] if attempts and attempts[-1].outcome == outcome else None


def _ending(job: Job, step: Step | None) -> Ending:
    attempts = list(step.attempts.all()) if step else []
    last = attempts[-1] if attempts else None
    return Ending(
        state=job.state,
        code=job.error_code or job.blocked_reason,
        message=job.error,
        outcome=last.outcome if last else "",
        detail=last.detail if last else "",
        causes=step.causes if step else {},
        expected_share=_expected_share(job, step, last),
    )


def _expected_share(job: Job, step: Step | None, attempt: Attempt | None) -> float | None:
    """The step's predicted memory over what its worker has, or else the smallest one alive on its queue."""
    if step is None or not job.estimate:
        return None
    needed = [one.memory_bytes for one in Estimate.from_json(job.estimate).steps if one.kind == step.kind]
    workers = [one for one in workers_alive() if serves(one, step.queue)]
    own = [one for one in workers if attempt and one.name == attempt.worker]
    rooms = [room.memory for room in map(room_of, own or workers) if room.memory]
    return needed[0] / min(rooms) if needed and rooms else None


def _attempts_used(step: Step | None) -> list[str]:
    """``Killed: 2 of 3`` for each cause that struck."""
    causes: Mapping[str, int] = step.causes if step else {}
    return [
        _("%(cause)s: %(times)d of %(most)d")
        % {"cause": _cause_label(name), "times": times, "most": ATTEMPTS_PER_CAUSE}
        for name, times in sorted(causes.items())
    ]


def _cause_label(name: str) -> str:
    if name in AttemptOutcome.values:
        return str(AttemptOutcome(name).label)
    return str(Cause(name).label) if name in Cause.values else name


def _retry(job: Job, cause: Cause, step: Step | None) -> Retry | None:
    if job.state == JobState.BLOCKED:
        return Retry(reverse("storage"), _("Free room on the storage page"))
    match JobKind(job.kind):
        case JobKind.COMPRESS if job.method in catalog.METHODS:
            return _form(job, cause, step, reverse("job-create", args=[job.method]))
        case JobKind.EVALUATE:
            return _form(job, cause, step, reverse("evaluation-new"))
        case JobKind.IMPORT:
            return Retry(f"{reverse('checkpoint-import')}?{urlencode({'from': job.pk})}", _("Import again"))
    return None


def _form(job: Job, cause: Cause, step: Step | None, address: str) -> Retry:
    helping = _helping_change(job, cause, step)
    if helping is None:
        return Retry(f"{address}?{urlencode({'from': job.pk})}", _("Open a copy of its form"))
    changes, effect = helping
    query = urlencode({"from": job.pk, **changes})
    return Retry(f"{address}?{query}", _("Retry with this change"), change_words(changes), effect)


def _helping_change(job: Job, cause: Cause, step: Step | None) -> tuple[dict[str, Any], str] | None:
    """The first candidate that helps and passes the pre-flight, with its predicted effect."""
    kind = step.kind if step else ""
    try:
        config, trial, less, calm = _candidates(job)
        before = trial(config)
        for candidate in _tried(config, cause, less, calm):
            after = trial(candidate)
            if cause in MEMORY_CAUSES and _memory(after, kind) > LESS_MEMORY * _memory(before, kind):
                continue
            if after.fits:
                effect = _memory_effect(before, after, kind) if cause in MEMORY_CAUSES else ""
                return changed_fields(config, candidate), effect
    except (CompressionError, LookupError, TypeError, ValueError):
        return None  # a job of other code, or one whose variant is gone: its form opens as it was
    return None


def _candidates(job: Job) -> tuple[Any, Any, Any, Any]:
    """The job's config, how to judge one, and its changes for less memory and for a calmer training."""
    if job.variant is None:
        raise LookupError("the variant was removed")
    sets = {name: _sample_set(job, name) for name in ("calibration", "text_set", "choice_set")}
    if job.kind == JobKind.EVALUATE:
        artifact = Artifact.objects.filter(pk=job.spec.get("artifact")).first()
        measured = evaluation_inputs(job.variant, artifact, sets["text_set"], sets["choice_set"])
        settings = EvaluationConfig.from_json(job.spec["config"])
        return settings, lambda one: evaluation_preflight(one, measured, job.queue), evaluation.cheaper, _none
    method = catalog.method(job.method)
    forecast, inputs = method.forecaster(), compression_inputs(job.method, job.variant, sets["calibration"])
    config = method.config_class()(**job.spec["config"])
    judge = lambda one: compression_preflight(job.method, one, inputs, job.queue)  # noqa: E731
    return config, judge, forecast.cheaper, forecast.calmer


def _sample_set(job: Job, name: str) -> SampleSet | None:
    return SampleSet.objects.filter(pk=job.spec.get(name)).first()


def _none(config: Any) -> Iterable[Any]:
    return ()


def _tried(config: Any, cause: Cause, less: Any, calm: Any) -> Iterator[Any]:
    if cause in MEMORY_CAUSES:
        yield from less(config)
    elif cause == Cause.DIVERGED:
        yield from calm(config)


def _memory(found: Preflight, kind: str) -> int:
    """Of the step that broke; of the hungriest when that one is not planned any more, or is not known."""
    needs = [need for need in found.needs if need.load.kind == kind] or list(found.needs)
    return max((need.gpu_bytes or need.memory_bytes for need in needs), default=0)


def _memory_effect(before: Preflight, after: Preflight, kind: str) -> str:
    values = {"before": byte_words(_memory(before, kind)), "after": byte_words(_memory(after, kind))}
    return _("memory %(before)s → %(after)s (predicted)") % values
