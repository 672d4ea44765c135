"""A Hypothesis machine that plays jobs, workers, zombies, people and full disks, and a ledger that believes nobody.

The ledger writes down what was answered to whom and judges it by rules of its own: it never asks ``transitions``. Time
is the model's clock. A message is only an occasion to claim, so a lost one is a claim that does not come, and a doubled
one is a claim that finds nothing.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from dashboard.lifecycle import ATTEMPTS_PER_CAUSE, TERMINAL_JOB_STATES, AttemptOutcome, JobState, StepState
from dashboard.transitions import STALLED, Ending
from tests.dashboard.lifecycle_model import LEASE, PAUSE, ModelJob, Plan, Token, World, ending

ENDINGS = (
    *[ending(AttemptOutcome.DONE)] * 8,
    ending(AttemptOutcome.FAILED),
    *[ending(AttemptOutcome.ERRORED)] * 2,
    *[ending(AttemptOutcome.KILLED)] * 2,
    ending(AttemptOutcome.KILLED, STALLED),
    ending(AttemptOutcome.BLOCKED),
    ending(AttemptOutcome.CANCELLED),
)
FULL = ending(AttemptOutcome.BLOCKED)
COUNTED = {AttemptOutcome.ERRORED, AttemptOutcome.KILLED}
JOBS_AT_MOST = 6
GAMES_A_SEED = 200
TOKENS_KEPT = 12
ROUNDS_TO_THE_END = 200
Key = tuple[int, int]


class Violation(AssertionError):
    """Something happened that must never happen."""


def check(holds: bool, words: str) -> None:
    if not holds:
        raise Violation(words)


class Ledger:
    """What was answered, and whether that was right."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.newest: dict[Key, int] = {}
        self.reported: dict[Token, AttemptOutcome] = {}
        self.done: Counter[Key] = Counter()
        self.causes: Counter[tuple[Key, str]] = Counter()
        self.leases: dict[Key, datetime] = {}
        self.pauses: dict[Key, datetime] = {}
        self.cancelled: set[int] = set()
        self.ended: dict[int, tuple[object, ...]] = {}

    def holds(self, token: Token) -> bool:
        """Whether this is the newest claim of its step, it has not reported, and its job goes on."""
        key = token.job, token.step
        return self.newest[key] == token.attempt and token not in self.reported and token.job not in self.ended

    def claimed(self, token: Token) -> None:
        key = token.job, token.step
        before = self.newest.get(key, 0)
        check(token.attempt == before + 1, "an attempt's number is one more than the last")
        if before and Token(*key, before) not in self.reported:
            check(self.leases[key] < self.world.now, "a step was taken from a worker whose lease was alive")
            self.causes[key, "lost"] += 1
        check(token.job not in self.cancelled, "a cancelled job started a step")
        check(token.job not in self.ended, "a job that has ended started a step")
        check(not self.done[key], "a step that is done was started again")
        check(
            self.pauses.get(key, self.world.now) <= self.world.now, "a step was tried again before its pause was over"
        )
        check(self._strikes(key) < ATTEMPTS_PER_CAUSE, "a cause struck thrice, and the step was started again")
        needs = self.world.jobs[token.job].steps[token.step].needs
        check(all(self.done[token.job, need] for need in needs), "a step started before its inputs were done")
        self.newest[key] = token.attempt
        self.leases[key] = self.world.now + LEASE

    def beaten(self, token: Token, accepted: bool) -> None:
        self._fenced(token, accepted)
        if accepted:
            self.leases[token.job, token.step] = self.world.now + LEASE

    def finished(self, token: Token, how: Ending, answer: str, before: tuple[object, ...]) -> None:
        if answer == "repeated":
            check(self.world.jobs[token.job].snapshot() == before, "a report that was known already changed something")
            check(not self.holds(token) or self._is_over(token), "a first report was taken for a repeated one")
            return
        self._fenced(token, answer == "written")
        if answer == "refused":
            check(self.world.jobs[token.job].snapshot() == before, "a refused report changed something")
            return
        key = token.job, token.step
        self.reported[token] = how.outcome
        self.pauses.pop(key, None)
        if how.outcome == AttemptOutcome.DONE:
            self.done[key] += 1
            check(self.done[key] == 1, "a step was done twice")
        if how.outcome in COUNTED:
            self.causes[key, how.cause] += 1
            self.pauses[key] = self.world.now + PAUSE * self.causes[key, how.cause]
        if how.outcome == AttemptOutcome.BLOCKED:
            self.pauses[key] = self.world.now + PAUSE

    def released(self, token: Token, accepted: bool) -> None:
        self._fenced(token, accepted)
        if accepted:
            self.reported[token] = AttemptOutcome.LOST
            self.pauses.pop((token.job, token.step), None)

    def _fenced(self, token: Token, accepted: bool) -> None:
        """An old attempt writes nothing, and the holder of a living lease is never turned away."""
        if accepted:
            check(self.holds(token), "an attempt that no longer holds its step wrote to it")
        else:
            check(not self.holds(token) or self._is_over(token), "the holder of a living lease was turned away")

    def _is_over(self, token: Token) -> bool:
        return self.leases[token.job, token.step] < self.world.now

    def asked(self, number: int, accepted: bool) -> None:
        if accepted:
            check(number not in self.ended, "a job that has ended was cancelled")
            self.cancelled.add(number)
        else:
            check(number in self.ended, "a job that goes on could not be cancelled")

    def look(self) -> None:
        """What holds of every job at any time."""
        for number, job in enumerate(self.world.jobs):
            if number in self.ended:
                check(job.snapshot() == self.ended[number], "a job that has ended changed")
            elif job.facts.state in TERMINAL_JOB_STATES:
                self._ends(number, job)
                self.ended[number] = job.snapshot()
            else:
                check(job.publishes == 0, "a job that goes on has published")
                held = any(step.facts.state == StepState.RUNNING for step in job.steps)
                check(held or number not in self.cancelled, "a cancelled job waits although nothing of it runs")

    def _ends(self, number: int, job: ModelJob) -> None:
        keys = [(number, at) for at in range(len(job.steps))]
        all_done = all(self.done[key] for key in keys) and job.states == {StepState.DONE}
        check(not job.states & {StepState.WAITING, StepState.RUNNING}, "a job ended and left a step open")
        check(job.publishes == int(all_done), "a job is published once, when all its steps are done, and not otherwise")
        said_no = any(token.job == number and how == AttemptOutcome.FAILED for token, how in self.reported.items())
        reasons = {
            JobState.SUCCEEDED: all_done and job.plan.good,
            JobState.FAILED: said_no or (all_done and not job.plan.good),
            JobState.CANCELLED: number in self.cancelled and not all_done,
            JobState.DEAD: any(self._strikes(key) + self._lost_now(key) >= ATTEMPTS_PER_CAUSE for key in keys),
        }
        check(reasons[job.facts.state], f"a job is {job.facts.state.value} without a reason")

    def _strikes(self, key: Key) -> int:
        """How often the cause that struck most has struck."""
        return max((count for (where, _), count in self.causes.items() if where == key), default=0)

    def _lost_now(self, key: Key) -> int:
        """The newest claim never reported, and its lease is over: its worker counts as lost once more."""
        newest = self.newest.get(key)
        if newest is None or Token(*key, newest) in self.reported or self.leases[key] >= self.world.now:
            return 0
        return int(self.causes[key, "lost"] + 1 >= ATTEMPTS_PER_CAUSE) * ATTEMPTS_PER_CAUSE


class LifecycleMachine(RuleBasedStateMachine):
    """Everything that may happen to jobs, in any order."""

    make_world: ClassVar[Callable[[], World]] = World
    played: ClassVar[Counter[str]] = Counter()
    """How often each rule ran, over all games."""
    seen: ClassVar[Counter[str]] = Counter()
    """How often what is worth seeing was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.world = type(self).make_world()
        self.ledger = Ledger(self.world)
        self.tokens: list[Token] = []
        self.poison: dict[Key, Ending] = {}
        self.is_full = False

    def _count(self, rule_: str) -> None:
        self.played[rule_] += 1

    def _look(self) -> None:
        self.ledger.look()

    @initialize()
    def begin(self) -> None:
        self._submit(Plan(needs=(frozenset(), frozenset(), frozenset({0, 1}))), 0)

    def _submit(self, plan: Plan, poison: int) -> None:
        number = self.world.submit(plan)
        if poison:  # one step of this job breaks whenever it is tried, always in the same way
            at = poison % (len(plan.needs) + 1)
            self.poison[number, at] = ending(AttemptOutcome.ERRORED if poison % 2 else AttemptOutcome.KILLED)
        self._look()

    @precondition(lambda self: len(self.world.jobs) < JOBS_AT_MOST)
    @rule(shape=st.integers(0, 2**12 - 1))
    def submit(self, shape: int) -> None:
        self._count("submit")
        count, edges = shape % 5, shape >> 5
        needs = tuple(frozenset(need for need in range(at) if edges >> (at + need) & 1) for at in range(count))
        poison = (shape >> 3) % 7 if shape % 6 == 0 else 0
        self._submit(Plan(needs=needs, priority=shape % 3, good=shape % 11 != 0), poison)

    @rule()
    def claim(self) -> None:
        self._count("claim")
        self._claim()

    @rule()
    def claim_again(self) -> None:
        """Twice as often as the rest, so that steps are held by several workers at once."""
        self._count("claim_again")
        self._claim()

    def _claim(self) -> Token | None:
        token = self.world.claim()
        if token is not None:
            self.seen["claimed" if token.attempt == 1 else "claimed again"] += 1
            self.ledger.claimed(token)
            self.tokens = [*self.tokens[1 - TOKENS_KEPT :], token]
        self._look()
        return token

    def _token(self, back: int) -> Token:
        return self.tokens[-1 - back % len(self.tokens)]

    @precondition(lambda self: self.tokens)
    @rule(back=st.integers(0, TOKENS_KEPT - 1))
    def heartbeat(self, back: int) -> None:
        self._count("heartbeat")
        token = self._token(back)
        self.ledger.beaten(token, self.world.heartbeat(token))
        self._look()

    @precondition(lambda self: self.tokens)
    @rule(choice=st.integers(0, 4 * len(ENDINGS) - 1))
    def finish(self, choice: int) -> None:
        """By one of the latest claims, which may be a zombie's, or have finished before."""
        self._count("finish")
        back, which = divmod(choice, len(ENDINGS))
        self._finish(self._token(back), ENDINGS[which])

    @precondition(lambda self: self.tokens)
    @rule(back=st.integers(0, 3))
    def finish_well(self, back: int) -> None:
        self._count("finish_well")
        self._finish(self._token(back), ENDINGS[0])

    @precondition(lambda self: len(self.tokens) > 4)
    @rule(choice=st.integers(0, 8 * len(ENDINGS) - 1))
    def come_back(self, choice: int) -> None:
        """A worker that was paused for long tells of what it did."""
        self._count("come_back")
        back, which = divmod(choice, len(ENDINGS))
        self._finish(self._token(4 + back), ENDINGS[which])

    def _finish(self, token: Token, how: Ending) -> None:
        if how.outcome == AttemptOutcome.DONE:
            how = FULL if self.is_full else self.poison.get((token.job, token.step), how)
        before = self.world.jobs[token.job].snapshot()
        answer = self.world.finish(token, how)
        self.seen[f"{how.cause} {answer}"] += 1
        self.ledger.finished(token, how, answer, before)
        self._look()

    @precondition(lambda self: self.tokens)
    @rule(back=st.integers(0, 5))
    def release(self, back: int) -> None:
        self._count("release")
        token = self._token(back)
        self.ledger.released(token, self.world.release(token))
        self._look()

    @rule(choice=st.integers(0, 4 * JOBS_AT_MOST - 1))
    def cancel(self, choice: int) -> None:
        """A quarter of the wishes reach a job: most jobs are let be."""
        self._count("cancel")
        number, how = divmod(choice, 4)
        if number < len(self.world.jobs) and how < 2:
            self.ledger.asked(number, self.world.cancel(number, ("stop", "kill")[how]))
        self._look()

    @rule(is_full=st.booleans())
    def fill_the_disk(self, is_full: bool) -> None:
        """While it is full nothing can be done; that there is room somewhere may still look so."""
        self._count("fill_the_disk")
        self.is_full = is_full

    @rule(units=st.integers(1, 4))
    def advance(self, units: int) -> None:
        self._count("advance")
        self.world.advance(units)

    @rule(has_room=st.booleans())
    def reconcile(self, has_room: bool) -> None:
        self._count("reconcile")
        self.world.reconcile(has_room=has_room)
        self._look()

    def teardown(self) -> None:
        """Faults stop: every job that was accepted comes to an end."""
        if sys.exc_info()[0] is not None:  # a rule has failed: that is what there is to tell
            return
        for round_ in range(ROUNDS_TO_THE_END):
            self.is_full = self.is_full and round_ < 2 * ATTEMPTS_PER_CAUSE  # a disk may stay full for long
            if not list(self.world.unfinished()):
                self.seen.update(f"job {job.facts.state.value}" for job in self.world.jobs)
                return
            while token := self._claim():
                self._finish(token, ENDINGS[0])
            self.world.advance(4)
            self.world.reconcile(has_room=True)
            self._look()
        raise Violation(f"jobs {list(self.world.unfinished())} never end")


def play(machine: type[LifecycleMachine], *, steps: int, length: int, first_seed: int, shrink: bool = True) -> int:
    """Run at least ``steps`` steps in games of ``length``, from ``first_seed`` on; returns how many really ran."""
    machine.played.clear()
    machine.seen.clear()
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    number = first_seed
    while (ran := machine.played.total()) < steps:
        rules = settings(
            max_examples=min(GAMES_A_SEED, -(-(steps - ran) // length)),
            stateful_step_count=length,
            deadline=None,
            database=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        )
        sys.stdout.write(f"seed {number}: {rules.max_examples} games of {length} steps\n")
        machine._hypothesis_internal_use_seed = number  # type: ignore[attr-defined]  # what `seed` sets on a function
        run_state_machine_as_test(machine, settings=rules)  # type: ignore[no-untyped-call]
        number += 1
    return ran


def steps_asked(default: int) -> int:
    """``DELTAWORKS_MODEL_STEPS`` where it is set: how long to play."""
    return int(os.environ.get("DELTAWORKS_MODEL_STEPS", default))
