"""The parent of a computing child: it beats, hears, survives a database that goes away, and lets go when it must."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from django.db import OperationalError, connection
from django.utils import timezone
from pytest_django.fixtures import Settings

from dashboard import execution as module
from dashboard.execution import STOPPING, Execution, Watch
from dashboard.lifecycle import JobState
from dashboard.models import Attempt, Step, Worker
from dashboard.services.steps import LeaseLost, step_claim
from tests.dashboard.services.jobs_at_work import execution, ordered, step

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _quick(settings: Settings) -> None:
    settings.RETRY_SECONDS = 0
    settings.CELERY_BROKER_URL = ""


@pytest.fixture
def worker() -> Iterator[Execution]:
    present = execution()
    yield present
    present.close()


def test_a_worker_announces_itself(worker: Execution) -> None:
    assert worker.run_all() == 0
    assert Worker.objects.get().name == "worker-1"


def test_the_lease_is_renewed_while_the_child_computes(worker: Execution, settings: Settings) -> None:
    settings.LEASE_SECONDS, settings.HEARTBEAT_SECONDS = 4, 1
    job = ordered(step("sleep", seconds=6))
    worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert Attempt.objects.filter(outcome="done").count() == 2


def test_a_stolen_lease_kills_the_child_and_writes_nothing(worker: Execution) -> None:
    ordered(step("sleep", seconds=40))
    assert worker.run_one()
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    thief = Step.objects.filter(pk=claim.step_id)
    thief.update(attempt=7, owner="thief", lease_until=timezone.now() + timedelta(seconds=60))
    started = time.monotonic()
    worker._run(claim)
    assert time.monotonic() - started < 10
    row = thief.get()
    assert (row.attempt, row.owner, row.state) == (7, "thief", "running")


def test_connections_cut_by_the_database_do_not_end_the_child(worker: Execution, settings: Settings) -> None:
    """What a restart of Postgres does to a worker: every session ends in the middle of what it was doing."""
    settings.HEARTBEAT_SECONDS = 1
    job = ordered(step("sleep", seconds=3))
    worker.run_one()
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    cuts = []

    class Cutting(Watch):
        def tick(self) -> bool:
            if len(cuts) < 3:
                cuts.append(1)
                with connection.cursor() as cursor, pytest.raises(OperationalError):
                    cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            return super().tick()

    watch = Cutting(claim=claim, tend=worker.tend)
    outcome = worker._compute(claim, watch)
    module._report(claim, watch, outcome)
    job.refresh_from_db()
    assert len(cuts) == 3
    assert job.state == JobState.SUCCEEDED
    assert Attempt.objects.filter(step_id=claim.step_id).count() == 1


def test_a_result_is_reported_again_until_the_database_is_back(
    worker: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ordered()
    finish, tries = module.step_finish, []

    def away_at_first(**values: object) -> None:
        tries.append(1)
        if len(tries) < 4:
            raise OperationalError("the database system is starting up")
        finish(**values)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "step_finish", away_at_first)
    worker.run_all()
    job.refresh_from_db()
    assert (len(tries), job.state) == (4, JobState.SUCCEEDED)


def test_a_worker_that_cannot_renew_its_lease_kills_its_child_in_time(
    worker: Execution, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.LEASE_SECONDS, settings.HEARTBEAT_SECONDS = 4, 1
    ordered(step("sleep", seconds=40))
    worker.run_one()
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None

    def away(**_: object) -> str:
        raise OperationalError("could not connect")

    monkeypatch.setattr(module, "step_heartbeat", away)
    monkeypatch.setattr(module, "step_watch", away)
    watch = Watch(claim=claim, tend=lambda: None)
    started = time.monotonic()
    worker._compute(claim, watch)
    assert watch.lost
    assert 2.5 < time.monotonic() - started < 4


def test_a_query_that_hangs_does_not_keep_a_child_beyond_its_lease(
    worker: Execution, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.LEASE_SECONDS, settings.HEARTBEAT_SECONDS = 4, 1
    ordered(step("sleep", seconds=40))
    worker.run_one()
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    killed: list[int] = []
    kill = module.kill_group

    def noted(pid: int) -> None:
        killed.append(pid)
        kill(pid)

    def hanging(**_: object) -> str:
        end = time.monotonic() + 20
        while not killed and time.monotonic() < end:
            time.sleep(0.05)
        raise OperationalError("timed out")

    monkeypatch.setattr(module, "kill_group", noted)
    monkeypatch.setattr(module, "step_heartbeat", hanging)
    watch = Watch(claim=claim, tend=lambda: None)
    started = time.monotonic()
    worker._compute(claim, watch)
    assert killed[0] > 0
    assert watch.lost
    assert time.monotonic() - started < 6


def test_a_worker_asked_to_end_gives_its_step_back(worker: Execution) -> None:
    job = ordered(step("sleep", seconds=40))
    worker.run_one()
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    STOPPING.value = 1
    try:
        worker._run(claim)
        assert worker.run_all() == 0
    finally:
        STOPPING.value = 0
    row = Step.objects.get(pk=claim.step_id)
    assert (row.state, row.causes) == ("waiting", {})
    job.refresh_from_db()
    assert job.state == JobState.RUNNING


def test_an_error_in_the_parent_counts_as_an_attempt_with_its_reason(
    worker: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ordered()

    def broken(*_: object, **__: object) -> None:
        raise FileNotFoundError("no python here")

    monkeypatch.setattr(worker._launcher, "run", broken)
    worker.run_all()
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.DEAD, "errored")
    assert "no python here" in job.error


def test_a_job_removed_while_it_runs_ends_its_child_quietly(worker: Execution) -> None:
    job = ordered(step("chatter", lines=5))
    worker.run_one()
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    job.delete()
    worker._run(claim)
    assert worker.run_all() == 0


def test_a_lost_lease_seen_by_a_tick_is_remembered() -> None:
    ordered()
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    Step.objects.filter(pk=claim.step_id).update(attempt=2)
    watch = Watch(claim=claim, tend=lambda: None)
    assert watch.tick() is True
    assert watch.lost
    with pytest.raises(LeaseLost):
        module.step_watch(claim=claim)
