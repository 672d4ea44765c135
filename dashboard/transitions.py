"""The lifecycle of a job and its steps as pure functions: what is, and what happened -> what will be, and what to do.

Services write what these functions decide and decide nothing themselves; the model tests ask the same functions under a
clock of their own. Nothing here reads a clock or a database: ``now`` is handed in. What is not allowed raises
:class:`Refused`, and :class:`FenceClosed` where an old attempt tries to write.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum

from django.utils.translation import gettext as _

from dashboard.lifecycle import (
    ATTEMPTS_PER_CAUSE,
    OPEN_STEP_STATES,
    TERMINAL_JOB_STATES,
    AttemptOutcome,
    CancelRequest,
    JobState,
    Refused,
    StepState,
    job_next,
)

DAMAGED = "damaged"
"""The cause of a finished step that has to be done again: its output no longer matches its digest."""
STALLED = "stalled"
"""The code and the cause of an attempt that was killed because nothing moved while its worker was alive."""
CLAIMABLE_JOB_STATES = frozenset({JobState.QUEUED, JobState.RUNNING})


class FenceClosed(Refused):
    """The step has moved on to another attempt, or has ended: nothing that this attempt says is written."""


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """What of a job decides. ``cancel`` is what a person asked for, ``blocked`` why a blocked job waits."""

    state: JobState = JobState.QUEUED
    cancel: str = ""
    blocked: str = ""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What of a step decides. ``attempt`` is the fence; ``causes`` counts how often each cause struck."""

    state: StepState = StepState.WAITING
    attempt: int = 0
    causes: Mapping[str, int] = field(default_factory=dict)
    lease_until: datetime | None = None
    not_before: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptFacts:
    """One claim of a step: the number that it writes under, and how it ended."""

    number: int
    outcome: AttemptOutcome = AttemptOutcome.RUNNING


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How an attempt ended, in what matters here. ``reason`` is what a blocked job waits for."""

    outcome: AttemptOutcome
    code: str = ""
    reason: str = ""

    @property
    def cause(self) -> str:
        """What is counted: each kind of breaking apart, and standing still apart from other kills."""
        apart = {AttemptOutcome.KILLED: STALLED, AttemptOutcome.LOST: DAMAGED}
        return self.code if self.code and apart.get(self.outcome) == self.code else str(self.outcome.value)


class Effect(Enum):
    """What a service does beside writing the new state down."""

    CANCEL_REST = "cancel_rest"  # the steps that are waiting or running are cancelled, and their attempts with them
    PUBLISH = "publish"  # the result is published in this transaction; what came of it goes to `published`
    WAKE = "wake"  # there may be something to claim


@dataclass(frozen=True, kw_only=True)
class Change:
    """What an event makes of a step, its attempt and its job. ``died_of`` is the cause that struck once too often."""

    job: JobFacts
    step: StepFacts
    attempt: AttemptFacts
    effects: tuple[Effect, ...] = ()
    died_of: str = ""


def is_terminal(job: JobFacts) -> bool:
    """Whether the job has ended, for good."""
    return job.state in TERMINAL_JOB_STATES


def holds_fence(step: StepFacts, fence: int) -> bool:
    """Whether the attempt numbered ``fence`` may write to the step: services say the same in the WHERE of a write."""
    return step.state == StepState.RUNNING and step.attempt == fence


def is_lapsed(step: StepFacts, now: datetime) -> bool:
    """Whether the step is held under a lease that ran out."""
    return step.state == StepState.RUNNING and step.lease_until is not None and step.lease_until < now


def claim(job: JobFacts, step: StepFacts, *, inputs_done: bool, now: datetime, lease: timedelta) -> Change:
    """A worker takes a waiting step. One whose lease ran out goes through :func:`lapse` first."""
    if job.state not in CLAIMABLE_JOB_STATES or job.cancel:
        raise Refused(f"no step of a job that is {job.state.value} or cancelled may start")
    if step.state != StepState.WAITING or not inputs_done:
        raise Refused("only a waiting step whose inputs are done may start")
    if step.not_before is not None and step.not_before > now:
        raise Refused("the pause after the last attempt is not over")
    number = step.attempt + 1
    taken = replace(step, state=StepState.RUNNING, attempt=number, lease_until=now + lease, not_before=None)
    state = job.state if job.state == JobState.RUNNING else job_next(job.state, JobState.RUNNING)
    return Change(job=replace(job, state=state), step=taken, attempt=AttemptFacts(number=number))


def heartbeat(step: StepFacts, *, fence: int, now: datetime, lease: timedelta) -> StepFacts:
    """The holder is alive: its lease runs anew. One that lapsed unnoticed is renewed, too."""
    _check_fence(step, fence)
    return replace(step, lease_until=now + lease)


def finish(
    job: JobFacts,
    step: StepFacts,
    others: Collection[StepState],
    ending: Ending,
    *,
    fence: int,
    now: datetime,
    pause: timedelta,
) -> Change:
    """The attempt numbered ``fence`` ended. ``others``: the states of the job's other steps, new ones, too."""
    _check_fence(step, fence)
    match ending.outcome:
        case AttemptOutcome.DONE:
            return _closed(job, step, others, ending, StepState.DONE, wake=True)
        case AttemptOutcome.FAILED:
            return _ended(job, step, ending, StepState.FAILED, JobState.FAILED)
        case AttemptOutcome.CANCELLED:
            return _closed(job, step, others, ending, StepState.CANCELLED if job.cancel else StepState.WAITING)
        case AttemptOutcome.BLOCKED:
            state = job.state if job.state == JobState.BLOCKED else job_next(job.state, JobState.BLOCKED)
            waits = replace(job, state=state, blocked=ending.reason)
            return _closed(waits, step, others, ending, StepState.WAITING, not_before=now + pause)
        case AttemptOutcome.RUNNING:
            raise Refused("an attempt that is still running decides nothing")
        case _:
            return _broke(job, step, others, ending, now=now, pause=pause)


def lapse(job: JobFacts, step: StepFacts, others: Collection[StepState], *, now: datetime) -> Change:
    """The lease of a step ran out: whoever held it is lost, which counts, and the step is free at once."""
    if not is_lapsed(step, now):
        raise Refused("the lease has not run out")
    return _broke(job, step, others, Ending(outcome=AttemptOutcome.LOST), now=now, pause=timedelta())


def release(job: JobFacts, step: StepFacts, others: Collection[StepState], *, fence: int) -> Change:
    """The holder gives the step back because it is asked to end: not counted, the step is not at fault."""
    _check_fence(step, fence)
    return _closed(job, step, others, Ending(outcome=AttemptOutcome.LOST), StepState.WAITING, wake=True)


def reopen(job: JobFacts, step: StepFacts, others: Collection[StepState]) -> Change:
    """The output of a done step was damaged on the disk: it is done again, which counts as a cause of its own."""
    if step.state != StepState.DONE or is_terminal(job):
        raise Refused("only a done step of a job that goes on can be done again")
    return _broke(job, step, others, Ending(outcome=AttemptOutcome.LOST, code=DAMAGED), now=None, pause=timedelta())


def is_repeated(attempt: AttemptFacts, ending: Ending) -> bool:
    """Whether ``ending`` says again how the attempt is known to have ended: the answer to the first time was lost."""
    return attempt.outcome == ending.outcome


def _check_fence(step: StepFacts, fence: int) -> None:
    if not holds_fence(step, fence):
        raise FenceClosed(f"attempt {fence} no longer holds the step: it is {step.state.value}, attempt {step.attempt}")


def _closed(
    job: JobFacts,
    step: StepFacts,
    others: Collection[StepState],
    ending: Ending,
    state: StepState,
    *,
    not_before: datetime | None = None,
    wake: bool = False,
) -> Change:
    """The step leaves its lease for ``state``; what that makes of the job."""
    settled, effects = settle(job, {state, *others})
    return Change(
        job=settled,
        step=replace(step, state=state, lease_until=None, not_before=not_before),
        attempt=AttemptFacts(number=step.attempt, outcome=ending.outcome),
        effects=(*effects, Effect.WAKE) if wake else effects,
    )


def _ended(job: JobFacts, step: StepFacts, ending: Ending, state: StepState, target: JobState) -> Change:
    """The step ended badly, and the job with it."""
    return Change(
        job=replace(job, state=job_next(job.state, target), blocked=""),
        step=replace(step, state=state, lease_until=None, not_before=None),
        attempt=AttemptFacts(number=step.attempt, outcome=ending.outcome),
        effects=(Effect.CANCEL_REST,),
    )


def _broke(
    job: JobFacts,
    step: StepFacts,
    others: Collection[StepState],
    ending: Ending,
    *,
    now: datetime | None,
    pause: timedelta,
) -> Change:
    """Again after a pause that grows, until one cause has struck as often as it may."""
    times = step.causes.get(ending.cause, 0) + 1
    counted = replace(step, causes={**step.causes, ending.cause: times})
    if times >= ATTEMPTS_PER_CAUSE:
        return replace(_ended(job, counted, ending, StepState.DEAD, JobState.DEAD), died_of=ending.cause)
    not_before = now + pause * times if now and pause else None
    return _closed(job, counted, others, ending, StepState.WAITING, not_before=not_before)


def settle(job: JobFacts, states: Collection[StepState]) -> tuple[JobFacts, tuple[Effect, ...]]:
    """A job's state is a function of its steps: complete, it is published; cancelled, it ends with its last step."""
    present = set(states)
    if is_terminal(job):
        return job, ()
    if present == {StepState.DONE}:
        return replace(job, state=job_next(job.state, JobState.VERIFYING), blocked=""), (Effect.PUBLISH,)
    if job.cancel and StepState.RUNNING not in present:
        return replace(job, state=job_next(job.state, JobState.CANCELLED), blocked=""), (Effect.CANCEL_REST,)
    return job, ()


def cancel_rest(step: StepFacts) -> StepFacts:
    """A step of a job that has ended: one that was open is cancelled, and its holder finds the fence closed."""
    is_open = step.state in OPEN_STEP_STATES
    return replace(step, state=StepState.CANCELLED, lease_until=None) if is_open else step


def refuse(job: JobFacts) -> tuple[JobFacts, tuple[Effect, ...]]:
    """The job says no, outside of any attempt: what it stands on is beyond its reach."""
    return replace(job, state=job_next(job.state, JobState.FAILED), blocked=""), (Effect.CANCEL_REST,)


def published(job: JobFacts, *, accepted: bool) -> JobFacts:
    """The result of a job that is being verified was published, or its checks said no."""
    return replace(job, state=job_next(job.state, JobState.SUCCEEDED if accepted else JobState.FAILED))


def cancel(job: JobFacts, states: Collection[StepState], how: str) -> tuple[JobFacts, tuple[Effect, ...]]:
    """A person asks for a stop or a kill. A stop can be raised to a kill, and a kill is not lowered to a stop."""
    if how not in CancelRequest.values:
        raise Refused(_("a job is either stopped or killed"))
    if is_terminal(job):
        raise Refused(_("the job has ended already: %(state)s") % {"state": job.state.label})
    if job.cancel in (how, CancelRequest.KILL):
        return job, ()
    return settle(replace(job, cancel=how), states)


def resume(job: JobFacts, steps: Collection[StepFacts], *, has_room: bool, now: datetime) -> JobFacts:
    """What a blocked job waited for is there, and the pause of its steps is over: it goes on."""
    if job.state != JobState.BLOCKED or not has_room:
        raise Refused("only a blocked job goes on, and only when there is room")
    if any(step.state == StepState.WAITING and step.not_before is not None and step.not_before > now for step in steps):
        raise Refused("the pause after the last attempt is not over")
    is_held = any(step.state == StepState.RUNNING for step in steps)
    return replace(job, state=job_next(job.state, JobState.RUNNING if is_held else JobState.QUEUED), blocked="")


def progress_limit(typical_seconds: float | None, *, factor: float, least_seconds: float) -> float:
    """How long a step may stand still while its worker is alive: by what steps of its kind take, and never less."""
    return max(least_seconds, factor * typical_seconds) if typical_seconds is not None else least_seconds


def has_stalled(quiet_seconds: float, limit_seconds: float) -> bool:
    """Whether a step that has not moved for so long is to be killed, although its lease is alive."""
    return quiet_seconds > limit_seconds
