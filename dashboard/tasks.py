"""Doors for Celery: a message wakes, what to do is in Postgres. Nothing depends on arguments, results or delivery."""

from __future__ import annotations

import ctypes
import os
import signal
from functools import cache
from typing import Any

from celery import shared_task
from celery.signals import worker_process_init, worker_process_shutdown, worker_shutting_down
from django.conf import settings

from dashboard.execution import STOPPING, Execution, new_execution, say_goodbye

PR_SET_PDEATHSIG = 1


@cache
def present_execution() -> Execution:
    """The one execution of this process, made at its first task."""
    return new_execution(queues=settings.WORKER_QUEUES)


@shared_task(name="dashboard.tasks.wake")
def wake(queue: str = "") -> None:
    """Claim, compute and finish steps until none is left. ``queue`` is where the message went; the rows decide."""
    present_execution().run_all()


@shared_task(name="dashboard.tasks.reconcile")
def reconcile() -> None:
    """Put right what was left behind, and say that this worker is alive."""
    present_execution().tend()


@worker_process_init.connect
def _die_with_the_worker(**_: Any) -> None:
    """A pool process never outlives its worker, however that ended; its own child never outlives the pool process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)


@worker_shutting_down.connect
def _stop_computing(**_: Any) -> None:
    """Asked to end: running steps go back into the queue within a second, instead of holding up the shutdown."""
    STOPPING.value = 1


@worker_process_shutdown.connect
def _end_child(**_: Any) -> None:
    if present_execution.cache_info().currsize:
        say_goodbye(present_execution())
