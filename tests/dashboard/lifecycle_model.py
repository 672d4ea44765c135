"""Jobs, steps and attempts in memory, moved by nothing but ``dashboard.transitions``, under a clock that a test turns.

This is the product without its database: the same decisions, kept in lists. The machine of ``lifecycle_machine`` plays
with it; on Postgres the services play the same game beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from dashboard import transitions
from dashboard.lifecycle import ACTIVE_JOB_STATES, AttemptOutcome, BlockedReason, JobState, Refused, StepState
from dashboard.transitions import AttemptFacts, Change, Effect, Ending, FenceClosed, JobFacts, StepFacts

UNIT = timedelta(seconds=1_000)
"""Time moves in whole units, and neither lease nor pause is a whole number of them: no event falls on an edge."""
LEASE = timedelta(seconds=2_500)
PAUSE = timedelta(seconds=1_300)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will be: the inputs of each step after its plan, and whether its result stands the last check."""

    needs: tuple[frozenset[int], ...] = ()
    priority: int = 0
    good: bool = True


@dataclass(frozen=True)
class Token:
    """What a worker holds after a claim, and goes on holding when it should not."""

    job: int
    step: int
    attempt: int


@dataclass
class ModelStep:
    needs: frozenset[int] = frozenset()
    facts: StepFacts = field(default_factory=StepFacts)
    attempts: dict[int, AttemptOutcome] = field(default_factory=dict)

    def note(self, attempt: AttemptFacts) -> None:
        self.attempts[attempt.number] = attempt.outcome


@dataclass
class ModelJob:
    plan: Plan
    facts: JobFacts = field(default_factory=JobFacts)
    steps: list[ModelStep] = field(default_factory=lambda: [ModelStep()])
    publishes: int = 0

    @property
    def states(self) -> set[StepState]:
        return {step.facts.state for step in self.steps}

    def others(self, at: int) -> set[StepState]:
        return {step.facts.state for number, step in enumerate(self.steps) if number != at}

    def planned(self) -> list[ModelStep]:
        """The steps that the first one asks for; ``0`` of their needs is the first of them."""
        return [ModelStep(needs=frozenset(need + 1 for need in needs)) for needs in self.plan.needs]

    def snapshot(self) -> tuple[object, ...]:
        return self.facts, *((step.facts, tuple(step.attempts.items())) for step in self.steps)


class World:
    """All jobs, and the time."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.jobs: list[ModelJob] = []

    def submit(self, plan: Plan) -> int:
        self.jobs.append(ModelJob(plan))
        return len(self.jobs) - 1

    def advance(self, units: int) -> None:
        self.now += UNIT * units

    def claim(self) -> Token | None:
        """What a worker that looks for work gets: the first ready step of the most urgent job."""
        for number in self._by_urgency():
            job = self.jobs[number]
            at = self._ready(job)
            while at is not None and transitions.is_lapsed(job.steps[at].facts, self.now):
                self._lapse(job)
                at = self._ready(job)
            if at is not None:
                return self._take(number, at)
        return None

    def _by_urgency(self) -> list[int]:
        return sorted(range(len(self.jobs)), key=lambda number: (-self.jobs[number].plan.priority, number))

    def _ready(self, job: ModelJob) -> int | None:
        """The first step that :func:`transitions.claim` lets start, or whose lease lapsed."""
        for at, step in enumerate(job.steps):
            is_lost = transitions.is_lapsed(step.facts, self.now)
            if is_lost and job.facts.state in transitions.CLAIMABLE_JOB_STATES and not job.facts.cancel:
                return at
            if step.facts.state == StepState.WAITING and self._claimed(job, step) is not None:
                return at
        return None

    def _claimed(self, job: ModelJob, step: ModelStep) -> Change | None:
        done = all(job.steps[need].facts.state == StepState.DONE for need in step.needs)
        try:
            return transitions.claim(job.facts, step.facts, inputs_done=done, now=self.now, lease=LEASE)
        except Refused:
            return None

    def _take(self, number: int, at: int) -> Token:
        job = self.jobs[number]
        change = self._claimed(job, job.steps[at])
        assert change is not None
        self._apply(job, at, change)
        return Token(number, at, change.attempt.number)

    def heartbeat(self, token: Token) -> bool:
        """Whether the lease was renewed."""
        step = self.jobs[token.job].steps[token.step]
        try:
            step.facts = transitions.heartbeat(step.facts, fence=token.attempt, now=self.now, lease=LEASE)
        except FenceClosed:
            return False
        return True

    def finish(self, token: Token, ending: Ending) -> str:
        """``written``, ``repeated`` (known already) or ``refused``."""
        job = self.jobs[token.job]
        step = job.steps[token.step]
        plans = token.step == 0 and ending.outcome == AttemptOutcome.DONE
        planned = job.planned() if plans else []
        others = job.others(token.step) | ({StepState.WAITING} if planned else set())
        try:
            change = transitions.finish(
                job.facts, step.facts, others, ending, fence=token.attempt, now=self.now, pause=PAUSE
            )
        except FenceClosed:
            attempt = AttemptFacts(number=token.attempt, outcome=step.attempts[token.attempt])
            return "repeated" if transitions.is_repeated(attempt, ending) else "refused"
        self._apply(job, token.step, change, planned)
        return "written"

    def release(self, token: Token) -> bool:
        """Whether the step could be given back."""
        job = self.jobs[token.job]
        step = job.steps[token.step]
        try:
            change = transitions.release(job.facts, step.facts, job.others(token.step), fence=token.attempt)
        except FenceClosed:
            return False
        self._apply(job, token.step, change)
        return True

    def cancel(self, number: int, how: str) -> bool:
        """Whether a person's wish was taken."""
        job = self.jobs[number]
        try:
            facts, effects = transitions.cancel(job.facts, job.states, how)
        except Refused:
            return False
        self._settle(job, facts, effects)
        return True

    def reconcile(self, *, has_room: bool) -> None:
        """What is put right every few seconds."""
        for job in self.jobs:
            self._lapse(job)
        for job in self.jobs:
            if job.facts.state == JobState.RUNNING and job.facts.cancel:
                self._settle(job, *transitions.settle(job.facts, job.states))
        for job in self.jobs:
            steps = [step.facts for step in job.steps]
            try:
                job.facts = transitions.resume(job.facts, steps, has_room=has_room, now=self.now)
            except Refused:
                continue

    def _lapse(self, job: ModelJob) -> None:
        lapsed = [at for at, step in enumerate(job.steps) if transitions.is_lapsed(step.facts, self.now)]
        for at in lapsed:
            if transitions.is_terminal(job.facts):
                return
            self._apply(job, at, transitions.lapse(job.facts, job.steps[at].facts, job.others(at), now=self.now))

    def _apply(self, job: ModelJob, at: int, change: Change, planned: Collection[ModelStep] = ()) -> None:
        job.steps[at].facts = change.step
        job.steps[at].note(change.attempt)
        job.steps.extend(planned)
        self._settle(job, change.job, change.effects)

    def _settle(self, job: ModelJob, facts: JobFacts, effects: Collection[Effect]) -> None:
        if Effect.CANCEL_REST in effects:
            for step in job.steps:
                if step.facts.state == StepState.RUNNING:
                    step.note(AttemptFacts(number=step.facts.attempt, outcome=AttemptOutcome.CANCELLED))
                step.facts = transitions.cancel_rest(step.facts)
        job.facts = facts
        if Effect.PUBLISH in effects:
            job.publishes += 1
            self._settle(job, transitions.published(facts, accepted=job.plan.good), ())

    def unfinished(self) -> Iterator[int]:
        return (number for number, job in enumerate(self.jobs) if job.facts.state in ACTIVE_JOB_STATES)


def ending(outcome: AttemptOutcome, code: str = "") -> Ending:
    """How an attempt ends; one that is blocked waits for room on the disk."""
    reason = BlockedReason.DISK.value if outcome == AttemptOutcome.BLOCKED else ""
    return Ending(outcome=outcome, code=code, reason=reason)
