"""What breaks the fleet during a soak: a seeded choice of faults, each written to the history before it happens."""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg

from deploy.postgres import clear_leftovers
from tests.reliability.fleet import LEASE_SECONDS, Fleet
from tests.reliability.workload import History

MEAN_PAUSE_SECONDS = 0.2


class Nemesis:
    """Faults at random moments. What it stops it lets go on; what it kills the fleet starts again."""

    def __init__(self, fleet: Fleet, history: History, rng: random.Random, protected: set[str]) -> None:
        self.fleet, self.history, self.rng, self.protected = fleet, history, rng, protected
        self.done: Counter[str] = Counter()
        self._stopped: list[tuple[float, int]] = []
        self._next = time.monotonic()
        quick = fleet.broker.name == "redis"
        self.kinds: dict[str, tuple[float, Callable[[], str]]] = {
            "kill child": (26, lambda: self._kill(fleet.computing())),
            "kill pool process": (9, lambda: self._kill(fleet.pools())),
            "kill worker": (4, lambda: self._kill(fleet.mains())),
            "kill beat": (2, lambda: self._kill([fleet.beat.process.pid] if fleet.beat.process else [])),
            "stop child": (8, lambda: self._stop(fleet.computing())),
            "stop pool process": (9, lambda: self._stop(fleet.pools())),
            "stop worker": (3, lambda: self._stop(fleet.mains())),
            "stop Postgres at once": (3, self._restart_postgres),
            "cut all connections": (8, self._cut_connections),
            "flush the broker": (8, self._flush_broker),
            "kill the broker": (4 if quick else 0.5, self._kill_broker),
            "double wakes": (6, self._double_wakes),
            "flip a bit": (6, lambda: self._damage(_flip)),
            "cut a file": (4, lambda: self._damage(_cut)),
            "remove a file": (3, lambda: self._damage(_remove)),
        }

    @property
    def count(self) -> int:
        return sum(self.done.values())

    def look(self, allowed: bool) -> None:
        """Let go on what was stopped long enough; when a fault is due and ``allowed``, do it."""
        now = time.monotonic()
        while self._stopped and self._stopped[0][0] <= now:
            self._continue(heapq.heappop(self._stopped)[1])
        if not allowed or now < self._next:
            return
        names = list(self.kinds)
        name = self.rng.choices(names, [self.kinds[one][0] for one in names])[0]
        told = self.kinds[name][1]()
        if told:
            self.done[name] += 1
            self.history.add("fault", kind=name, what=told)
        self._next = time.monotonic() + self.rng.expovariate(1 / MEAN_PAUSE_SECONDS)

    def relent(self) -> None:
        """Nothing stays stopped."""
        while self._stopped:
            self._continue(heapq.heappop(self._stopped)[1])

    def _kill(self, pids: list[int]) -> str:
        """Returns what was done, nothing when there was nothing to do it to."""
        if not pids:
            return ""
        pid = self.rng.choice(sorted(pids))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return str(pid)
        return ""

    def _stop(self, pids: list[int]) -> str:
        held = {pid for _, pid in self._stopped}
        if not (free := sorted(set(pids) - held)):
            return ""
        pid, seconds = self.rng.choice(free), LEASE_SECONDS * self.rng.uniform(0.5, 2.0)
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return ""
        heapq.heappush(self._stopped, (time.monotonic() + seconds, pid))
        return f"{pid} for {seconds:.1f} s"

    def _continue(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _restart_postgres(self) -> str:
        postgres = self.fleet.run.world.postgres
        assert postgres.process is not None
        postgres.process.send_signal(signal.SIGQUIT)
        postgres.process.wait()
        clear_leftovers(postgres.folder)
        postgres.start()
        return "immediate"

    def _cut_connections(self) -> str:
        with psycopg.connect(self.fleet.run.world.postgres.url(), autocommit=True) as connection:
            cut = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = %s",
                [self.fleet.run.database],
            ).fetchone()
        return f"{cut[0] if cut else 0} connections"

    def _flush_broker(self) -> str:
        self.fleet.broker.flush()
        return "flushed"

    def _kill_broker(self) -> str:
        self.fleet.broker.kill()
        self.fleet.broker.start()
        return "killed and started"

    def _double_wakes(self) -> str:
        from kombu import Connection

        sent = 0
        with contextlib.suppress(Exception), Connection(self.fleet.broker.url(), connect_timeout=1) as wire:
            from dashboard.celery import app

            for _ in range(20):
                app.send_task("dashboard.tasks.wake", args=["cpu"], queue="cpu", connection=wire, retry=False)
                sent += 1
        return f"{sent} wakes" if sent else ""

    def _damage(self, how: Callable[[Path, random.Random], None]) -> str:
        """To a blob that a step has made: what came from outside cannot be made again, so it is left alone."""
        found = sorted(
            path for path in (self.fleet.run.store / "sha256").glob("*/*") if path.name not in self.protected
        )
        if not found:
            return ""
        path = self.rng.choice(found)
        with contextlib.suppress(OSError):
            how(path, self.rng)
            return path.name
        return ""


def _flip(path: Path, rng: random.Random) -> None:
    path.chmod(0o644)
    size = path.stat().st_size
    with path.open("r+b") as file:
        at = rng.randrange(size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def _cut(path: Path, rng: random.Random) -> None:
    path.chmod(0o644)
    os.truncate(path, rng.randrange(path.stat().st_size))


def _remove(path: Path, rng: random.Random) -> None:
    path.unlink()
