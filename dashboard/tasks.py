"""Doors for Celery: a message wakes, what to do is in Postgres. Nothing depends on arguments, results or delivery."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from celery import shared_task
from celery.signals import worker_process_init, worker_process_shutdown, worker_shutting_down
from django.conf import settings

from compression_worker.faults import failpoint
from dashboard.execution import STOPPING, Execution, new_execution, say_goodbye

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
GOODBYE_SECONDS = 5.0
_BUSY = threading.Lock()
"""Held by the one thread of this process that works: the one of a message, or the one that looks by itself."""
_WANTED = threading.Event()
"""Raised by whoever finds this process busy: before it rests, it looks once more."""
_ENDING = threading.Event()


@cache
def present_execution() -> Execution:
    """The one execution of this process, made at its first task."""
    return new_execution(queues=settings.WORKER_QUEUES)


@shared_task(name="dashboard.tasks.wake")
def wake(queue: str = "") -> None:
    """Claim, compute and finish steps until none is left. ``queue`` is where the message went; the rows decide."""
    failpoint("wake.receive")
    _work(Execution.run_all)


@shared_task(name="dashboard.tasks.reconcile")
def reconcile() -> None:
    """Put right what was left behind, say that this worker is alive, and take what waits."""
    _work(_tend_and_run)


def _work(what: Callable[[Execution], object]) -> None:
    """Do ``what``, and again as long as somebody asks meanwhile; nothing when another thread is at it."""
    _WANTED.set()
    while _WANTED.is_set() and _BUSY.acquire(blocking=False):
        try:
            _WANTED.clear()
            what(present_execution())
        finally:
            _BUSY.release()


@worker_process_init.connect
def _begin(**_: Any) -> None:
    """A pool process never outlives its worker, however that ended; its own child never outlives the pool process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)
    threading.Thread(target=_look_around, name="idle look", daemon=True).start()


def _look_around() -> None:
    """While no message comes, look for work now and then: jobs go on with the broker or its clock away."""
    while not _ENDING.wait(settings.IDLE_LOOK_SECONDS):
        try:
            _work(_tend_and_run)
        except Exception:  # the database may be away, or a row wrong: this thread goes on whatever happens
            log.exception("looking for work failed; again in %s s", settings.IDLE_LOOK_SECONDS)


def _tend_and_run(execution: Execution) -> None:
    execution.tend()
    execution.run_all()


@worker_shutting_down.connect
def _stop_computing(**_: Any) -> None:
    """Asked to end: running steps go back into the queue within a second, instead of holding up the shutdown."""
    STOPPING.value = 1


@worker_process_shutdown.connect
def _end_child(**_: Any) -> None:
    """Wait until a step that is being given back is written down, then end the child."""
    _ENDING.set()
    given_back = _BUSY.acquire(timeout=GOODBYE_SECONDS)
    if present_execution.cache_info().currsize:
        say_goodbye(present_execution())
    if not given_back:
        log.warning("the running step could not be given back in time: its lease runs out instead")
