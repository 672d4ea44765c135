"""The lifecycle under a fake clock: tens of thousands of events in any order, judged by a ledger that trusts nobody.

``DELTAWORKS_MODEL_STEPS=1000000`` plays longer. Each planted bug shows that the machine would see it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dashboard import transitions
from dashboard.lifecycle import JobState, Refused, StepState
from dashboard.transitions import Effect, Ending
from tests.dashboard.lifecycle_machine import LifecycleMachine, Violation, play, steps_asked

STEPS = 50_000
FIRST_SEED = 20_261_123


def test_no_rule_is_broken_by_anything_that_may_happen() -> None:
    asked, started = steps_asked(STEPS), time.monotonic()
    ran = play(LifecycleMachine, steps=asked, length=100, first_seed=FIRST_SEED)
    print(f"{ran} steps in {time.monotonic() - started:.0f} s: {dict(LifecycleMachine.played)}")
    assert ran >= asked
    assert min(LifecycleMachine.played.values()) > ran / 100, "each kind of event took place often"
    print(dict(sorted(LifecycleMachine.seen.items())))
    assert min(LifecycleMachine.seen[sight] for sight in WORTH_SEEING) > ran / 2_000, "each sight was seen often"


WORTH_SEEING = (
    *(f"job {state}" for state in ("succeeded", "failed", "cancelled", "dead")),
    *(f"{cause} written" for cause in ("done", "failed", "errored", "killed", "stalled", "blocked", "cancelled")),
    *(f"{cause} refused" for cause in ("done", "failed", "errored", "killed", "stalled", "blocked", "cancelled")),
    "done repeated",
    "claimed",
    "claimed again",
)


class Bugs:
    """Bugs as somebody might write them: each takes the place of one function of ``transitions``."""

    claim = staticmethod(transitions.claim)
    cancel = staticmethod(transitions.cancel)
    settle = staticmethod(transitions.settle)
    broke = staticmethod(transitions._broke)
    finish = staticmethod(transitions.finish)
    closed = staticmethod(transitions._closed)
    ended = staticmethod(transitions._ended)
    lapse = staticmethod(transitions.lapse)
    heartbeat = staticmethod(transitions.heartbeat)


def fence_not_checked(step: Any, fence: int) -> bool:
    return step.state == StepState.RUNNING


def fence_only_in_heartbeats(job: Any, step: Any, others: Any, ending: Any, *, fence: int, **when: Any) -> Any:
    return Bugs.finish(job, step, others, ending, fence=step.attempt, **when)


def fence_starts_at_one_again(job: Any, step: Any, **facts: Any) -> Any:
    return Bugs.claim(job, replace(step, attempt=0), **facts)


def fence_checked_but_not_that_it_runs(step: Any, fence: int) -> bool:
    return bool(step.attempt == fence)


def cause_not_counted(job: Any, step: Any, others: Any, ending: Any, **when: Any) -> Any:
    change = Bugs.broke(job, step, others, ending, **when)
    return replace(change, step=replace(change.step, causes={}))


def causes_counted_together(job: Any, step: Any, others: Any, ending: Any, **when: Any) -> Any:
    together = {ending.cause: sum(step.causes.values())}
    change = Bugs.broke(job, replace(step, causes=together), others, ending, **when)
    return change


def lost_workers_not_counted(job: Any, step: Any, others: Any, ending: Ending, **when: Any) -> Any:
    if ending.cause == "lost":
        return Bugs.closed(job, step, others, ending, StepState.WAITING)
    return Bugs.broke(job, step, others, ending, **when)


def one_attempt_too_many(job: Any, step: Any, others: Any, ending: Ending, **when: Any) -> Any:
    fewer = {cause: count - 1 for cause, count in step.causes.items()}
    change = Bugs.broke(job, replace(step, causes=fewer), others, ending, **when)
    return replace(
        change, step=replace(change.step, causes=step.causes | {ending.cause: step.causes.get(ending.cause, 0) + 1})
    )


def blocked_is_counted(job: Any, step: Any, others: Any, ending: Ending, **when: Any) -> Any:
    change = Bugs.finish(job, step, others, ending, **when)
    if ending.outcome != "blocked" or change.job.state != JobState.BLOCKED:
        return change
    times = step.causes.get("blocked", 0) + 1
    if times > 2:
        return Bugs.ended(job, step, ending, StepState.DEAD, JobState.DEAD)
    return replace(change, step=replace(change.step, causes={**step.causes, "blocked": times}))


def no_pause_after_an_error(job: Any, step: Any, others: Any, ending: Any, **when: Any) -> Any:
    change = Bugs.broke(job, step, others, ending, **when)
    return replace(change, step=replace(change.step, not_before=None))


def pause_not_waited_for(job: Any, step: Any, **facts: Any) -> Any:
    return Bugs.claim(job, replace(step, not_before=None), **facts)


def cancel_forgotten_by_a_claim(job: Any, step: Any, **facts: Any) -> Any:
    return Bugs.claim(replace(job, cancel=""), step, **facts)


def cancel_forgotten_when_steps_end(job: Any, states: Any) -> Any:
    return Bugs.settle(replace(job, cancel=""), states)


def cancel_of_an_ended_job(job: Any, states: Any, how: str) -> Any:
    return (replace(job, cancel=how), ()) if transitions.is_terminal(job) else Bugs.cancel(job, states, how)


def cancelled_while_steps_run(job: Any, states: Any) -> Any:
    return Bugs.settle(job, set(states) - {StepState.RUNNING})


def inputs_not_looked_at(job: Any, step: Any, *, inputs_done: bool, **facts: Any) -> Any:
    return Bugs.claim(job, step, inputs_done=True, **facts)


def done_steps_start_again(job: Any, step: Any, **facts: Any) -> Any:
    return Bugs.claim(job, replace(step, state=StepState.WAITING), **facts)


def published_with_the_first_done_step(job: Any, states: Any) -> Any:
    return Bugs.settle(job, {StepState.DONE} if StepState.DONE in states else states)


def rest_left_open(job: Any, step: Any, *ending: Any) -> Any:
    return replace(Bugs.ended(job, step, *ending), effects=())


def lease_not_waited_for(step: Any, now: Any) -> bool:
    return bool(step.state == StepState.RUNNING)


def lapsed_leases_never_returned(step: Any, now: Any) -> bool:
    return False


def lapsed_lease_cannot_be_renewed_though_nobody_took_it(step: Any, *, now: Any, **facts: Any) -> Any:
    beaten = Bugs.heartbeat(step, now=now, **facts)
    return replace(beaten, lease_until=step.lease_until)


def lost_step_never_free_again(job: Any, step: Any, others: Any, *, now: Any) -> Any:
    change = Bugs.lapse(job, step, others, now=now)
    return replace(change, step=replace(change.step, not_before=now.replace(year=now.year + 1)))


def blocked_jobs_never_go_on(job: Any, steps: Any, **facts: Any) -> Any:
    raise Refused("not today")


def known_reports_taken_for_new(attempt: Any, ending: Any) -> bool:
    return False


def effects_dropped(job: Any, states: Any) -> Any:
    changed, effects = Bugs.settle(job, states)
    return changed, tuple(effect for effect in effects if effect != Effect.CANCEL_REST)


@pytest.mark.parametrize(
    ("function", "bug"),
    [
        ("holds_fence", fence_not_checked),
        ("holds_fence", fence_checked_but_not_that_it_runs),
        ("finish", fence_only_in_heartbeats),
        ("claim", fence_starts_at_one_again),
        ("_broke", cause_not_counted),
        ("_broke", causes_counted_together),
        ("_broke", lost_workers_not_counted),
        ("_broke", one_attempt_too_many),
        ("_broke", no_pause_after_an_error),
        ("finish", blocked_is_counted),
        ("claim", pause_not_waited_for),
        ("claim", cancel_forgotten_by_a_claim),
        ("claim", inputs_not_looked_at),
        ("settle", cancel_forgotten_when_steps_end),
        ("settle", cancelled_while_steps_run),
        ("settle", published_with_the_first_done_step),
        ("settle", effects_dropped),
        ("cancel", cancel_of_an_ended_job),
        ("_ended", rest_left_open),
        ("is_lapsed", lease_not_waited_for),
        ("is_lapsed", lapsed_leases_never_returned),
        ("heartbeat", lapsed_lease_cannot_be_renewed_though_nobody_took_it),
        ("lapse", lost_step_never_free_again),
        ("resume", blocked_jobs_never_go_on),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_bug_is_seen(function: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transitions, function, bug)
    with pytest.raises((Violation, Refused)):
        play(LifecycleMachine, steps=20_000, length=60, first_seed=FIRST_SEED, shrink=False)
