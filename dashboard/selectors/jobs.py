"""Jobs as pages show them: progress counted from steps, time left from measured rates, the timeline, the log."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any

from django.db.models import Count, Exists, Max, OuterRef, Q, QuerySet
from django.utils import timezone

from dashboard.lifecycle import (
    ACTIVE_JOB_STATES,
    TERMINAL_JOB_STATES,
    AttemptOutcome,
    JobState,
    StepState,
)
from dashboard.models import Attempt, Job, LogLine, Step, User
from dashboard.pictures import Bar, Column, Matrix
from dashboard.pictures.matrices import from_figures

PAGE = 30
STATE_FILTERS: dict[str, frozenset[JobState]] = {
    "active": ACTIVE_JOB_STATES,
    "finished": TERMINAL_JOB_STATES,
    **{state.value: frozenset({state}) for state in JobState if state != JobState.DRAFT},
}
SEARCHED = 50_000
TIMED = 200
"""From how many finished steps of a kind it is read how long they take."""


def job_list(
    *, state: str = "", kind: str = "", query: str = "", before: int | None = None, limit: int = PAGE
) -> list[Job]:
    """One page of jobs, newest first, by keyset: ``before`` is the last number of the page above.

    Two queries however many jobs there are: the numbers of the page, along an index, and then these jobs alone with
    their steps counted.
    """
    jobs = (
        Job.objects.filter(state__in=STATE_FILTERS[state])
        if state in STATE_FILTERS
        else Job.objects.exclude(state=JobState.DRAFT)
    )
    if kind:
        jobs = jobs.filter(kind=kind)
    if before is not None:
        jobs = jobs.filter(pk__lt=before)
    page = jobs.order_by("-pk").values_list("pk", flat=True)
    found = _search(page, query, before, limit) if query else list(page[:limit])
    return _counted(found)


def _search(page: QuerySet[Job, int], query: str, before: int | None, limit: int) -> list[int]:
    """The jobs of ``page`` that ``query`` names: by number, by person, or by a part of the title.

    A part of a title is looked for in the next ``SEARCHED`` numbers only: reading a million titles would hold up the
    page, and nothing but reading finds the middle of a word.
    """
    newest = before or Job.objects.aggregate(newest=Max("pk"))["newest"] or 0
    people = list(User.objects.filter(username__iexact=query).values_list("pk", flat=True))
    found = set(page.filter(title__icontains=query, pk__gte=newest - SEARCHED)[:limit])
    found |= set(page.filter(created_by__in=people)[:limit])
    number = query.lstrip("#")
    if number.isascii() and number.isdigit() and len(number) < 18:
        found |= set(page.filter(pk=int(number)))
    return sorted(found, reverse=True)[:limit]


def _counted(numbers: list[int]) -> list[Job]:
    """These jobs in this order, with their steps counted: only theirs are read."""
    jobs = Job.objects.select_related("created_by", "variant").annotate(
        steps_total=Count("steps"), steps_done=Count("steps", filter=Q(steps__state=StepState.DONE))
    )
    found = jobs.in_bulk(numbers)
    return [found[number] for number in numbers if number in found]


def jobs_active(limit: int = 20) -> list[Job]:
    jobs = Job.objects.filter(state__in=ACTIVE_JOB_STATES).order_by("-priority", "pk")
    return _counted(list(jobs.values_list("pk", flat=True)[:limit]))


def jobs_in_trouble(limit: int = 10) -> list[Job]:
    """Jobs that said no or died and that nobody has tried again since."""
    tried_again = Exists(Job.objects.filter(cloned_from=OuterRef("pk")))
    jobs = Job.objects.filter(~tried_again, state__in=[JobState.FAILED, JobState.DEAD])
    return list(jobs.select_related("created_by", "variant").order_by("-pk")[:limit])


def jobs_version(jobs: Iterable[Job]) -> tuple[object, ...]:
    """Changes whenever a row of the list would look different."""
    return tuple((job.pk, job.state, job.cancel_requested, getattr(job, "steps_done", 0)) for job in jobs)


def job_get(pk: int) -> Job:
    return Job.objects.select_related("created_by", "variant", "cloned_from").get(pk=pk)


def job_steps(job: Job) -> list[Step]:
    """The steps with their attempts, in two queries."""
    return list(job.steps.order_by("index").prefetch_related("attempts"))


def job_version(job: Job) -> tuple[object, ...]:
    """Changes whenever the job's page would look different: read before anything is rendered."""
    seen = job.steps.aggregate(
        total=Count("pk"),
        done=Count("pk", filter=Q(state=StepState.DONE)),
        progress=Max("progress_at"),
        claims=Max("attempt"),
    )
    log = job.log_lines.aggregate(last=Max("pk"))
    clock = "" if job.is_terminal else int(timezone.now().timestamp()) // 10  # elapsed time goes on by itself
    return (job.pk, job.state, job.cancel_requested, job.blocked_reason, *seen.values(), log["last"], clock)


@dataclass(frozen=True)
class GroupProgress:
    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Progress:
    """How far a job is. ``left`` counts only steps of kinds that this job has timed; ``unmeasured`` the others."""

    done: int
    total: int
    groups: list[GroupProgress]
    current: Step | None
    group: GroupProgress | None
    elapsed: float | None
    left: float | None
    unmeasured: int

    @property
    def percent(self) -> int:
        return int(100 * self.done / self.total) if self.total else 0


def job_progress(job: Job, steps: Sequence[Step]) -> Progress:
    """``steps`` in order, as :func:`job_steps` gives them."""
    groups = _groups(steps)
    current = next((step for step in steps if step.state == StepState.RUNNING), None)
    upcoming = current or next((step for step in steps if step.state != StepState.DONE), None)
    group = next((one for one in groups if upcoming is not None and one.name == upcoming.group), None)
    left, unmeasured = _time_left(steps)
    end = job.finished_at or timezone.now()
    return Progress(
        done=sum(step.state == StepState.DONE for step in steps),
        total=len(steps),
        groups=groups,
        current=current,
        group=group or (groups[-1] if groups else None),
        elapsed=(end - job.started_at).total_seconds() if job.started_at else None,
        left=None if job.is_terminal else left,
        unmeasured=unmeasured,
    )


def _groups(steps: Sequence[Step]) -> list[GroupProgress]:
    counts: dict[str, list[int]] = {}
    for step in steps:
        if step.group:
            count = counts.setdefault(step.group, [0, 0])
            count[0] += step.state == StepState.DONE
            count[1] += 1
    return [GroupProgress(name, done, total) for name, (done, total) in counts.items()]


def _time_left(steps: Sequence[Step]) -> tuple[float | None, int]:
    """Seconds left at the rate measured in this very job, and how many steps have no rate yet."""
    rates = _rates(steps)
    left, unmeasured = 0.0, 0
    for step in steps:
        if step.state in (StepState.DONE, StepState.FAILED, StepState.CANCELLED, StepState.DEAD):
            continue
        rate = rates.get(step.kind)
        if rate is None:
            unmeasured += 1
        else:
            spent = (timezone.now() - step.started_at).total_seconds() if _is_running(step) and step.started_at else 0
            left += max(0.0, rate - spent)
    return (left if rates and left > 0 else None), unmeasured


def _is_running(step: Step) -> bool:
    return step.state == StepState.RUNNING


def _rates(steps: Iterable[Step]) -> dict[str, float]:
    """Mean seconds a step by kind, over the finished steps that were computed and not reused."""
    times: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        if step.state == StepState.DONE and not step.reused and step.started_at and step.finished_at:
            times[step.kind].append((step.finished_at - step.started_at).total_seconds())
    return {kind: sum(values) / len(values) for kind, values in times.items()}


def typical_seconds(job_id: int, kind: str) -> float | None:
    """The median duration of the latest finished steps of ``kind``: of this job, or else of others."""
    timed = Step.objects.filter(kind=kind, state=StepState.DONE, reused=False).order_by("-pk")
    for steps in (timed.filter(job_id=job_id), timed):
        times = [
            (end - start).total_seconds()
            for start, end in steps.values_list("started_at", "finished_at")[:TIMED]
            if start and end
        ]
        if times:
            return median(times)
    return None


def timeline_columns(steps: Sequence[Step]) -> list[Column]:
    now = timezone.now()
    return [
        Column(
            index=step.index,
            name=step.name,
            group=step.group,
            state=StepState(step.state),
            reused=step.reused,
            bars=tuple(_bar(attempt, now) for attempt in step.attempts.all()),
        )
        for step in steps
    ]


def _bar(attempt: Attempt, now: datetime) -> Bar:
    return Bar(
        number=attempt.number,
        worker=attempt.worker,
        outcome=AttemptOutcome(attempt.outcome),
        seconds=max(0.0, ((attempt.finished_at or now) - attempt.started_at).total_seconds()),
        detail=attempt.detail.strip().splitlines()[-1][:200] if attempt.detail.strip() else "",
    )


def log_tail(job: Job, limit: int = 15) -> list[LogLine]:
    return list(reversed(job.log_lines.order_by("-pk")[:limit]))


def log_page(job: Job, *, query: str = "", before: int | None = None, limit: int = 500) -> list[LogLine]:
    """The latest lines, oldest first; ``before`` (a line's number) goes further back."""
    lines = job.log_lines.order_by("-pk")
    if query:
        lines = lines.filter(text__icontains=query)
    if before is not None:
        lines = lines.filter(pk__lt=before)
    return list(reversed(lines[:limit]))


def matrices_so_far(steps: Sequence[Step]) -> list[Matrix]:
    """The matrices of the finished layers, as their steps tell of them."""
    found: list[Matrix] = []
    for step in _layers_done(steps):
        found += from_figures(step.data.get("matrices") or [])
        found += [Matrix(name, _line_error(line)) for name, line in step.data.get("linears", {}).items()]
    return found


def proxies_so_far(steps: Sequence[Step]) -> list[Matrix]:
    """The same with their relative proxy losses, where the method measures one."""
    lines = [item for step in _layers_done(steps) for item in step.data.get("linears", {}).items()]
    return [Matrix(name, line["proxy_loss"]) for name, line in lines if line.get("proxy_loss") is not None]


def _layers_done(steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.group == "layer" and step.state == StepState.DONE]


def _line_error(line: Mapping[str, Any]) -> float | None:
    """The relative error of one matrix from the sums that its step left.

    Either the step says it, or the whole squared error was summed, or it follows from one sign per weight with its
    initial scale: ``|D - scale * S| / |D|``.
    """
    if "relative_error" in line:
        said: float | None = line["relative_error"]
        return said
    squares = line.get("sum_squares")
    if not squares:
        return 0.0 if squares == 0 else None
    if "sum_abs" in line:
        elements = line["linear"]["outputs"] * line["linear"]["inputs"]
        return math.sqrt(max(0.0, 1.0 - line["sum_abs"] ** 2 / (elements * squares)))
    return math.sqrt(max(0.0, line["error"] / squares)) if "error" in line else None
