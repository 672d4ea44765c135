"""The worker's side of a job: claim a step, keep its lease, finish it under its fence.

A lease says who computes, by the database's clock. The fence (``attempt``) says who may write: one number per claim,
never reset, in the WHERE of every later write. Whoever changes a job's steps holds the job's row lock first; a worker
that looks for work passes over jobs that somebody else holds. ``dashboard.transitions`` decides, here it becomes rows.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.models import DateTimeField, ExpressionWrapper, Func, Value
from django.db.models.expressions import Combinable
from django.utils import timezone

from compression_worker.contracts import PlannedStep, StepSpec
from compression_worker.faults import failpoint
from compression_worker.launcher import Outcome
from dashboard import transitions
from dashboard.lifecycle import AttemptOutcome, BlockedReason, JobState, StepState
from dashboard.models import Attempt, Job, Step
from dashboard.services.attempts import (
    facts_of,
    inputs_reopen,
    leases_return,
    other_states,
    step_apply,
    step_facts,
    step_job_apply,
)
from dashboard.services.endings import job_apply, job_facts
from dashboard.services.logs import without_nul
from dashboard.services.ordering import steps_insert
from dashboard.services.units import persist, recorded, unit_of_work
from dashboard.transitions import AttemptFacts, Ending, JobFacts

CLAIM_ROUNDS = 40
"""How often a worker looks again when what it wanted was taken or held by somebody else just then."""
LONGEST_LOOK_AWAY = 0.05


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


NEXT = """
    SELECT * FROM step_next(%(queues)s::text[], %(held)s::bigint[])
    ORDER BY priority DESC, job_id, index LIMIT 1
"""
"""The step to do next, with all that a claim needs to know; jobs that are ``held`` are passed over. Nothing is locked:
what was seen is compared again when the claim is written."""

TAKE = """
    WITH answer AS MATERIALIZED (
      SELECT * FROM step_take(%(job)s, %(job_seen)s, %(job_state)s, %(step)s, %(seen)s, %(attempt)s, %(state)s,
        %(worker)s, %(lease_until)s, %(not_before)s, %(key)s, %(now)s)
    )
    SELECT is_free, is_taken, output FROM answer
"""
"""The claim: one statement, one transaction. It waits for nobody: a job that somebody holds is not free, and a step
that moved on since it was seen is not taken. ``output`` is that of a done step with the same key."""


def step_claim(*, worker: str, queues: list[str]) -> Claim | None:
    """The next ready step of ``queues``, leased to ``worker``; None when there is none."""
    held: list[int] = []
    for round_ in range(CLAIM_ROUNDS):
        row = _row(NEXT, {"queues": queues, "held": held})
        if row is None:
            if not held:
                return None
            held.clear()
            time.sleep(min(LONGEST_LOOK_AWAY, 0.001 * 2**round_) * random.uniform(0.5, 1.0))
        elif row["state"] == StepState.RUNNING:
            if not _leases_return(row["job_id"]):
                held.append(row["job_id"])
        else:
            failpoint("claim.found")
            taken = _take(row, worker)
            if isinstance(taken, Claim):
                failpoint("claim.committed")
                return taken
            if not taken:
                held.append(row["job_id"])
    return None


def ready_step(queues: list[str]) -> tuple[int, int] | None:
    """(step, job) of what would be claimed next. Only a hint, soon outdated."""
    row = _row(NEXT, {"queues": queues, "held": []})
    return None if row is None else (row["step_id"], row["job_id"])


@unit_of_work
def _leases_return(job_id: int) -> bool:
    """Put right what a lost worker left behind in the job; False when somebody else holds it just now."""
    job = Job.objects.select_for_update(no_key=True, skip_locked=True).filter(pk=job_id).first()
    if job is None:
        return False
    with recorded(actor=None, reason="a lease ran out"):
        leases_return(job)
    return True


def _take(row: dict[str, Any], worker: str) -> Claim | bool:
    """The claim; without one, whether the job was free, so that it is worth looking at again."""
    inputs: dict[str, str] = json.loads(row["inputs"] or "{}")
    spec = StepSpec(kind=row["kind"], params=json.loads(row["params"]), inputs=inputs, seed=row["seed"])
    change = transitions.claim(
        JobFacts(state=JobState(row["job_state"]), cancel=row["cancel_requested"], blocked=row["blocked_reason"]),
        facts_of(row["state"], row["attempt"], json.loads(row["causes"]), row["lease_until"], row["not_before"]),
        inputs_done=None not in inputs.values(),
        now=row["now"],
        lease=timedelta(seconds=settings.LEASE_SECONDS),
    )
    written = {
        "step": row["step_id"],
        "job": row["job_id"],
        "seen": row["attempt"],
        "job_seen": row["job_state"],
        "worker": worker,
        "key": spec.key,
        "now": row["now"],
        "attempt": change.attempt.number,
        "state": str(change.step.state),
        "lease_until": change.step.lease_until,
        "not_before": change.step.not_before,
        "job_state": str(change.job.state),
    }
    with recorded(actor=None, reason=f"claimed by {worker}"):
        taken = _row(TAKE, written)
    if taken is None or not taken["is_taken"]:
        return bool(taken and taken["is_free"])
    return Claim(
        step_id=row["step_id"],
        job_id=row["job_id"],
        attempt=change.attempt.number,
        name=row["name"],
        spec=spec,
        cached=taken["output"] or "",
    )


def _row(query: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """The one row of a statement that is a transaction of its own; said again when the database was away."""

    def run() -> dict[str, Any] | None:
        with connection.cursor() as cursor:
            cursor.execute(query, values)
            row = cursor.fetchone()
            return None if row is None else dict(zip((column.name for column in cursor.description), row, strict=True))

    return run() if connection.in_atomic_block else persist(run)


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
    failpoint("heartbeat.write")
    return step_watch(claim=claim)


def step_watch(*, claim: Claim) -> str:
    """One cheap look, each second: still ours, and what did a person ask for?"""
    asked: str | None = _held(claim).values_list("job__cancel_requested", flat=True).first()
    if asked is None:
        raise LeaseLost(f"step {claim.step_id} is no longer held by attempt {claim.attempt}")
    return asked


def _held(claim: Claim) -> Any:
    """The step, if the fence still lets this claim write: :func:`transitions.holds_fence` as a WHERE."""
    return Step.objects.filter(pk=claim.step_id, attempt=claim.attempt, state=StepState.RUNNING)


def _locked(claim: Claim) -> tuple[Job, Step]:
    """The claim's job and step, locked in this order; raises :class:`LeaseLost` when the claim no longer holds."""
    job = Job.objects.select_for_update(no_key=True).filter(pk=claim.job_id).first()
    step = _held(claim).select_for_update(no_key=True).first()
    if job is None or step is None:
        raise LeaseLost(f"step {claim.step_id} is no longer held by attempt {claim.attempt}")
    return job, step


@unit_of_work
def step_finish(*, claim: Claim, outcome: Outcome) -> None:
    """Write down how the attempt ended, and what that makes of the step and the job: all of it, or nothing.

    Raises :class:`LeaseLost` when the claim no longer holds. Calling again after a commit whose answer was lost is
    harmless.
    """
    failpoint("finish.begin")
    if outcome.kind == "damaged":
        _give_back(claim, outcome)
        return
    ending = _ending(outcome)
    try:
        job, step = _locked(claim)
    except LeaseLost:
        if _is_repeated(claim, ending):
            return
        raise
    planned = [PlannedStep(**value) for value in outcome.steps]
    others = other_states(step) | ({StepState.WAITING} if planned else set())
    change = transitions.finish(
        job_facts(job),
        step_facts(step),
        others,
        ending,
        fence=claim.attempt,
        now=timezone.now(),
        pause=timedelta(seconds=settings.RETRY_SECONDS),
    )
    with recorded(actor=None, reason=f"{step.name}: {outcome.kind}"):
        detail = "\n".join(part for part in (outcome.message, outcome.detail) if part)
        step_apply(step, change, detail, _result(outcome) if ending.outcome == AttemptOutcome.DONE else {})
        failpoint("finish.step")
        if planned:
            steps_insert(job=job, planned=planned)
            failpoint("finish.planned")
        step_job_apply(job, step, change, outcome)
        failpoint("finish.commit")


def _give_back(claim: Claim, outcome: Outcome) -> None:
    """What the step was to be computed from is damaged: it waits until that was made again."""
    job, step = _locked(claim)
    with recorded(actor=None, reason=f"{step.name}: {outcome.message}"):
        change = transitions.release(job_facts(job), step_facts(step), other_states(step), fence=claim.attempt)
        step_apply(step, change, outcome.message, {})
        job_apply(job, change.job, change.effects)
        if not job.is_terminal and not inputs_reopen(job, step, outcome.inputs):
            job_apply(job, *transitions.refuse(job_facts(job)), code="damaged_blob", message=_beyond_repair(outcome))


def _beyond_repair(outcome: Outcome) -> str:
    return f"{outcome.message}: no step of this job can make that again; import it again or restore it from a backup"


def _ending(outcome: Outcome) -> Ending:
    kind = AttemptOutcome(outcome.kind)
    known = outcome.code in BlockedReason.values
    reason = (outcome.code if known else BlockedReason.DISK.value) if kind == AttemptOutcome.BLOCKED else ""
    return Ending(outcome=kind, code=outcome.code, reason=reason)


def _is_repeated(claim: Claim, ending: Ending) -> bool:
    ended = Attempt.objects.filter(step_id=claim.step_id, number=claim.attempt).values_list("outcome", flat=True)
    known = [AttemptFacts(number=claim.attempt, outcome=AttemptOutcome(outcome)) for outcome in ended]
    return any(transitions.is_repeated(attempt, ending) for attempt in known)


def _result(outcome: Outcome) -> dict[str, Any]:
    measured = {"measured": dict(outcome.measured)} if outcome.measured else {}
    return {"output": outcome.output, "data": storable(outcome.data | measured), "reused": outcome.reused}


@unit_of_work
def step_release(*, claim: Claim, detail: str) -> None:
    """Give the step back without counting the attempt: its worker is asked to end, the step is not at fault."""
    job, step = _locked(claim)
    change = transitions.release(job_facts(job), step_facts(step), other_states(step), fence=claim.attempt)
    with recorded(actor=None, reason=detail):
        step_apply(step, change, detail, {})
        job_apply(job, change.job, change.effects)


def storable(value: Any) -> Any:
    """``value`` as Postgres takes it in a JSON column: no NUL in a text, no NaN or infinity as a number."""
    if isinstance(value, dict):
        return {without_nul(key): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return without_nul(value) if isinstance(value, str) else value
