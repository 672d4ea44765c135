"""Why a job does not move, and when it is expected to: in as many queries for thirty jobs as for one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.db.models import Count, Max, Min, Q
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from compression_worker.preflight import Estimate, StepLoad
from dashboard.lifecycle import ACTIVE_JOB_STATES, JobState, StepState
from dashboard.models import Job, Step, Worker
from dashboard.selectors.queues import light_queue, serves, step_queue, workers_alive
from dashboard.selectors.rates import Rates, measured_rates


@dataclass(frozen=True)
class Wait:
    """Why a job waits, in one sentence; ``starts`` is when it is expected to go on, where rates allow to say."""

    kind: str  # room, pause, nobody, trouble, behind, busy, soon
    text: str
    starts: datetime | None = None


@dataclass(frozen=True)
class Load:
    """The unfinished steps of one job in one queue, of one kind."""

    job_id: int
    priority: int
    own_queue: str  # of the job
    queue: str  # of these steps
    kind: str
    waiting: int
    running: int
    started: datetime | None
    not_before: datetime | None
    estimate: dict[str, object] | None

    def goes_before(self, job: Job) -> bool:
        return (-self.priority, self.job_id) < (-job.priority, job.pk)


def waits(jobs: Iterable[Job]) -> dict[int, Wait]:
    """Job number -> why it waits, for those of ``jobs`` that have steps to do and none running."""
    asked = [job for job in jobs if JobState(job.state) in ACTIVE_JOB_STATES]
    if not asked:
        return {}
    board = _Board.now()
    found = {job.pk: board.wait(job) for job in asked}
    return {pk: wait for pk, wait in found.items() if wait}


def job_wait(job: Job) -> Wait | None:
    return waits([job]).get(job.pk)


def reasons_clock(jobs: Iterable[Job]) -> int:
    """Moves on each ten seconds while one of ``jobs`` may wait: reasons change without a change of its row."""
    return 0 if all(job.is_terminal for job in jobs) else int(timezone.now().timestamp()) // 10


@dataclass(frozen=True)
class _Board:
    """What is queued and who is alive, at one moment."""

    loads: Sequence[Load]
    workers: Sequence[Worker]
    rates: Rates
    light: str
    now_at: datetime

    @classmethod
    def now(cls) -> _Board:
        loads = _loads()
        kinds = {one.kind for one in loads} | {step.kind for one in loads for step in _planned(one)}
        workers = workers_alive()
        return cls(loads, workers, measured_rates(kinds), light_queue(workers), timezone.now())

    def wait(self, job: Job) -> Wait | None:
        own = [one for one in self.loads if one.job_id == job.pk]
        if not own or any(one.running for one in own):
            return None
        queue = own[0].queue  # of its first step to do
        pause = max((one.not_before for one in own if one.not_before), default=None)
        if job.state == JobState.BLOCKED:
            return self._room(job, pause)
        if pause and pause > self.now_at:
            moment = timezone.localtime(pause).strftime("%H:%M:%S")
            return Wait("pause", _("pauses after an error until %(time)s") % {"time": moment}, pause)
        return self._nobody(queue) or self._behind(job, queue)

    def _room(self, job: Job, pause: datetime | None) -> Wait:
        text = _("waits: %(reason)s; it goes on by itself") % {"reason": job.get_blocked_reason_display()}
        if pause and pause > self.now_at:
            moment = timezone.localtime(pause).strftime("%H:%M:%S")
            text += " · " + _("looked at again after %(time)s") % {"time": moment}
        return Wait("room", text)

    def _nobody(self, queue: str) -> Wait | None:
        """Nobody serves the queue, or those who do are in trouble."""
        there = [worker for worker in self.workers if serves(worker, queue)]
        if not there:
            return Wait("nobody", _("no living worker serves the queue %(queue)s") % {"queue": queue})
        if all(worker.trouble for worker in there):
            values = {"queue": queue, "trouble": there[0].trouble.splitlines()[0], "n": len(there)}
            text = ngettext(
                "the only worker of the queue %(queue)s is quarantined: %(trouble)s",
                "all %(n)d workers of the queue %(queue)s are quarantined: %(trouble)s",
                len(there),
            )
            return Wait("trouble", text % values)
        return None

    def _behind(self, job: Job, queue: str) -> Wait:
        """The steps of other jobs that are claimed first, and those being computed."""
        others = [one for one in self.loads if one.queue == queue and one.job_id != job.pk]
        before = [one for one in others if one.goes_before(job)]
        ahead, busy = sum(one.waiting for one in before), sum(one.running for one in others)
        starts = self._start(queue, before, others)
        if ahead:
            text = ngettext(
                "%(n)d step of a job before it in the queue %(queue)s",
                "%(n)d steps of jobs before it in the queue %(queue)s",
                ahead,
            )
            return Wait("behind", text % {"n": ahead, "queue": queue}, starts)
        if busy:
            text = ngettext(
                "waits for a step that a worker of the queue %(queue)s computes",
                "waits for one of %(n)d steps that workers of the queue %(queue)s compute",
                busy,
            )
            return Wait("busy", text % {"n": busy, "queue": queue}, starts)
        return Wait("soon", _("a worker of the queue %(queue)s takes it in a moment") % {"queue": queue})

    def _start(self, queue: str, before: Sequence[Load], others: Sequence[Load]) -> datetime | None:
        """All work before it, shared among the workers of the queue; None where a part of it was never measured."""
        there = [worker for worker in self.workers if serves(worker, queue) and not worker.trouble]
        parts = [self._seconds(one, queue) for one in before]
        parts += [self._rest(one) for one in others if one.running]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts) or not there:
            return None
        return self.now_at + timedelta(seconds=sum(known) / len(there))

    def _seconds(self, load: Load, queue: str) -> float | None:
        """The waiting steps of a load; of one that has yet to be planned, what its plan is expected to ask for."""
        planned = [step for step in _planned(load) if step_queue(step.kind, load.own_queue, self.light) == queue]
        if planned:
            times = [self._of(step.kind, step.units) for step in planned]
            return None if None in times else sum(time for time in times if time is not None)
        one = self._each(load)
        return None if one is None else one * load.waiting

    def _rest(self, load: Load) -> float | None:
        one = self._each(load)
        if one is None or load.started is None:
            return None
        return load.running * max(0.0, one - (self.now_at - load.started).total_seconds())

    def _each(self, load: Load) -> float | None:
        """Seconds of one step of a load: the mean work of its kind in its job, at the rate measured here."""
        if load.estimate is None:
            return None
        steps = [step for step in Estimate.from_json(load.estimate).steps if step.kind == load.kind]
        return self._of(load.kind, steps[0].units / max(steps[0].count, 1)) if steps else None

    def _of(self, kind: str, units: float) -> float | None:
        rates = [rate for key, rate in self.rates.items() if key[0] == kind]
        return units * rates[0].middle if rates else None


def _planned(load: Load) -> list[StepLoad]:
    """What the plan of a job that waits to be planned is expected to ask for, the plan itself with it."""
    if load.estimate is None or not load.waiting or not load.kind.endswith(".plan"):
        return []
    return list(Estimate.from_json(load.estimate).steps)


def _loads() -> list[Load]:
    """The unfinished steps of unfinished jobs, counted in the database: one row a job, queue and kind."""
    waiting, running = Q(state=StepState.WAITING), Q(state=StepState.RUNNING)
    rows = (
        Step.objects.filter(waiting | running, job__state__in=ACTIVE_JOB_STATES)
        .values("job_id", "job__priority", "job__queue", "queue", "kind")
        .annotate(
            waiting=Count("pk", filter=waiting),
            running=Count("pk", filter=running),
            started=Min("started_at", filter=running),
            paused=Max("not_before", filter=waiting),
            first=Min("index"),
        )
        .order_by("-job__priority", "job_id", "first")
    )
    estimates = dict(Job.objects.filter(state__in=ACTIVE_JOB_STATES).values_list("pk", "estimate"))
    return [
        Load(
            job_id=row["job_id"],
            priority=row["job__priority"],
            own_queue=row["job__queue"],
            queue=row["queue"],
            kind=row["kind"],
            waiting=row["waiting"],
            running=row["running"],
            started=row["started"],
            not_before=row["paused"],
            estimate=estimates.get(row["job_id"]),
        )
        for row in rows
    ]
