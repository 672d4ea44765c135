"""What the pure functions decide, event by event; the model tests play them in any order."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from dashboard import transitions
from dashboard.lifecycle import ATTEMPTS_PER_CAUSE, AttemptOutcome, JobState, Refused, StepState
from dashboard.transitions import Change, Effect, Ending, FenceClosed, JobFacts, StepFacts

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=60)
PAUSE = timedelta(seconds=5)
RUNNING_JOB = JobFacts(state=JobState.RUNNING)
HELD = StepFacts(state=StepState.RUNNING, attempt=4, lease_until=NOW + LEASE)


def ended(
    outcome: AttemptOutcome, *others: StepState, job: JobFacts = RUNNING_JOB, step: StepFacts = HELD, code: str = ""
) -> Change:
    ending = Ending(outcome=outcome, code=code, reason="disk" if outcome == AttemptOutcome.BLOCKED else "")
    return transitions.finish(job, step, others, ending, fence=4, now=NOW, pause=PAUSE)


def claim(job: JobFacts, step: StepFacts, inputs_done: bool = True) -> Change:
    return transitions.claim(job, step, inputs_done=inputs_done, now=NOW, lease=LEASE)


def test_a_claim_gives_the_next_number_and_a_lease_and_the_job_runs() -> None:
    change = claim(JobFacts(), StepFacts(attempt=6, not_before=NOW))
    assert change.step == StepFacts(state=StepState.RUNNING, attempt=7, lease_until=NOW + LEASE)
    assert (change.job.state, change.attempt.number) == (JobState.RUNNING, 7)


@pytest.mark.parametrize(
    ("job", "step", "inputs_done"),
    [
        (JobFacts(cancel="stop"), StepFacts(), True),
        (JobFacts(state=JobState.BLOCKED), StepFacts(), True),
        (JobFacts(state=JobState.DRAFT), StepFacts(), True),
        (JobFacts(state=JobState.CANCELLED), StepFacts(), True),
        (JobFacts(), StepFacts(not_before=NOW + PAUSE), True),
        (JobFacts(), StepFacts(), False),
        (JobFacts(), HELD, True),
        (JobFacts(), StepFacts(state=StepState.DONE), True),
    ],
)
def test_nothing_else_may_be_claimed(job: JobFacts, step: StepFacts, inputs_done: bool) -> None:
    with pytest.raises(Refused):
        claim(job, step, inputs_done)


@pytest.mark.parametrize("fence", [3, 5])
@pytest.mark.parametrize("outcome", [one for one in AttemptOutcome if one != AttemptOutcome.RUNNING])
def test_another_attempt_writes_nothing(fence: int, outcome: AttemptOutcome) -> None:
    with pytest.raises(FenceClosed):
        transitions.finish(RUNNING_JOB, HELD, (), Ending(outcome=outcome), fence=fence, now=NOW, pause=PAUSE)
    with pytest.raises(FenceClosed):
        transitions.heartbeat(HELD, fence=fence, now=NOW, lease=LEASE)
    with pytest.raises(FenceClosed):
        transitions.release(RUNNING_JOB, HELD, (), fence=fence)


def test_a_step_that_is_not_held_takes_no_report_of_its_own_last_attempt() -> None:
    with pytest.raises(FenceClosed):
        ended(AttemptOutcome.DONE, step=StepFacts(attempt=4))


def test_the_last_done_step_asks_for_the_result_to_be_published() -> None:
    change = ended(AttemptOutcome.DONE, StepState.DONE)
    assert change.job.state == JobState.VERIFYING
    assert Effect.PUBLISH in change.effects
    assert transitions.published(change.job, accepted=True).state == JobState.SUCCEEDED
    assert transitions.published(change.job, accepted=False).state == JobState.FAILED


def test_a_done_step_among_others_wakes_somebody_and_no_more() -> None:
    change = ended(AttemptOutcome.DONE, StepState.WAITING)
    assert (change.job, change.effects) == (RUNNING_JOB, (Effect.WAKE,))


@pytest.mark.parametrize(
    ("outcome", "code", "cause"),
    [
        (AttemptOutcome.ERRORED, "", "errored"),
        (AttemptOutcome.KILLED, "", "killed"),
        (AttemptOutcome.KILLED, "stalled", "stalled"),
    ],
)
def test_one_cause_may_strike_twice_but_not_three_times(outcome: AttemptOutcome, code: str, cause: str) -> None:
    step, waits = HELD, []
    for _ in range(ATTEMPTS_PER_CAUSE - 1):
        change = ended(outcome, step=step, code=code)
        assert (change.step.state, change.job, change.died_of) == (StepState.WAITING, RUNNING_JOB, "")
        waits.append(change.step.not_before)
        step = StepFacts(state=StepState.RUNNING, attempt=4, causes=change.step.causes, lease_until=NOW)
    assert waits == [NOW + PAUSE, NOW + 2 * PAUSE]
    change = ended(outcome, step=step, code=code)
    assert (change.step.state, change.job.state, change.died_of) == (StepState.DEAD, JobState.DEAD, cause)
    assert change.effects == (Effect.CANCEL_REST,)


def test_causes_are_counted_apart() -> None:
    step = StepFacts(state=StepState.RUNNING, attempt=4, causes={"errored": 2, "killed": 2, "stalled": 2})
    change = transitions.lapse(RUNNING_JOB, StepFacts(**(vars(step) | {"lease_until": NOW - PAUSE})), (), now=NOW)
    assert change.step.causes == {"errored": 2, "killed": 2, "stalled": 2, "lost": 1}
    assert (change.step.state, change.step.not_before) == (StepState.WAITING, None)


def test_a_lease_that_has_not_run_out_is_not_returned() -> None:
    with pytest.raises(Refused):
        transitions.lapse(RUNNING_JOB, HELD, (), now=NOW)


def test_a_job_that_says_no_fails_at_once() -> None:
    change = ended(AttemptOutcome.FAILED, StepState.RUNNING, StepState.WAITING)
    assert (change.step.state, change.job.state) == (StepState.FAILED, JobState.FAILED)
    assert change.effects == (Effect.CANCEL_REST,)


def test_no_room_blocks_without_counting_and_goes_on_when_there_is_room() -> None:
    change = ended(AttemptOutcome.BLOCKED)
    assert (change.job, change.step.causes) == (JobFacts(state=JobState.BLOCKED, blocked="disk"), {})
    later = NOW + 2 * PAUSE
    assert transitions.resume(change.job, [change.step], has_room=True, now=later) == JobFacts(state=JobState.QUEUED)
    assert transitions.resume(change.job, [change.step, HELD], has_room=True, now=later).state == JobState.RUNNING
    for has_room, now in ((False, later), (True, NOW)):
        with pytest.raises(Refused):
            transitions.resume(change.job, [change.step], has_room=has_room, now=now)


def test_a_cancelled_job_ends_with_the_last_step_that_runs() -> None:
    wished, effects = transitions.cancel(RUNNING_JOB, {StepState.RUNNING, StepState.WAITING}, "stop")
    assert (wished.state, wished.cancel, effects) == (JobState.RUNNING, "stop", ())
    change = ended(AttemptOutcome.DONE, StepState.WAITING, job=wished)
    assert (change.step.state, change.job.state) == (StepState.DONE, JobState.CANCELLED)
    assert Effect.CANCEL_REST in change.effects
    killed = ended(AttemptOutcome.CANCELLED, StepState.RUNNING, job=wished)
    assert (killed.step.state, killed.job.state) == (StepState.CANCELLED, JobState.RUNNING)


def test_a_job_of_which_nothing_runs_is_cancelled_at_once_and_a_kill_is_not_lowered() -> None:
    ended_job, effects = transitions.cancel(JobFacts(), {StepState.WAITING}, "kill")
    assert (ended_job.state, effects) == (JobState.CANCELLED, (Effect.CANCEL_REST,))
    wished = JobFacts(state=JobState.RUNNING, cancel="kill")
    assert transitions.cancel(wished, {StepState.RUNNING}, "stop") == (wished, ())
    for job, how in ((ended_job, "kill"), (RUNNING_JOB, "gently")):
        with pytest.raises(Refused):
            transitions.cancel(job, {StepState.RUNNING}, how)


def test_a_step_that_was_killed_without_a_wish_goes_back() -> None:
    assert ended(AttemptOutcome.CANCELLED).step.state == StepState.WAITING


def test_giving_back_is_not_counted() -> None:
    change = transitions.release(RUNNING_JOB, HELD, (), fence=4)
    assert (change.step.state, change.step.causes, change.attempt.outcome) == (
        StepState.WAITING,
        {},
        AttemptOutcome.LOST,
    )


def test_a_running_attempt_decides_nothing() -> None:
    with pytest.raises(Refused):
        ended(AttemptOutcome.RUNNING)


@pytest.mark.parametrize(
    ("typical", "limit"), [(None, 900.0), (3.0, 900.0), (90.0, 900.0), (91.0, 910.0), (3_600.0, 36_000.0)]
)
def test_a_step_may_stand_still_ten_times_as_long_as_its_kind_takes_and_never_less_than_a_quarter_of_an_hour(
    typical: float | None, limit: float
) -> None:
    found = transitions.progress_limit(typical, factor=10.0, least_seconds=900.0)
    assert found == limit
    assert not transitions.has_stalled(limit, found)
    assert transitions.has_stalled(limit + 1, found)
