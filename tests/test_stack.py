"""The whole stack as `make run` starts it: quick to come, nothing left behind, and a kill -9 of any part loses no work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import processes
from deploy.broker import EmbeddedBroker
from deploy.postgres import EmbeddedPostgres
from tests.stack import ROOT, RunningStack, until

pytestmark = pytest.mark.stack

CONFIG = {"distill_steps": 100, "batch_size": 4, "sequence_length": 96}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    stack = RunningStack(tmp_path_factory.mktemp("stack") / "home")
    stack.start()
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def pair(stack: RunningStack) -> dict[str, int]:
    """The demo's pair in the registry of the stack, with people, environments and a calibration set."""
    stack.drive("people", password="a long enough password")
    stack.drive("rooms")
    calibration = stack.drive("sample_set", name="shakespeare-calibration", kind="text")
    text = stack.drive("sample_set", name="shakespeare-heldout", kind="text")
    base = stack.finish(stack.drive("import_checkpoint", folder="base", name="base"))["checkpoint"]
    variant = stack.finish(stack.drive("import_checkpoint", folder="variant", name="variant", base=base))["checkpoint"]
    return {"base": base, "variant": variant, "calibration": calibration, "text": text}


def _compress(stack: RunningStack, pair: dict[str, int]) -> int:
    pk: int = stack.drive("compress", variant=pair["variant"], config=CONFIG, calibration=pair["calibration"])
    return pk


@pytest.fixture(scope="module")
def undisturbed(stack: RunningStack, pair: dict[str, int]) -> dict[str, Any]:
    """A compression that nobody disturbed; its finished steps are then forgotten, so that the next one computes."""
    job = stack.finish(_compress(stack, pair), seconds=240)
    stack.drive("forget_outputs")
    return job


def test_a_second_supervisor_on_the_same_folder_says_where_the_first_one_answers(stack: RunningStack) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.local"], cwd=ROOT, env=stack.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"runs already in {stack.folder}: {stack.status()['address']}" in done.stdout


def test_no_secret_stands_on_a_command_line_and_a_server_gets_its_own_role_only(stack: RunningStack) -> None:
    secrets = [value.encode() for value in json.loads((stack.folder / "secrets.json").read_text()).values()]
    for part in stack.status()["processes"].values():
        line = Path(f"/proc/{part['pid']}/cmdline").read_bytes()
        assert not [secret for secret in secrets if secret in line]
    server = Path(f"/proc/{stack.pid('server')}/environ").read_bytes()
    assert b"DELTAWORKS_SERVER_DSN=" in server
    assert b"DATABASE_URL=" not in server
    assert b"SECRET_KEY=" not in server


def distilling(job: dict[str, Any]) -> bool:
    return any(name.startswith("steps ") for name in job["running"])


def test_a_job_survives_the_death_of_each_part_with_the_same_bytes(
    stack: RunningStack, pair: dict[str, int], undisturbed: dict[str, Any]
) -> None:
    pk = _compress(stack, pair)
    for name in ("worker", "broker", "postgres", "server"):
        # Steps of distillation take seconds: the one that was seen still runs when the signal arrives.
        until(lambda: distilling(stack.job(pk)), seconds=120, what="a step of distillation runs")
        stack.kill(name)
    job = stack.finish(pk, seconds=300)
    assert job["digest"] == undisturbed["digest"]
    assert "lost" in job["outcomes"]


def test_serving_survives_the_death_of_each_part_and_the_way_back_stays_open(
    stack: RunningStack, pair: dict[str, int], undisturbed: dict[str, Any]
) -> None:
    artifact = undisturbed["artifact"]
    stack.finish(stack.drive("evaluate", artifact=artifact, text=pair["text"]), seconds=300)
    approval = stack.drive("ask", artifact=artifact)
    stack.drive("approve", approval=approval)
    until(lambda: stack.drive("certified", artifact=artifact), seconds=90, what="the rollback is rehearsed")
    generation = stack.drive("deploy", artifact=artifact, approval=approval)
    headers = stack.answers_from("model-production", generation)
    assert headers["x-deltaworks-digest"] == undisturbed["digest"]
    for name in ("postgres", "broker", "worker"):
        watcher = Watcher(stack)
        stack.kill(name)
        assert watcher.end() == {200}, f"answers failed while {name} was gone"
    stack.kill("server")
    stack.answers_from("model-production", generation)
    generation = stack.drive("roll_back")
    headers = stack.answers_from("model-production", generation)
    assert headers["x-deltaworks-digest"] != undisturbed["digest"]


class Watcher:
    """A client that asks all the time; ``end`` says which statuses it saw."""

    def __init__(self, stack: RunningStack) -> None:
        self._stack = stack
        self._seen: set[int] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._ended.is_set():
            try:
                self._seen.add(self._stack.complete("model-production")[0])
            except OSError:
                self._seen.add(0)
            time.sleep(0.1)

    def end(self) -> set[int]:
        self._ended.set()
        self._thread.join()
        return self._seen


def test_ctrl_c_leaves_no_process_and_the_next_start_takes_seconds(stack: RunningStack) -> None:
    assert stack.stop(signal.SIGINT) < 15
    assert stack.processes_left() == []
    assert stack.start() < 15 * _slowness()
    assert stack.drive("ping")


def test_a_killed_supervisor_leaves_no_process_and_the_next_start_works(stack: RunningStack) -> None:
    assert stack.processes_left() != []
    stack.stop(signal.SIGKILL)
    until(lambda: not stack.processes_left(), seconds=10, what="all processes are gone")
    stack.start()
    assert stack.drive("ping")


def test_real_servers_take_the_place_of_the_embedded_ones(tmp_path: Path) -> None:
    postgres = EmbeddedPostgres(tmp_path / "postgres", password="superuser", durable=False)
    broker = EmbeddedBroker(tmp_path / "broker", password="broker", port=processes.free_port())
    postgres.start()
    postgres.ensure(database="ours", owner_password="owner", server_password="server")
    messages = processes.start(broker.command(), log=tmp_path / "broker.log")
    given = {
        "DATABASE_URL": postgres.url("deltaworks", "ours", "owner"),
        "CELERY_BROKER_URL": broker.url(),
        "ARTIFACT_ROOT": str(tmp_path / "store"),
        "DELTAWORKS_SERVER_DSN": postgres.url("deltaworks_server", "ours", "server"),
    }
    stack = RunningStack(tmp_path / "home", given=given)
    try:
        stack.start()
        assert list(stack.status()["processes"]) == ["web", "worker", "beat", "server"]
        stack.drive("people", password="a long enough password")
        job = stack.finish(stack.drive("import_checkpoint", folder="base", name="base"))
        assert job["checkpoint"]
        assert list((tmp_path / "store" / "sha256").iterdir())
        assert not (stack.folder / "postgres").exists()
    finally:
        stack.stop()
        processes.stop(messages)
        postgres.stop()


def _slowness() -> float:
    """How much slower than free this machine is now: others may be using it."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
