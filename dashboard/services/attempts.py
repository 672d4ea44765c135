"""What an ended attempt makes of its step and its job, as rows. The caller holds the job's row lock."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from signal import Signals
from typing import Any

from django.db.models import DateTimeField, Func, Q
from django.utils import timezone

from compression_worker.faults import failpoint
from compression_worker.launcher import Outcome
from dashboard import transitions
from dashboard.lifecycle import ATTEMPTS_PER_CAUSE, AttemptOutcome, StepState
from dashboard.models import Attempt, Job, Step
from dashboard.services.endings import job_apply, job_facts
from dashboard.transitions import Change, FenceClosed, StepFacts


def step_facts(step: Step) -> StepFacts:
    """What of the row decides."""
    return facts_of(step.state, step.attempt, step.causes, step.lease_until, step.not_before)


def facts_of(
    state: str, attempt: int, causes: dict[str, int], lease_until: datetime | None, not_before: datetime | None
) -> StepFacts:
    """What of a step decides, from the columns that hold it."""
    return StepFacts(
        state=StepState(state), attempt=attempt, causes=causes, lease_until=lease_until, not_before=not_before
    )


def other_states(step: Step) -> set[StepState]:
    """The states in which the other steps of its job are."""
    others = Step.objects.filter(job_id=step.job_id).exclude(pk=step.pk).order_by()
    return {StepState(state) for state in others.values_list("state", flat=True).distinct()}


def step_apply(
    step: Step, change: Change, detail: str, result: dict[str, Any], *, before: StepState = StepState.RUNNING
) -> None:
    """Close the attempt and take the step out of its lease. A step that waits again has no end yet."""
    now = timezone.now()
    ended = Attempt.objects.filter(step=step, number=change.attempt.number)
    ended.update(outcome=change.attempt.outcome, detail=detail.replace("\0", "")[:20_000], finished_at=now)
    failpoint("finish.attempt")
    written = Step.objects.filter(pk=step.pk, attempt=step.attempt, state=before).update(
        state=change.step.state,
        causes=dict(change.step.causes),
        lease_until=change.step.lease_until,
        not_before=change.step.not_before,
        owner="",
        finished_at=None if change.step.state == StepState.WAITING else now,
        **result,
    )
    if not written:
        raise FenceClosed(f"step {step.pk} is no longer held by attempt {step.attempt}")


def step_job_apply(job: Job, step: Step, change: Change, outcome: Outcome) -> None:
    """What the ended attempt makes of the job, with what to tell the person."""
    code, message = "", ""
    if change.died_of:
        code, message = change.died_of, _death_notice(step, change.died_of, outcome.message, outcome.signal)
    elif change.attempt.outcome == AttemptOutcome.FAILED:
        code, message = outcome.code, outcome.message
    job_apply(job, change.job, change.effects, code=code, message=message)


def _death_notice(step: Step, cause: str, message: str, signal: int) -> str:
    how = {
        AttemptOutcome.KILLED: f"was killed by {_signal_name(signal)}",
        AttemptOutcome.LOST: "was lost with its worker",
        transitions.DAMAGED: "lost its output to damage on the disk",
        transitions.STALLED: "stood still and was killed",
    }.get(cause, "broke")
    last = f"; the last time: {message}" if message else ""
    return f"step '{step.name}' {how} {ATTEMPTS_PER_CAUSE} times{last}"


def _signal_name(signal: int) -> str:
    try:
        return f"signal {signal} ({Signals(signal).name})" if signal else "a signal"
    except ValueError:
        return f"signal {signal}"


def leases_return(job: Job) -> int:
    """End the attempts of ``job`` (locked by the caller) whose lease ran out; returns how many there were."""
    lapsed = Step.objects.filter(Q(lease_until__lt=_clock()), job=job, state=StepState.RUNNING)
    steps = list(lapsed.annotate(now=_clock()).select_for_update(skip_locked=True, no_key=True).order_by("index"))
    for count, step in enumerate(steps):
        if job.is_terminal:  # the step before was the end of the job, and of this attempt, too
            return count
        detail = f"the lease of {step.owner} ran out"
        change = transitions.lapse(job_facts(job), step_facts(step), other_states(step), now=step.now)
        step_apply(step, change, detail, {})
        step_job_apply(job, step, change, Outcome(kind="errored", message=detail))
        failpoint("lapse.return")
    return len(steps)


def inputs_reopen(job: Job, step: Step, names: Collection[str]) -> bool:
    """Do the steps again whose outputs ``step`` found damaged as its inputs ``names``; whoever needs them waits.

    False when one of them is no output of a step of this job. A step that somebody reopened before is left alone.
    """
    given = [step.inputs.get(name, "") for name in names]
    if not all(value.startswith("@") for value in given):
        return False
    indices = sorted({int(value[1:]) for value in given})
    for source in Step.objects.select_for_update(no_key=True).filter(job=job, index__in=indices, state=StepState.DONE):
        if job.is_terminal:
            break
        change = transitions.reopen(job_facts(job), step_facts(source), other_states(source))
        detail = "its output no longer matches its digest: the disk changed it"
        step_apply(source, change, detail, {"output": "", "key": ""}, before=StepState.DONE)
        step_job_apply(job, source, change, Outcome(kind="errored", message=detail))
    return True


def _clock() -> Func:
    return Func(function="clock_timestamp", output_field=DateTimeField())
