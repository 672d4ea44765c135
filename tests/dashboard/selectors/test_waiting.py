"""Why a job waits, in words, from rows as workers leave them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from pytest_django.fixtures import Settings

from dashboard.lifecycle import BlockedReason, JobState, StepState
from dashboard.models import Job, Step, Worker
from dashboard.selectors.waiting import job_wait, reasons_clock, waits
from tests.factories import make_job, make_worker

pytestmark = pytest.mark.django_db


def queued(kind: str = "bitdelta.distill", queue: str = "cpu", steps: int = 1, **values: Any) -> Job:
    """A job with ``steps`` steps of a kind to do."""
    job = make_job(state=values.pop("state", JobState.QUEUED), queue=queue, **values)
    for index in range(steps):
        Step.objects.create(job=job, index=index, name=f"step {index}", kind=kind, queue=queue)
    return job


def start(job: Job, seconds: float = 1.0) -> None:
    """A worker took the job's first step a while ago."""
    first = job.steps.order_by("index")[0]
    Step.objects.filter(pk=first.pk).update(
        state=StepState.RUNNING, owner="worker-1", started_at=timezone.now() - timedelta(seconds=seconds)
    )
    Job.objects.filter(pk=job.pk).update(state=JobState.RUNNING)


def text(job: Job) -> str:
    wait = job_wait(Job.objects.get(pk=job.pk))
    return wait.text if wait else ""


def test_nobody_serves_its_queue() -> None:
    make_worker()
    assert text(queued(queue="gpu")) == "no living worker serves the queue gpu"


def test_a_worker_that_fell_silent_does_not_live() -> None:
    make_worker()
    Worker.objects.update(seen_at=timezone.now() - timedelta(hours=1))
    assert text(queued()) == "no living worker serves the queue cpu"


def test_the_only_worker_is_quarantined() -> None:
    make_worker()
    Worker.objects.update(trouble="its store cannot be written: Read-only file system\nmore")
    assert text(queued()) == (
        "the only worker of the queue cpu is quarantined: its store cannot be written: Read-only file system"
    )


def test_steps_of_jobs_before_it_count_by_priority_and_then_by_age() -> None:
    make_worker()
    older = queued(steps=3)
    mine = queued()
    newer = queued(steps=5)
    assert text(mine) == "3 steps of jobs before it in the queue cpu"
    Job.objects.filter(pk=newer.pk).update(priority=10)
    assert text(mine) == "8 steps of jobs before it in the queue cpu"
    Job.objects.filter(pk=older.pk).update(priority=-10)
    assert text(mine) == "5 steps of jobs before it in the queue cpu"
    Job.objects.filter(pk=mine.pk).update(priority=10)
    assert text(mine) == "a worker of the queue cpu takes it in a moment"


def test_steps_of_another_queue_hold_up_nobody() -> None:
    make_worker()
    queued(queue="gpu", steps=4)
    assert text(queued()) == "a worker of the queue cpu takes it in a moment"


def test_it_waits_for_a_step_that_is_being_computed() -> None:
    make_worker()
    start(queued())
    assert text(queued()) == "waits for a step that a worker of the queue cpu computes"


def test_a_job_that_runs_or_has_ended_waits_for_nothing() -> None:
    make_worker()
    running = queued()
    start(running)
    assert text(running) == ""
    assert job_wait(make_job(state=JobState.SUCCEEDED)) is None


def test_a_pause_after_an_error_says_until_when(settings: Settings) -> None:
    settings.TIME_ZONE = "UTC"
    make_worker()
    job = queued(state=JobState.RUNNING)
    until = timezone.now() + timedelta(minutes=5)
    job.steps.update(not_before=until)
    assert text(job) == f"pauses after an error until {timezone.localtime(until):%H:%M:%S}"
    job.steps.update(not_before=timezone.now() - timedelta(seconds=1))
    assert "moment" in text(job)


def test_a_job_without_room_says_so() -> None:
    make_worker()
    job = queued(state=JobState.BLOCKED, blocked_reason=BlockedReason.DISK)
    assert text(job) == "waits: no room on the disk; it goes on by itself"


ESTIMATE = {
    "parts": [],
    "source_bytes": 0,
    "intermediate_bytes": 0,
    "sizes": {"parameters": 1.0},
    "exact": True,
    "steps": [
        {"kind": "bitdelta.plan", "count": 1, "units": 1.0},
        {"kind": "bitdelta.distill", "count": 4, "units": 400.0},
    ],
}
PARAMS = {"config": {"batch_size": 1, "sequence_length": 1}, "first": 0, "last": 100}


def measured(kind: str, seconds: float, params: dict[str, Any] | None = None) -> None:
    """A finished step: of a distillation, with a hundred units of work."""
    done = make_job(estimate=ESTIMATE)
    Step.objects.create(
        job=done, index=0, name="x", kind=kind, state=StepState.DONE, params=params or {},
        data={"measured": {"seconds": seconds}},
    )  # fmt: skip


def starts_in(job: Job) -> float | None:
    wait = job_wait(job)
    assert wait is not None
    return (wait.starts - timezone.now()).total_seconds() if wait.starts else None


def test_the_start_is_predicted_from_measured_rates_and_from_nothing_else() -> None:
    make_worker()
    queued(steps=3, estimate=ESTIMATE)
    mine = queued()
    assert starts_in(mine) is None
    measured("bitdelta.distill", 20.0, PARAMS)
    assert starts_in(mine) == pytest.approx(60.0, abs=2.0)
    make_worker("worker-2")
    assert starts_in(mine) == pytest.approx(30.0, abs=2.0)


def test_a_running_step_counts_with_what_is_left_of_it() -> None:
    make_worker()
    measured("bitdelta.distill", 20.0, PARAMS)
    start(queued(estimate=ESTIMATE), seconds=15.0)
    assert starts_in(queued()) == pytest.approx(5.0, abs=2.0)


def test_a_job_that_has_yet_to_be_planned_counts_with_what_its_plan_will_ask_for() -> None:
    make_worker()
    measured("bitdelta.distill", 20.0, PARAMS)
    queued("bitdelta.plan", estimate=ESTIMATE)
    mine = queued()
    assert starts_in(mine) is None
    measured("bitdelta.plan", 2.0)
    assert starts_in(mine) == pytest.approx(82.0, abs=2.0)


def test_thirty_jobs_cost_as_many_queries_as_one() -> None:
    make_worker()
    counts = []
    for _ in (1, 30):
        jobs = [queued(steps=2, estimate=ESTIMATE) for _ in range(30 if counts else 1)]
        with CaptureQueriesContext(connection) as queries:
            assert len(waits(jobs)) == len(jobs)
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 4


def test_the_clock_of_reasons_stands_still_where_nothing_waits() -> None:
    assert reasons_clock([make_job()]) == 0
    assert reasons_clock([queued()]) > 0
