"""A worker whose disk or device fails stops taking steps, gives back what met it, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_django.fixtures import Settings

from compression_worker.launcher import Launcher, Outcome, child_command
from dashboard.execution import Execution
from dashboard.lifecycle import JobState, Role
from dashboard.models import Step, Worker
from dashboard.services.registry import checkpoint_import
from tests.dashboard.services.jobs_at_work import execution, ordered, step
from tests.dashboard.world import person
from tests.tiny import make_tiny_pair

pytestmark = pytest.mark.django_db(transaction=True)
CUDA = Outcome(kind="errored", message="RuntimeError: CUDA error: unspecified launch failure")


def test_a_store_that_cannot_be_written_costs_no_attempt_and_the_worker_waits_for_it(
    tmp_path: Path, settings: Settings
) -> None:
    make_tiny_pair(tmp_path / "models")
    store = tmp_path / "store"
    store.mkdir()
    settings.IMPORT_ROOTS, settings.ARTIFACT_ROOT = {"models": str(tmp_path / "models")}, str(store)
    job = checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="base", name="base")
    worker = Execution(
        name="worker-1", queues=["cpu"], launcher=Launcher(child_command(store, {"models": tmp_path / "models"}))
    )
    (store / "tmp").write_text("no folder can be made here")
    try:
        worker.run_all()
        row = Step.objects.get(job=job)
        assert (row.state, row.causes, row.attempt) == ("waiting", {}, 1)
        assert "its store cannot be used" in Worker.objects.get(name="worker-1").trouble
        assert worker.run_one() is False
        (store / "tmp").unlink()
        worker.run_all()
    finally:
        worker.close()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert Worker.objects.get(name="worker-1").trouble == ""


def test_a_device_that_failed_twice_gets_no_third_step() -> None:
    worker = execution()
    assert worker.quarantine.judge(CUDA) is False
    assert worker.quarantine.holds() is False
    worker.quarantine.judge(CUDA)
    ordered(step("done"))
    assert worker.run_one() is False
    assert "its device failed 2 times" in Worker.objects.get(name="worker-1").trouble
    assert Step.objects.get().attempt == 0
    worker.close()


def test_code_that_breaks_says_nothing_about_the_worker() -> None:
    worker = execution()
    for _ in range(3):
        assert worker.quarantine.judge(Outcome(kind="errored", message="ZeroDivisionError")) is False
    assert worker.quarantine.holds() is False
    worker.close()
