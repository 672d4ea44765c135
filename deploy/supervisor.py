"""Keeps a list of processes running: starts them in order, starts again what dies, stops all in reverse order."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy import processes
from deploy.processes import StartFailed

LOG_LIMIT = 20_000_000
STEADY_SECONDS = 30
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 10.0


class Stopped(Exception):
    """A signal asked to stop while something was still starting."""


@dataclass(kw_only=True)
class Child:
    """One process to keep running.

    ``command`` is called before each start. The process does its work once ``ready`` says so and its log has
    ``ready_line``. To stop it, ``stop_signals`` are sent one after another, each with its seconds of patience, before
    the whole group is killed. A ``foundation`` is stopped after all others, which need it to end well.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    env: Mapping[str, str] | None = None
    ready: Callable[[], bool] = lambda: True
    ready_line: str = ""
    foundation: bool = False
    stop_signals: tuple[tuple[signal.Signals, float], ...] = ((signal.SIGTERM, 5.0),)
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    is_ready: bool = False
    _log_start: int = 0
    _started_at: float = 0.0
    _pause: float = SHORTEST_PAUSE
    _next_start: float = 0.0

    def start(self) -> None:
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT:
            self.log.rename(self.log.with_suffix(".log.1"))
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.process = processes.start(self.command(), log=self.log, env=self.env)
        self.starts += 1
        self.is_ready = False
        self._started_at = time.monotonic()

    def look(self) -> str:
        """Start again what died, after a pause that grows while it keeps dying. Returns what to tell, if anything."""
        if self.process is None:
            return self._start_when_due()
        if self.process.poll() is not None:
            return self._bury()
        if self.is_ready or not (self._said_ready() and self.ready()):
            return ""
        self.is_ready = True
        return f"{self.name} is ready"

    def _said_ready(self) -> bool:
        if not self.ready_line:
            return True
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return self.ready_line.encode() in log.read()

    def _bury(self) -> str:
        assert self.process is not None
        processes.signal_group(self.process, signal.SIGKILL)  # what it left behind
        if time.monotonic() - self._started_at > STEADY_SECONDS:
            self._pause = SHORTEST_PAUSE
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
        self._next_start = time.monotonic() + pause
        how, self.process, self.is_ready = _ending(self.process.returncode), None, False
        return f"{self.name} {how}; it starts again in {pause:.0f} s (log: {self.log})"

    def _start_when_due(self) -> str:
        if time.monotonic() < self._next_start:
            return ""
        self.start()
        return f"{self.name} started again (start {self.starts})"

    def ask_to_stop(self) -> None:
        """The first signal; :meth:`stop` waits for what it brings."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(self.stop_signals[0][0])

    def stop(self) -> None:
        """Wait for the end, with more signals where the first does not do; then kill what is left of the group."""
        if self.process is None:
            return
        _with_patience(self.process, self.stop_signals[0][1])
        for number, seconds in self.stop_signals[1:]:
            if self.process.poll() is None:
                self.process.send_signal(number)
                _with_patience(self.process, seconds)
        processes.signal_group(self.process, signal.SIGKILL)
        self.process.wait()
        self.process = None


class Supervisor:
    """Children in the order in which they start. ``tell`` receives each line; ``changed`` follows each change."""

    def __init__(self, tell: Callable[[str], None], changed: Callable[[], None]) -> None:
        self.children: list[Child] = []
        self.stopping = False
        self._tell = tell
        self._changed = changed

    def listen(self) -> None:
        """From now on SIGINT, SIGTERM and SIGHUP end :meth:`run`; a second Ctrl-C changes nothing."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: setattr(self, "stopping", True))

    def add(self, child: Child, *, wait: float = 0) -> None:
        """Start ``child``; with ``wait`` return when it is ready. Raises :class:`StartFailed` or :class:`Stopped`."""
        child.start()
        self.children.append(child)
        self._changed()
        deadline = time.monotonic() + wait
        while wait and not child.is_ready:
            self._pass_time()
            if child.process is None or time.monotonic() > deadline:
                raise StartFailed(f"{child.name} did not come up:\n{processes.last_lines(child.log)}")
            self._report(child.look())

    def run_once(self, command: list[str], *, what: str, log: Path, env: Mapping[str, str]) -> None:
        """Run ``command`` to its end. Raises :class:`StartFailed` when it fails, :class:`Stopped` on a signal."""
        process = processes.start(command, log=log, env=env)
        try:
            while process.poll() is None:
                self._pass_time()
        finally:
            processes.signal_group(process, signal.SIGKILL)
        if process.returncode:
            raise StartFailed(f"{what} failed with code {process.returncode}:\n{processes.last_lines(log)}")

    def run(self, each_round: Callable[[], None] = lambda: None) -> None:
        """Watch over the children until a signal asks to stop."""
        while not self.stopping:
            for child in self.children:
                self._report(child.look())
            each_round()
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop all at once, then the foundations, the last started first."""
        self.stopping = True
        applications = [child for child in self.children if not child.foundation]
        for child in applications:
            child.ask_to_stop()
        for child in applications:
            child.stop()
        for child in reversed(self.children):
            child.ask_to_stop()
            child.stop()
        self.children.clear()

    def _pass_time(self) -> None:
        if self.stopping:
            raise Stopped
        time.sleep(0.05)

    def _report(self, line: str) -> None:
        if line:
            self._tell(line)
            self._changed()


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _with_patience(process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
