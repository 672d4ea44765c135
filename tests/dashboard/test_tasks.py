"""A real Celery worker with a real broker and the product's own child: woken, asked to end, and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.db import connection
from pytest_django.fixtures import Settings

from dashboard.lifecycle import JobState, Role
from dashboard.models import Checkpoint, Job, Step, Worker
from dashboard.services.reconciling import reconcile
from dashboard.services.registry import checkpoint_import
from deploy import processes
from deploy.broker import EmbeddedBroker
from tests.dashboard.world import person
from tests.tiny import make_tiny_pair

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def broker(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedBroker]:
    present = EmbeddedBroker(tmp_path / "broker", password="secret", port=processes.free_port())
    process = processes.start(present.command(), log=tmp_path / "broker.log")
    processes.wait_for(present.ready, process, what="broker", log=tmp_path / "broker.log", seconds=20)
    settings.CELERY_BROKER_URL = present.url()
    monkeypatch.setenv("CELERY_BROKER_WRITE_URL", present.url())
    yield present
    processes.stop(process)


@pytest.fixture
def environment(broker: EmbeddedBroker, settings: Settings, tmp_path: Path) -> dict[str, str]:
    """What the worker process is told: this test's database, broker, store and import root."""
    make_tiny_pair(tmp_path / "models")
    settings.IMPORT_ROOTS = {"models": str(tmp_path / "models")}
    database = connection.settings_dict
    address = f"{database['HOST']}:{database['PORT']}/{database['NAME']}"
    return os.environ | {
        "DATABASE_URL": f"postgres://{database['USER']}:{database['PASSWORD']}@{address}",
        "CELERY_BROKER_URL": broker.url(),
        "ARTIFACT_ROOT": str(tmp_path / "store"),
        "IMPORT_ROOTS": f"models={tmp_path / 'models'}",
        "STEP_DEVICE": "cpu",
        "LEASE_SECONDS": "4",
        "HEARTBEAT_SECONDS": "1",
    }


Start = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts a Celery worker and waits until it is connected."""
    started: list[subprocess.Popen[bytes]] = []

    def worker() -> subprocess.Popen[bytes]:
        log = tmp_path / f"worker-{len(started)}.log"
        command = [sys.executable, "-m", "celery", "--app", "dashboard", "worker", "--pool", "prefork"]
        command += ["--concurrency", "1", "--queues", "cpu", "--loglevel", "INFO", "--without-gossip"]
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        started.append(process)
        until(lambda: b" ready." in log.read_bytes(), what=f"the worker is up: {log.read_text()}", seconds=60)
        return process

    yield worker
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], object], *, what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``, whoever started it."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def computing(worker: int) -> int:
    """The child that computes steps below a Celery worker, 0 while there is none."""
    for pid in descendants(worker):
        try:
            if b"compression_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except FileNotFoundError:
            continue
    return 0


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def order() -> Job:
    return checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="base", name="tiny-base")


def caught_in_the_middle(worker: subprocess.Popen[bytes]) -> int:
    """The computing child of ``worker``, stopped before it can answer."""
    until(lambda: computing(worker.pid), what="a child computes")
    child = computing(worker.pid)
    os.kill(child, signal.SIGSTOP)
    assert Step.objects.get().state == "running"
    return child


def test_a_wake_through_the_broker_is_enough(start: Start) -> None:
    start()
    job = order()
    until(lambda: Job.objects.get(pk=job.pk).state == JobState.SUCCEEDED, what="the job is done")
    assert Checkpoint.objects.get().name == "tiny-base"
    assert Worker.objects.get().queues == "cpu"


def test_a_worker_asked_to_end_gives_its_step_back_within_seconds(start: Start) -> None:
    worker = start()
    job = order()
    child = caught_in_the_middle(worker)
    started = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    worker.wait(20)
    assert time.monotonic() - started < 8
    assert gone(child)
    step = Step.objects.get()
    assert (step.state, step.causes) == ("waiting", {})
    assert not Worker.objects.exists()
    # The message that woke the first worker is used up: the reconciler sends another.
    start()
    reconcile()
    until(lambda: Job.objects.get(pk=job.pk).state == JobState.SUCCEEDED, what="the job is done")


def test_nothing_outlives_a_worker_that_is_killed_and_its_step_is_taken_over(start: Start) -> None:
    worker = start()
    job = order()
    child = caught_in_the_middle(worker)
    family = descendants(worker.pid)
    assert child in family
    started = time.monotonic()
    worker.kill()
    worker.wait()
    until(lambda: all(gone(pid) for pid in family), what=f"all of {family} are gone", seconds=5)
    start()
    until(
        lambda: reconcile() and Job.objects.get(pk=job.pk).state == JobState.SUCCEEDED,
        what="the job is done by the other worker",
        seconds=60,
    )
    assert time.monotonic() - started < 60
    assert Step.objects.get().attempt == 2
    assert list(Step.objects.get().attempts.values_list("outcome", flat=True)) == ["lost", "done"]


def test_a_worker_that_is_never_woken_finds_work_by_itself(
    start: Start, environment: dict[str, str], broker: EmbeddedBroker, settings: Settings
) -> None:
    environment["IDLE_LOOK_SECONDS"] = "0.5"
    settings.CELERY_BROKER_URL = ""  # nobody sends it a message
    start()
    job = order()
    until(lambda: Job.objects.get(pk=job.pk).state == JobState.SUCCEEDED, what="done without a message", seconds=60)


def test_a_worker_works_before_and_while_its_broker_is_away(
    environment: dict[str, str], broker: EmbeddedBroker, settings: Settings, tmp_path: Path
) -> None:
    environment |= {"IDLE_LOOK_SECONDS": "0.5", "CELERY_BROKER_URL": f"redis://127.0.0.1:{processes.free_port()}/0"}
    settings.CELERY_BROKER_URL = environment["CELERY_BROKER_URL"]
    job = order()
    command = [sys.executable, "-m", "celery", "--app", "dashboard", "worker", "--concurrency", "1", "--queues", "cpu"]
    with (tmp_path / "alone.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: Job.objects.get(pk=job.pk).state == JobState.SUCCEEDED, what="done without a broker", seconds=60)
    finally:
        process.kill()
        process.wait()
