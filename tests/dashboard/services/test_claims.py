"""Claims beside others: a worker waits for nobody, and what two lost workers left behind is put right once."""

from __future__ import annotations

import threading
import time

import pghistory.models
import pytest
from django.db import connection, transaction

from dashboard.lifecycle import JobState
from dashboard.models import Job
from dashboard.services.reconciling import reconcile
from dashboard.services.steps import step_claim
from tests.dashboard.services.jobs_at_work import ordered, step
from tests.dashboard.services.test_steps import claimed, lapse, planned

pytestmark = pytest.mark.django_db(transaction=True)


class Held:
    """A job whose row somebody else has locked, on a connection of their own, until told to let go."""

    def __init__(self, job: Job) -> None:
        self.taken, self.let_go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._hold, args=(job.pk,))

    def _hold(self, pk: int) -> None:
        try:
            with transaction.atomic():
                Job.objects.select_for_update(no_key=True).get(pk=pk)
                self.taken.set()
                self.let_go.wait(30)
        finally:
            connection.close()

    def __enter__(self) -> Held:
        self.thread.start()
        assert self.taken.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go.set()
        self.thread.join()


def test_a_worker_passes_over_a_job_that_somebody_holds() -> None:
    urgent, other = ordered(priority=5), ordered()
    with Held(urgent):
        started = time.monotonic()
        assert claimed().job_id == other.pk
        assert time.monotonic() - started < 1
    assert claimed().job_id == urgent.pk


def test_a_worker_does_not_wait_for_the_only_job_for_long_and_gets_it_when_it_is_let_go() -> None:
    job = ordered()
    with Held(job) as held:
        started = time.monotonic()
        assert step_claim(worker="worker-1", queues=["cpu"]) is None
        assert time.monotonic() - started < 10
        threading.Timer(0.2, held.let_go.set).start()
        assert claimed().job_id == job.pk


def test_a_lapsed_lease_in_a_job_that_somebody_holds_is_left_for_later() -> None:
    job, other = ordered(priority=5), ordered()
    lapse(claimed("gone"))
    with Held(job):
        assert claimed().job_id == other.pk
    assert (taken := claimed()).job_id == job.pk
    assert taken.attempt == 2


def test_two_steps_that_lapse_for_the_third_time_at_once_end_their_job_once() -> None:
    job = planned(step("done", name="one"), step("done", name="two"))
    for _ in range(3):
        for claim in (claimed("a"), claimed("b")):
            lapse(claim)
        reconcile()
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.DEAD, "lost")
    assert dict(job.steps.values_list("name", "state")) == {"plan": "done", "one": "dead", "two": "cancelled"}
    assert not job.steps.filter(attempts__outcome="running").exists()


def test_history_says_which_worker_started_a_job() -> None:
    job = ordered()
    claimed("worker-7")
    latest = pghistory.models.Events.objects.tracks(job).order_by("-pgh_created_at").first()
    assert latest is not None
    assert (latest.pgh_data["state"], latest.pgh_context["reason"]) == ("running", "claimed by worker-7")
