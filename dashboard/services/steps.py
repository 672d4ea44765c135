"""The worker's side of a job: claim a step, keep its lease, finish it under its fence.

A lease says who computes, by the database's clock. The fence (``attempt``) says who may write: one number per claim,
never reset, in the WHERE of every later write. Whoever changes a job's steps holds the job's row lock first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from signal import Signals
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.models import DateTimeField, ExpressionWrapper, F, Func, Q, Value
from django.db.models.expressions import Combinable
from django.utils import timezone

from compression_worker.contracts import PlannedStep, StepSpec
from compression_worker.launcher import Outcome
from dashboard.lifecycle import (
    ATTEMPTS_PER_CAUSE,
    AttemptOutcome,
    BlockedReason,
    JobState,
    StepState,
    step_after_attempt,
)
from dashboard.models import Attempt, Job, Step
from dashboard.services.endings import cancel_rest, job_end, job_move, job_succeed
from dashboard.services.logs import without_nul
from dashboard.services.ordering import steps_insert, wake_waiting
from dashboard.services.units import recorded, unit_of_work

CLAIM_ROUNDS = 20


class LeaseLost(Exception):
    """Somebody else holds the step now, or the job ended: nothing that this claim computed may be written."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A step held by a worker. ``attempt`` is the fence; ``cached`` the output of a done step with the same key."""

    step_id: int
    job_id: int
    attempt: int
    name: str
    spec: StepSpec
    cached: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int = 0
    total: int = 0
    unit: str = ""


NEXT_READY = """
    SELECT s.id, s.job_id
    FROM dashboard_step s JOIN dashboard_job j ON j.id = s.job_id
    WHERE j.state IN ('queued', 'running') AND j.cancel_requested = '' AND s.queue = ANY(%(queues)s)
      AND (%(job)s::bigint IS NULL OR j.id = %(job)s)
      AND (
        (s.state = 'running' AND s.lease_until < clock_timestamp())
        OR (
          s.state = 'waiting' AND (s.not_before IS NULL OR s.not_before <= clock_timestamp())
          AND NOT EXISTS (
            SELECT 1 FROM jsonb_each_text(s.inputs) needed
            WHERE needed.value LIKE '@%%' AND NOT EXISTS (
              SELECT 1 FROM dashboard_step d
              WHERE d.job_id = s.job_id AND '@' || d.index = needed.value AND d.state = 'done'
            )
          )
        )
      )
    ORDER BY j.priority DESC, j.id, s.index
    LIMIT 1
"""
"""The step to do next. A running one whose lease lapsed counts: its claimer is gone."""


def step_claim(*, worker: str, queues: list[str]) -> Claim | None:
    """The next ready step of ``queues``, leased to ``worker``; None when there is none."""
    for _round in range(CLAIM_ROUNDS):
        candidate = ready_step(queues)
        if candidate is None:
            return None
        claim = _claim_in_job(candidate[1], worker, queues)
        if claim is not None:
            return claim
    return None


def ready_step(queues: list[str], job_id: int | None = None, *, lock: bool = False) -> tuple[int, int] | None:
    """(step, job) of what would be claimed next. Without ``lock`` it is only a hint, soon outdated."""
    with connection.cursor() as cursor:
        suffix = "FOR UPDATE OF s SKIP LOCKED" if lock else ""
        cursor.execute(NEXT_READY + suffix, {"queues": queues, "job": job_id})
        row: tuple[int, int] | None = cursor.fetchone()
    return row


@unit_of_work
def _claim_in_job(job_id: int, worker: str, queues: list[str]) -> Claim | None:
    with recorded(actor=None, reason=f"claimed by {worker}"):
        job = _locked_job(job_id)
        if job is None:
            return None
        leases_return(job)
        found = ready_step(queues, job_id, lock=True)
        return None if found is None else _take(Step.objects.get(pk=found[0]), job, worker)


def _locked_job(job_id: int) -> Job | None:
    """The job, locked until the transaction ends; None when somebody removed it."""
    return Job.objects.select_for_update(no_key=True).filter(pk=job_id).first()


def _take(step: Step, job: Job, worker: str) -> Claim:
    spec = StepSpec(kind=step.kind, params=step.params, inputs=_resolved(step), seed=step.seed)
    now = timezone.now()
    Step.objects.filter(pk=step.pk).update(
        state=StepState.RUNNING,
        attempt=F("attempt") + 1,
        owner=worker,
        lease_until=_lease_end(),
        not_before=None,
        key=spec.key,
        progress_done=0,
        progress_total=0,
        progress_unit="",
        progress_at=None,
        started_at=now,
        finished_at=None,
    )
    step.refresh_from_db(fields=["attempt"])
    Attempt.objects.create(step=step, number=step.attempt, worker=worker, started_at=now)
    if job.state != JobState.RUNNING:
        job_move(job, JobState.RUNNING)
    cached = Step.objects.filter(key=spec.key, state=StepState.DONE).order_by("-id").values_list("output", flat=True)
    return Claim(
        step_id=step.pk,
        job_id=job.pk,
        attempt=step.attempt,
        name=step.name,
        spec=spec,
        cached=cached.first() or "",
    )


def _resolved(step: Step) -> dict[str, str]:
    """The step's inputs as digests: ``@N`` becomes the output of the job's step N, which is done by now."""
    outputs = dict(Step.objects.filter(job_id=step.job_id, state=StepState.DONE).values_list("index", "output"))
    return {name: outputs[int(value[1:])] if value.startswith("@") else value for name, value in step.inputs.items()}


def _lease_end() -> Combinable:
    """By the database's clock: a worker whose clock is wrong neither loses nor keeps a lease by it."""
    now = Func(function="clock_timestamp", output_field=DateTimeField())
    return ExpressionWrapper(now + Value(timedelta(seconds=settings.LEASE_SECONDS)), output_field=DateTimeField())


@unit_of_work
def step_heartbeat(*, claim: Claim, progress: Progress) -> str:
    """Renew the lease and store the progress; says what a person asked for: ``""``, ``"stop"`` or ``"kill"``."""
    renewed = _held(claim).update(
        lease_until=_lease_end(),
        progress_done=progress.done,
        progress_total=progress.total,
        progress_unit=progress.unit[:16],
        progress_at=timezone.now(),
    )
    if not renewed:
        raise LeaseLost(f"step {claim.step_id} is no longer held by attempt {claim.attempt}")
    return step_watch(claim=claim)


def step_watch(*, claim: Claim) -> str:
    """One cheap look, each second: still ours, and what did a person ask for?"""
    asked: str | None = _held(claim).values_list("job__cancel_requested", flat=True).first()
    if asked is None:
        raise LeaseLost(f"step {claim.step_id} is no longer held by attempt {claim.attempt}")
    return asked


def _held(claim: Claim) -> Any:
    """The step, if the fence still lets this claim write."""
    return Step.objects.filter(pk=claim.step_id, attempt=claim.attempt, state=StepState.RUNNING)


@unit_of_work
def step_finish(*, claim: Claim, outcome: Outcome) -> None:
    """Write down how the attempt ended, and what that makes of the step and the job: all of it, or nothing.

    Raises :class:`LeaseLost` when the claim no longer holds. Calling again after a commit whose answer was lost is
    harmless.
    """
    job, step = _locked_job(claim.job_id), _held(claim).select_for_update().first()
    if job is None or step is None:
        if _finished_before(claim, outcome):
            return
        raise LeaseLost(f"step {claim.step_id} is no longer held by attempt {claim.attempt}")
    with recorded(actor=None, reason=f"{step.name}: {outcome.kind}"):
        _write_ending(job, step, outcome)


def _finished_before(claim: Claim, outcome: Outcome) -> bool:
    ended = Attempt.objects.filter(step_id=claim.step_id, number=claim.attempt).values_list("outcome", flat=True)
    return ended.first() == outcome.kind


def _write_ending(job: Job, step: Step, outcome: Outcome) -> None:
    kind = AttemptOutcome(outcome.kind)
    attempt_end(step, kind, "\n".join(part for part in (outcome.message, outcome.detail) if part))
    match kind:
        case AttemptOutcome.DONE:
            _done(job, step, outcome)
        case AttemptOutcome.FAILED:
            _close(step, StepState.FAILED)
            job_end(job, JobState.FAILED, code=outcome.code, message=outcome.message)
        case AttemptOutcome.BLOCKED:
            _blocked(job, step)
        case AttemptOutcome.CANCELLED:
            _close(step, StepState.CANCELLED if job.cancel_requested else StepState.WAITING)
        case _:
            _broke(job, step, kind, outcome.message, outcome.signal)
    job_settle(job)


def attempt_end(step: Step, kind: AttemptOutcome, detail: str) -> None:
    """Close the attempt that holds the step."""
    Attempt.objects.filter(step=step, number=step.attempt).update(
        outcome=kind, detail=detail.replace("\0", "")[:20_000], finished_at=timezone.now()
    )


def _done(job: Job, step: Step, outcome: Outcome) -> None:
    _close(
        step,
        StepState.DONE,
        output=outcome.output,
        data=storable(outcome.data | ({"measured": outcome.measured} if outcome.measured else {})),
        reused=outcome.reused,
    )
    planned = [PlannedStep(**value) for value in outcome.steps]
    if planned:
        steps_insert(job=job, planned=planned)
    wake_waiting(job)


def _blocked(job: Job, step: Step) -> None:
    """No room on the disk: given back without counting. The reconciler goes on with it when there is room again."""
    _close(step, StepState.WAITING, not_before=timezone.now() + timedelta(seconds=settings.RETRY_SECONDS))
    if job.state != JobState.BLOCKED:
        job_move(job, JobState.BLOCKED, blocked_reason=BlockedReason.DISK)


def _broke(job: Job, step: Step, kind: AttemptOutcome, message: str, signal: int | None = None) -> None:
    """The code broke, a signal ended it, or its worker is gone: again after a pause, until one cause struck thrice."""
    times = step.causes.get(kind, 0) + 1
    state = step_after_attempt(kind, times)
    pause = timedelta(seconds=settings.RETRY_SECONDS * times) if kind != AttemptOutcome.LOST else timedelta()
    waits_until = timezone.now() + pause if state == StepState.WAITING else None
    _close(step, state, causes=step.causes | {str(kind): times}, not_before=waits_until)
    if state == StepState.DEAD:
        job_end(job, JobState.DEAD, code=str(kind), message=_death_notice(step, kind, message, signal))


def _death_notice(step: Step, kind: AttemptOutcome, message: str, signal: int | None) -> str:
    how = {
        AttemptOutcome.KILLED: f"was killed by {_signal_name(signal)}",
        AttemptOutcome.LOST: "was lost with its worker",
    }.get(kind, "broke")
    last = f"; the last time: {message}" if message else ""
    return f"step '{step.name}' {how} {ATTEMPTS_PER_CAUSE} times{last}"


def _signal_name(signal: int | None) -> str:
    try:
        return f"signal {signal} ({Signals(signal).name})" if signal else "a signal"
    except ValueError:
        return f"signal {signal}"


def _close(step: Step, state: StepState, **values: Any) -> None:
    """Take the step out of its lease. A step that waits again has no end yet."""
    ended = None if state == StepState.WAITING else timezone.now()
    for name, value in (values | {"state": state, "owner": "", "lease_until": None, "finished_at": ended}).items():
        setattr(step, name, value)
    step.save()


@unit_of_work
def step_release(*, claim: Claim, detail: str) -> None:
    """Give the step back without counting the attempt: its worker is asked to end, the step is not at fault."""
    job, step = _locked_job(claim.job_id), _held(claim).select_for_update().first()
    if job is None or step is None:
        raise LeaseLost(f"step {claim.step_id} is no longer held by attempt {claim.attempt}")
    with recorded(actor=None, reason=detail):
        attempt_end(step, AttemptOutcome.LOST, detail)
        _close(step, StepState.WAITING)
        job_settle(job)
        wake_waiting(job)


def leases_return(job: Job) -> int:
    """End the attempts of ``job`` (locked by the caller) whose lease ran out; returns how many there were."""
    lapsed = Step.objects.filter(Q(lease_until__lt=Func(function="clock_timestamp")), job=job, state=StepState.RUNNING)
    steps = list(lapsed.select_for_update(skip_locked=True).order_by("index"))
    for step in steps:
        detail = f"the lease of {step.owner} ran out"
        attempt_end(step, AttemptOutcome.LOST, detail)
        _broke(job, step, AttemptOutcome.LOST, detail)
    if steps:
        job_settle(job)
    return len(steps)


def job_settle(job: Job) -> None:
    """A job's state is a function of its steps: end what was cancelled and publish what is complete."""
    if job.is_terminal:
        return
    states = set(job.steps.values_list("state", flat=True))
    if job.cancel_requested and StepState.RUNNING not in states and states != {StepState.DONE}:
        cancel_rest(job)
        job_end(job, JobState.CANCELLED)
    elif states == {StepState.DONE}:
        job_succeed(job)


def storable(value: Any) -> Any:
    """``value`` as Postgres takes it in a JSON column: no NUL in a text, no NaN or infinity as a number."""
    if isinstance(value, dict):
        return {without_nul(key): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return without_nul(value) if isinstance(value, str) else value
