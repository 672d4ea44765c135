"""The supervisor: what dies comes back, and a stop leaves nothing, children of children included."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from deploy import processes
from deploy.processes import StartFailed
from deploy.supervisor import Child, Supervisor

SLEEPER = (
    "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
)


def _child(tmp_path: Path, code: str, name: str = "child") -> Child:
    command = processes.tied([sys.executable, "-c", code])
    return Child(
        name=name, command=lambda: command, log=tmp_path / f"{name}.log", stop_signals=((signal.SIGTERM, 2.0),)
    )


def _until(supervisor: Supervisor, condition: object, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds

    def check() -> None:
        supervisor.stopping = bool(condition()) or time.monotonic() > deadline  # type: ignore[operator]

    supervisor.run(check)
    assert condition()  # type: ignore[operator]


def test_a_killed_child_comes_back_and_the_log_says_why(tmp_path: Path) -> None:
    told: list[str] = []
    supervisor = Supervisor(told.append, lambda: None)
    child = _child(tmp_path, SLEEPER)
    supervisor.add(child, wait=5)
    assert child.process is not None
    child.process.send_signal(signal.SIGKILL)
    _until(supervisor, lambda: child.starts == 2)
    supervisor.stop()
    assert any("was killed by SIGKILL" in line for line in told)


def test_the_pause_before_a_restart_grows(tmp_path: Path) -> None:
    told: list[str] = []
    supervisor = Supervisor(told.append, lambda: None)
    child = _child(tmp_path, "raise SystemExit(3)")
    supervisor.add(child)
    _until(supervisor, lambda: sum("ended with code 3" in line for line in told) == 3)
    supervisor.stop()
    pauses = [line.split("again in ")[1].split(" s")[0] for line in told if "ended with code 3" in line]
    assert pauses == ["1", "2", "4"]


def test_stopping_ends_the_children_of_children(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda line: None, lambda: None)
    child = _child(tmp_path, SLEEPER)
    supervisor.add(child)
    _until(supervisor, lambda: child.log.read_text().strip())
    grandchild = int(child.log.read_text())
    supervisor.stop()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{grandchild}/fd").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(grandchild, 0)


def test_a_child_that_does_not_come_up_is_named_with_its_last_words(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda line: None, lambda: None)
    child = _child(tmp_path, "print('no port left'); raise SystemExit(1)", name="web")
    child.ready = lambda: False
    with pytest.raises(StartFailed, match=r"web did not come up:\nno port left"):
        supervisor.add(child, wait=10)
    supervisor.stop()


def test_a_command_that_fails_stops_the_start(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda line: None, lambda: None)
    with pytest.raises(StartFailed, match="preparing failed with code 2"):
        supervisor.run_once(
            [sys.executable, "-c", "raise SystemExit(2)"], what="preparing", log=tmp_path / "log", env=os.environ
        )


def test_a_child_is_ready_when_its_log_says_so_since_its_last_start(tmp_path: Path) -> None:
    supervisor = Supervisor(lambda line: None, lambda: None)
    child = _child(tmp_path, "import time; time.sleep(0.3); print('now ready.', flush=True); time.sleep(60)")
    child.log.write_text("an earlier run was ready.\n")
    child.ready_line = " ready."
    supervisor.add(child)
    assert child.look() == ""
    _until(supervisor, lambda: child.is_ready)
    supervisor.stop()
