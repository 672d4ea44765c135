"""Alive is not moving: a step that stands still is killed by its own parent, however well its lease is kept."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.launcher import Outcome
from dashboard import execution as module
from dashboard.execution import Execution, Watch
from dashboard.lifecycle import JobState
from dashboard.models import Attempt, Step
from dashboard.selectors.jobs import typical_seconds
from dashboard.services.steps import Claim, step_claim
from tests.dashboard.services.jobs_at_work import execution, ordered, step
from tests.dashboard.services.test_steps import claimed, planned

pytestmark = pytest.mark.django_db(transaction=True)


class Clock:
    """The monotonic clock of a parent, turned by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _quick(settings: Settings) -> None:
    settings.RETRY_SECONDS = 0
    settings.CELERY_BROKER_URL = ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def worker() -> Iterator[Execution]:
    present = execution()
    yield present
    present.close()


def watched(clock: Clock, claim: Claim) -> Watch:
    return Watch(claim=claim, tend=lambda: None, renewed=clock.now, moved=clock.now, reconciled=clock.now)


def progress(done: int) -> dict[str, object]:
    return {"type": "progress", "done": done, "total": 9, "unit": "tensors"}


def test_a_step_that_stands_still_is_killed_although_its_lease_is_alive(clock: Clock) -> None:
    ordered()
    watch = watched(clock, claimed())
    for _ in range(60):  # it beats all the time, and says the same again and again
        clock.now += 15
        watch.on_event(progress(1))
        assert watch.tick() is False
    assert (Step.objects.get().state, watch.lost) == ("running", False)
    clock.now += 30
    assert watch.tick() is True
    ending = watch.ending(Outcome(kind="cancelled"))
    assert (ending.kind, ending.code) == ("killed", "stalled")
    assert "nothing moved for 915 s, and the limit for such a step is 900 s" in ending.message


def test_a_step_that_moves_goes_on_for_as_long_as_it_takes(clock: Clock) -> None:
    ordered()
    watch = watched(clock, claimed())
    for done in range(20):
        watch.on_event(progress(done))
        clock.now += 890
        assert watch.tick() is False


def test_a_kind_that_takes_long_may_stand_still_for_longer(clock: Clock) -> None:
    planned(step("done", name="one"), step("done", name="one"))
    finished = claimed()
    Step.objects.filter(pk=finished.step_id).update(
        state="done", started_at=timezone.now() - timedelta(seconds=200), finished_at=timezone.now()
    )
    watch = watched(clock, claimed())
    clock.now += 1_900
    assert watch.tick() is False
    clock.now += 200
    assert watch.tick() is True
    assert "the limit for such a step is 2000 s" in watch.stalled


def test_the_typical_duration_is_the_median_of_this_job_and_else_of_others() -> None:
    other = planned(step("done", name="one"))
    job = planned(step("done", name="one"), priority=1)  # so that its plan is the next to be claimed
    assert typical_seconds(job.pk, "scripted.one") is None
    now = timezone.now()
    Step.objects.filter(job=other, name="one").update(
        state="done", started_at=now - timedelta(seconds=40), finished_at=now
    )
    assert typical_seconds(job.pk, "scripted.one") == 40
    Step.objects.filter(job=job, name="one").update(
        state="done", started_at=now - timedelta(seconds=7), finished_at=now
    )
    assert typical_seconds(job.pk, "scripted.one") == 7
    Step.objects.filter(job=job, name="one").update(reused=True)
    assert typical_seconds(job.pk, "scripted.one") == 40


def test_a_result_that_came_in_the_last_moment_is_kept(clock: Clock) -> None:
    ordered()
    watch = watched(clock, claimed())
    watch.stalled = "nothing moved"
    assert watch.ending(Outcome(kind="done", output="x")).kind == "done"


def test_a_real_child_that_sleeps_is_killed_thrice_and_the_job_says_why(worker: Execution, settings: Settings) -> None:
    settings.PROGRESS_LIMIT_SECONDS, settings.LEASE_SECONDS, settings.HEARTBEAT_SECONDS = 1, 60, 1
    job = ordered(step("sleep", name="stuck", seconds=600))
    worker.run_all()
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.DEAD, "stalled")
    assert "step 'stuck' stood still and was killed 3 times; the last time: nothing moved for" in job.error
    assert "and the limit for such a step is 1 s" in job.error
    assert list(Attempt.objects.filter(step__name="stuck").values_list("outcome", flat=True)) == ["killed"] * 3
    assert job.steps.get(name="stuck").causes == {"stalled": 3}
    assert step_claim(worker="worker-1", queues=["cpu"]) is None
