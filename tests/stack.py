"""A whole stack of its own for tests: `make run`'s supervisor on a fresh folder, and a driver for its services."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from deploy import processes
from deploy.home import Home

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
FROM_TESTS = ("DATABASE_URL", "CELERY_BROKER_URL", "ARTIFACT_ROOT", "IMPORT_ROOTS", "SECRET_KEY", "PLAIN_STATIC")


def until(
    ask: Callable[[], T], *, seconds: float, what: str, wait: Callable[[], object] = lambda: time.sleep(0.25)
) -> T:
    """Ask until the answer is true, with a ``wait`` in between; fails after ``seconds`` with the last answer."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds:.0f} s (last answer: {answer!r})")
        wait()
    return answer


def outside_environment() -> dict[str, str]:
    """The environment of a person who never heard of this test run."""
    return {name: value for name, value in os.environ.items() if name not in FROM_TESTS}


class RunningStack:
    """`python -m deploy.local` on ``folder``, without the demo. ``given``: real servers to use instead of its own."""

    def __init__(self, folder: Path, *, given: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.terminal.log"
        self.env = outside_environment() | {
            "DELTAWORKS_HOME": str(folder),
            "DELTAWORKS_DEMO": "0",
            "HEARTBEAT_SECONDS": "2",
            "LEASE_SECONDS": "8",
            "OMP_NUM_THREADS": "1",
            **(given or {}),
        }
        self.supervisor: subprocess.Popen[bytes] | None = None
        self._driver: subprocess.Popen[str] | None = None

    def start(self, seconds: float = 120) -> float:
        """Start and wait until every part does its work; returns how long that took."""
        began = time.monotonic()
        self.supervisor = processes.start(
            processes.tied([sys.executable, "-m", "deploy.local"]), log=self.log, env=self.env
        )
        processes.wait_for(
            lambda: bool(self.status().get("ready")), self.supervisor, what="the stack", log=self.log, seconds=seconds
        )
        return time.monotonic() - began

    def status(self) -> dict[str, Any]:
        return Home(self.folder).read("status.json") if self.folder.exists() else {}

    def pid(self, name: str) -> int:
        """The process id of the part ``name`` once it runs."""
        return until(lambda: self.status()["processes"][name]["pid"], seconds=30, what=f"{name} runs")

    def kill(self, name: str) -> None:
        """kill -9 to one part, and wait until the supervisor has started it again."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        until(
            lambda: self.pid(name) != pid and self.status()["processes"][name]["ready"],
            seconds=60,
            what=f"{name} is back",
        )

    def stop(self, number: signal.Signals = signal.SIGINT, seconds: float = 30) -> float:
        """Send ``number`` and wait for the supervisor to end; returns how long that took."""
        self._stop_driver()
        if self.supervisor is None:
            return 0.0
        began = time.monotonic()
        self.supervisor.send_signal(number)
        self.supervisor.wait(seconds)
        self.supervisor = None
        return time.monotonic() - began

    def processes_left(self) -> list[str]:
        """Command lines of living processes that work on this stack's folder or with its environment."""
        return [line for pid in _pids() if (line := _belongs(pid, str(self.folder)))]

    def drive(self, action: str, **arguments: Any) -> Any:
        """Call an action of tests/drive.py in the stack's own settings."""
        if self._driver is None:
            self._driver = subprocess.Popen(
                [sys.executable, "-m", "tests.drive"], cwd=ROOT, env=self._settings(), text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=(self.folder / "logs" / "driver.log").open("a"),
            )  # fmt: skip
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write(json.dumps({"action": action, "arguments": arguments}) + "\n")
        self._driver.stdin.flush()
        answer = json.loads(self._driver.stdout.readline() or '{"error": "the driver ended"}')
        if "error" in answer:
            raise AssertionError(f"{action}: {answer['error']}")
        return answer["value"]

    def _settings(self) -> dict[str, str]:
        """The stack's settings, computed without the settings of this test run."""
        code = (
            "import json; from pathlib import Path; from deploy.home import Home; from deploy.local import Stack\n"
            f"home = Home(Path({str(self.folder)!r})); "
            "print(json.dumps(Stack(home, home.read('status.json')['ports']).environment()))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=self.env, capture_output=True, check=True)
        settings: dict[str, str] = json.loads(done.stdout)
        return settings

    def job(self, pk: int) -> dict[str, Any]:
        answer: dict[str, Any] = self.drive("job", pk=pk)
        return answer

    def finish(self, pk: int, seconds: float = 120) -> dict[str, Any]:
        """Wait until job ``pk`` succeeded; fails at once when it ended in another way."""

        def ended() -> dict[str, Any] | None:
            job = self.job(pk)
            return job if job["state"] in ("succeeded", "failed", "cancelled", "dead") else None

        job = until(ended, seconds=seconds, what=f"job {pk} ends")
        assert job["state"] == "succeeded", job
        return job

    def complete(self, alias: str, prompt: str = "ROMEO:", timeout: float = 60) -> tuple[int, dict[str, str], Any]:
        """Ask the server as a client does: status, headers, body."""
        address = urlsplit(self.status()["api"])
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=timeout)
        try:
            body = json.dumps({"model": alias, "prompt": prompt, "max_tokens": 8, "temperature": 0})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read() or b"{}")
        finally:
            connection.close()

    def answers_from(self, alias: str, generation: int, seconds: float = 60) -> dict[str, str]:
        """Wait until the server answers from ``generation``; returns the headers of that answer."""

        def asked() -> dict[str, str] | None:
            try:
                status, headers, _body = self.complete(alias)
            except OSError:
                return None
            found = status == 200 and headers.get("x-deltaworks-generation") == str(generation)
            return headers if found else None

        return until(asked, seconds=seconds, what=f"{alias} answers from generation {generation}")

    def _stop_driver(self) -> None:
        if self._driver is not None:
            assert self._driver.stdin is not None
            self._driver.stdin.close()
            self._driver.wait(20)
            self._driver = None


def _pids() -> list[int]:
    return [
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid()
    ]


def _belongs(pid: int, mark: str) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        environment += os.readlink(f"/proc/{pid}/cwd")  # Postgres writes its title over its environment
    except OSError:
        return ""
    return f"{pid}: {line}" if line and (mark in line or mark in environment) else ""
