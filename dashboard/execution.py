"""Running what was claimed: one warm child per worker process, watched, heard, and reported through the services.

The parent only waits, beats and writes. When the database goes away the child goes on computing and the parent tries
again; when it cannot renew its lease for too long, by its own monotonic clock, it kills the child: somebody else may
hold the step by then.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import InterfaceError, OperationalError, close_old_connections
from django.utils import timezone

from compression_worker import faults
from compression_worker.contracts import CODE_VERSION
from compression_worker.faults import failpoint
from compression_worker.launcher import Launcher, Outcome, child_command
from compression_worker.machine import this_machine
from dashboard.celery import RECONCILE_SECONDS
from dashboard.lifecycle import CancelRequest
from dashboard.quarantine import Quarantine
from dashboard.selectors.jobs import typical_seconds
from dashboard.services.demo import demo_advance
from dashboard.services.logs import log_append
from dashboard.services.reconciling import reconcile, worker_gone, worker_seen
from dashboard.services.steps import (
    Claim,
    LeaseLost,
    Progress,
    step_claim,
    step_finish,
    step_heartbeat,
    step_release,
    step_watch,
)
from dashboard.services.storage import storage_tend
from dashboard.services.studies import studies_advance
from dashboard.services.units import forget_broken_connection, persist
from dashboard.transitions import STALLED, has_stalled, progress_limit

log = logging.getLogger(__name__)

DATABASE_AWAY = (OperationalError, InterfaceError)
SELF_FENCE_SHARE = 0.75
WATCH_SECONDS = 1.0
PROGRESS_SECONDS = 2.0
LOG_SECONDS = 1.0
LOG_LINES_HELD = 5_000
MEASURE_SECONDS = 60.0
"""How often a step that has not moved for long is measured anew against others of its kind."""
FINISH_PATIENCE_SECONDS = 900.0
STOPPING = multiprocessing.RawValue("b", 0)
"""Raised in the main process of a Celery worker when it is asked to end. Its pool processes, forked from it, share the
byte; it has no lock, since one of them may be killed at any time."""


@dataclass(kw_only=True)
class Watch:
    """One claim under computation: its lease, its progress and log on the way to Postgres, and whether to kill it."""

    claim: Claim
    tend: Callable[[], object]
    renewed: float = field(default_factory=time.monotonic)
    beaten: float = 0.0
    looked: float = 0.0
    logged: float = 0.0
    reconciled: float = field(default_factory=time.monotonic)
    progress: Progress = field(default_factory=Progress)
    stored: Progress = field(default_factory=Progress)
    lines: list[tuple[datetime, str, str]] = field(default_factory=list)
    lost: bool = False
    stopping: bool = False
    returned: str = ""
    moved: float = field(default_factory=time.monotonic)
    measured: float = 0.0
    limit: float = 0.0
    stalled: str = ""

    def on_event(self, event: dict[str, Any]) -> None:
        """A progress or log line of the child."""
        if event.get("type") == "progress":
            progress = Progress(done=int(event["done"]), total=int(event["total"]), unit=str(event["unit"]))
            if progress != self.progress:
                self.progress, self.moved = progress, time.monotonic()
        elif event.get("type") == "log" and len(self.lines) < LOG_LINES_HELD:
            self.lines.append((timezone.now(), str(event.get("level", "info")), str(event.get("text", ""))))
        elif event.get("type") == "fault":
            faults.ACTIONS[event["action"]]()

    def tick(self) -> bool:
        """What is due now; True kills the child. Quick, and never raising when the database is away."""
        if STOPPING.value:
            self.stopping = True
            return True
        try:
            return self._look()
        except LeaseLost as error:
            log.warning("%s", error)
            self.lost = True
        except DATABASE_AWAY as error:
            log.warning("the database is away: %s", error)
            forget_broken_connection()
            self.lost = self.out_of_touch()
        return self.lost

    def _look(self) -> bool:
        now = time.monotonic()
        asked = ""
        if self._heartbeat_due(now):
            asked = step_heartbeat(claim=self.claim, progress=self.progress)
            self.renewed = self.beaten = self.looked = now
            self.stored = self.progress
        elif now - self.looked >= WATCH_SECONDS:
            failpoint("execute.watch")
            asked = step_watch(claim=self.claim)
            self.looked = now
        if now - self.logged >= LOG_SECONDS:
            self.flush()
        if now - self.reconciled >= RECONCILE_SECONDS:
            self.reconciled = now
            self.tend()
        return asked == CancelRequest.KILL or self._stands_still(now)

    def _stands_still(self, now: float) -> bool:
        """Whether nothing has moved for longer than steps of this kind may take, while this worker is alive."""
        quiet = now - self.moved
        if not has_stalled(quiet, settings.PROGRESS_LIMIT_SECONDS):
            return False
        if not self.measured or now - self.measured >= MEASURE_SECONDS:
            typical = typical_seconds(self.claim.job_id, self.claim.spec.kind)
            least, factor = settings.PROGRESS_LIMIT_SECONDS, settings.PROGRESS_LIMIT_FACTOR
            self.limit = progress_limit(typical, factor=factor, least_seconds=least)
            self.measured = now
        if has_stalled(quiet, self.limit):
            self.stalled = f"nothing moved for {quiet:.0f} s, and the limit for such a step is {self.limit:.0f} s"
        return bool(self.stalled)

    def ending(self, outcome: Outcome) -> Outcome:
        """``outcome``, or why the child was killed before it had one."""
        if self.stalled and outcome.kind == "cancelled":
            return Outcome(kind="killed", code=STALLED, message=self.stalled, signal=signal.SIGKILL)
        return outcome

    def out_of_touch(self) -> bool:
        """Whether the lease could not be renewed for so long that somebody else may soon hold the step."""
        limit: float = SELF_FENCE_SHARE * settings.LEASE_SECONDS
        return time.monotonic() - self.renewed > limit

    def _heartbeat_due(self, now: float) -> bool:
        """In time for the lease, and sooner when there is progress to show."""
        news = self.progress != self.stored and now - self.beaten >= PROGRESS_SECONDS
        beat: bool = now - self.renewed >= settings.HEARTBEAT_SECONDS
        return news or beat

    def flush(self) -> None:
        """Hand the collected log lines over; they are kept for the next time when the database is away."""
        self.logged = time.monotonic()
        if self.lines:
            log_append(job_id=self.claim.job_id, step_id=self.claim.step_id, lines=self.lines)
            self.lines = []


class Execution:
    """A worker process: its name, its queues, and its warm child."""

    def __init__(self, *, name: str, queues: list[str], launcher: Launcher) -> None:
        self.name = name
        self.queues = queues
        self.quarantine = Quarantine(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE)
        self._launcher = launcher

    def run_all(self) -> int:
        """Claim, compute and finish until nothing is left; returns how many steps that were."""
        count = 0
        while not STOPPING.value and self.run_one():
            count += 1
        return count

    def run_one(self) -> bool:
        """One step, if there is one."""
        close_old_connections()
        is_held = self.quarantine.holds()
        self.announce()
        if is_held:
            return False
        claim = step_claim(worker=self.name, queues=self.queues)
        if claim is None:
            demo_advance()
            studies_advance()
            claim = step_claim(worker=self.name, queues=self.queues)
        if claim is None:
            return False
        self._run(claim)
        return True

    def announce(self) -> None:
        """Tell the others that this worker is alive."""
        machine = this_machine(settings.STEP_MEMORY_LIMIT_MB)
        worker_seen(
            name=self.name,
            queues=self.queues,
            device=settings.STEP_DEVICE,
            pid=os.getpid(),
            machine=machine,
            code_version=CODE_VERSION,
            trouble=self.quarantine.trouble,
        )

    def tend(self) -> None:
        """What an idle worker does now and then, and a busy one between two looks at its child."""
        self.announce()
        reconcile()
        demo_advance()
        studies_advance()
        storage_tend()

    def _run(self, claim: Claim) -> None:
        log.info("job %s: step '%s', attempt %s", claim.job_id, claim.name, claim.attempt)
        failpoint("execute.claimed")
        watch = Watch(claim=claim, tend=self.tend)
        outcome = self._compute(claim, watch)
        failpoint("execute.outcome")
        if self.quarantine.judge(outcome):
            watch.returned = f"{self.quarantine.trouble}: the step goes back into the queue"
        try:
            _report(claim, watch, outcome)
            failpoint("execute.reported")
        except LeaseLost as error:
            log.warning("job %s: step '%s' was taken over: %s", claim.job_id, claim.name, error)

    def _compute(self, claim: Claim, watch: Watch) -> Outcome:
        try:
            with self._self_fence(watch):
                return self._launcher.run(claim.spec, cached=claim.cached, on_event=watch.on_event, tick=watch.tick)
        except Exception as error:  # whatever broke in the parent counts as an attempt, with its reason
            log.exception("job %s: step '%s' could not be run", claim.job_id, claim.name)
            return Outcome(kind="errored", message=f"the worker could not run the step: {error!r}")

    @contextmanager
    def _self_fence(self, watch: Watch) -> Iterator[None]:
        """Kill the child from a thread of its own when the lease cannot be renewed, even while a query hangs."""
        over = threading.Event()

        def guard() -> None:
            while not over.wait(WATCH_SECONDS):
                if watch.out_of_touch():
                    watch.lost = True
                    kill_group(self._launcher.pid)
                    return

        thread = threading.Thread(target=guard, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def close(self) -> None:
        """End the child."""
        self._launcher.close()


def kill_group(pid: int) -> None:
    """Kill a child and what it started; it may be gone already."""
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _report(claim: Claim, watch: Watch, outcome: Outcome) -> None:
    """Write down what the child came to. The result is in the store, so this is tried until Postgres is back."""
    try:
        persist(lambda: _write(claim, watch, outcome), tries=1_000, patience=FINISH_PATIENCE_SECONDS)
    except (LeaseLost, *DATABASE_AWAY):
        raise
    except Exception as error:  # a result that cannot be written down is an attempt that broke, not a lost worker
        log.exception("job %s: the end of step '%s' could not be written", claim.job_id, claim.name)
        step_finish(claim=claim, outcome=Outcome(kind="errored", message=f"its result was not taken: {error!r}"))


def _write(claim: Claim, watch: Watch, outcome: Outcome) -> None:
    watch.flush()
    if watch.stopping or watch.returned:
        reason = watch.returned or "the worker was stopped: the step goes back into the queue"
        step_release(claim=claim, detail=reason)
    elif not watch.lost:
        step_finish(claim=claim, outcome=watch.ending(outcome))


def new_execution(*, queues: list[str]) -> Execution:
    """The execution of this process, as the settings say; its child starts with the first step."""
    roots = {name: Path(path) for name, path in settings.IMPORT_ROOTS.items()}
    command = child_command(settings.ARTIFACT_ROOT, roots, settings.STEP_DEVICE, settings.ARTIFACT_CACHE)
    launcher = Launcher(command, memory_limit_mb=settings.STEP_MEMORY_LIMIT_MB)
    return Execution(name=f"{socket.gethostname()}-{os.getpid()}", queues=queues, launcher=launcher)


def say_goodbye(execution: Execution) -> None:
    """End the child and take the worker off the list; a database that is away only leaves a stale line there."""
    execution.close()
    try:
        worker_gone(name=execution.name)
    except DATABASE_AWAY as error:
        log.warning("the database is away: %s", error)
