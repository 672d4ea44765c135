"""What the reconciler puts right, and the wakes that it makes up for."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.launcher import Outcome
from compression_worker.store import Store
from dashboard.execution import Execution
from dashboard.lifecycle import JobState
from dashboard.models import Job, Step, Worker
from dashboard.services import reconciling
from dashboard.services.reconciling import LOCK, reconcile, worker_gone, worker_seen
from dashboard.services.steps import step_claim, step_finish
from dashboard.services.wakes import wake
from deploy.processes import free_port
from tests.dashboard.services.jobs_at_work import ordered, step
from tests.dashboard.services.test_steps import lapse
from tests.dashboard.world import at_once

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def wakes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queues that the reconciler wakes."""
    sent: list[str] = []
    monkeypatch.setattr(reconciling, "wake_on_commit", sent.append)
    return sent


def test_work_that_nobody_was_told_of_is_woken(wakes: list[str]) -> None:
    ordered()
    assert reconcile() is True
    assert wakes == ["cpu"]


def test_nothing_is_woken_for_nothing(wakes: list[str]) -> None:
    ordered(step("done"))
    assert step_claim(worker="worker-1", queues=["cpu"]) is not None
    reconcile()
    assert wakes == []


def test_a_lapsed_lease_goes_back_and_wakes_somebody(wakes: list[str]) -> None:
    ordered()
    claim = step_claim(worker="gone", queues=["cpu"])
    assert claim is not None
    lapse(claim)
    reconcile()
    assert wakes == ["cpu"]
    taken = step_claim(worker="other", queues=["cpu"])
    assert taken is not None
    assert taken.attempt == 2


def test_only_one_reconciler_works_at_a_time(wakes: list[str]) -> None:
    ordered()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        assert at_once(reconcile) == [False]
    assert wakes == []
    assert reconcile() is True


def test_four_at_once_do_no_harm(wakes: list[str]) -> None:
    ordered()
    results = at_once(*[reconcile] * 4)
    assert True in results
    assert set(results) <= {True, False}
    assert wakes == ["cpu"] * results.count(True)


@pytest.fixture
def broker_down(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens where the broker should be."""
    settings.CELERY_BROKER_URL = f"redis://127.0.0.1:{free_port()}/0"
    monkeypatch.setenv("CELERY_BROKER_WRITE_URL", settings.CELERY_BROKER_URL)


@pytest.mark.usefixtures("broker_down")
def test_a_job_is_accepted_while_the_broker_is_down_and_done_later(worker: Execution) -> None:
    started = timezone.now()
    job = ordered(step("done"))
    assert timezone.now() - started < timedelta(seconds=5)
    job.refresh_from_db()
    assert job.state == JobState.QUEUED
    reconcile()
    worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED


@pytest.mark.usefixtures("broker_down")
def test_a_wake_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    started = time.monotonic()
    wake("cpu")
    assert "the broker is away" in caplog.text
    assert time.monotonic() - started < 3


def test_workers_come_and_go() -> None:
    for _ in range(2):
        worker_seen(name="one", queues=["cpu", "gpu"], device="cpu", pid=12)
    assert (Worker.objects.get().queues, Worker.objects.get().pid) == ("cpu,gpu", 12)
    worker_seen(name="old", queues=["cpu"], device="cpu", pid=13)
    Worker.objects.filter(name="old").update(seen_at=timezone.now() - timedelta(days=2))
    reconcile()
    assert Worker.objects.get().name == "one"
    worker_gone(name="one")
    assert not Worker.objects.exists()


def test_a_blocked_job_with_another_step_running_goes_on_as_running(settings: Settings) -> None:
    from compression_worker.launcher import Outcome
    from dashboard.services.steps import step_finish
    from tests.dashboard.services.test_steps import claimed, planned

    settings.RESUME_FREE_BYTES = 1
    job = planned(step("done", name="one"), step("done", name="two"))
    one = claimed("a")
    claimed("b")
    step_finish(claim=one, outcome=Outcome(kind="blocked", code="disk", message="full"))
    assert Job.objects.get(pk=job.pk).state == JobState.BLOCKED
    reconcile()
    assert Job.objects.get(pk=job.pk).state == JobState.RUNNING


def test_a_job_that_cannot_be_put_right_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claims = []
    for _ in range(2):
        ordered()
        claim = step_claim(worker="gone", queues=["cpu"])
        assert claim is not None
        claims.append(claim)
    for claim in claims:
        lapse(claim)
    broken, sound = claims
    returned = reconciling.leases_return

    def one_breaks(job: Job) -> int:
        if job.pk == broken.job_id:
            raise ValueError("a row that nobody expected")
        return returned(job)

    monkeypatch.setattr(reconciling, "leases_return", one_breaks)
    assert reconcile() is True
    assert Step.objects.get(pk=sound.step_id).state == "waiting"
    assert Step.objects.get(pk=broken.step_id).state == "running"
    assert f"job {broken.job_id} failed" in caplog.text


def test_a_store_that_is_away_holds_up_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked, lost = ordered(), ordered()
    first, second = (step_claim(worker="gone", queues=["cpu"]) for _ in range(2))
    assert first is not None
    assert second is not None
    step_finish(claim=first, outcome=Outcome(kind="blocked", code="disk", message="no space left"))
    lapse(second)

    def away(self: Store) -> int:
        raise OSError("the store is away")

    monkeypatch.setattr(Store, "free_bytes", away)
    assert reconcile() is True
    assert Step.objects.get(pk=second.step_id).state == "waiting"
    assert [Job.objects.get(pk=job.pk).state for job in (blocked, lost)] == ["blocked", "running"]
