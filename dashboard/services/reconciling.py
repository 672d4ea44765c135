"""Putting right what was left behind: the reconciler runs every few seconds, on any worker, one at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from django.conf import settings
from django.db import InterfaceError, OperationalError, connection, transaction
from django.db.models import QuerySet
from django.utils import timezone

from compression_worker.faults import failpoint
from compression_worker.machine import Machine
from compression_worker.store import open_store
from dashboard import transitions
from dashboard.lifecycle import OPEN_STEP_STATES, BlockedReason, JobState, Refused, StepState
from dashboard.models import Job, Step, Worker
from dashboard.services.approvals import approvals_expire
from dashboard.services.attempts import leases_return, step_facts
from dashboard.services.endings import job_apply, job_facts, job_settle
from dashboard.services.logs import log_line
from dashboard.services.rehearsals import rehearsals_renew
from dashboard.services.releases import deployments_observe
from dashboard.services.steps import ready_step
from dashboard.services.units import recorded, unit_of_work
from dashboard.services.wakes import wake_on_commit

log = logging.getLogger(__name__)

LOCK = 7_301_001
"""The number of the advisory lock that only one reconciler holds at a time."""
WORKER_FORGOTTEN = timedelta(hours=24)


@unit_of_work
def reconcile() -> bool:
    """Return lapsed leases, resume what waited for room, wake queues with work, observe servers, close what expired.

    False when another reconciler is at it. Harmless at any time, and needed only when something went wrong.
    """
    if not _lock():
        return False
    failpoint("reconcile.locked")
    with recorded(actor=None, reason="reconciled"):
        for part in (_return_leases, _end_cancelled, _resume_blocked, approvals_expire, rehearsals_renew, _forget):
            _apart(part)
        failpoint("reconcile.returned")
    _apart(deployments_observe)
    _wake_queues()
    return True


def _apart(part: Callable[[], object], what: str = "") -> None:
    """Do one part on its own: what is wrong with it is logged, and holds up nothing else. A lost database does."""
    try:
        with transaction.atomic():
            part()
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        log.exception("reconciling: %s failed; the rest goes on", what or part.__name__.strip("_"))


def _lock() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [LOCK])
        row: tuple[bool] = cursor.fetchone()
    return row[0]


def _return_leases() -> None:
    lapsed = Step.objects.filter(state=StepState.RUNNING).extra(where=["lease_until < clock_timestamp()"])
    for job in _locked_jobs(lapsed.values_list("job_id", flat=True)):
        _apart(partial(_return_leases_of, job), f"job {job.pk}")


def _return_leases_of(job: Job) -> None:
    if leases_return(job):
        log_line(job=job, level="warning", text="a worker was lost: its step goes back into the queue")


def _end_cancelled() -> None:
    """Jobs that somebody cancelled while their worker was gone: those are never claimed again."""
    for job in _locked_jobs(Job.objects.filter(state=JobState.RUNNING).exclude(cancel_requested="").values("pk")):
        _apart(partial(job_settle, job), f"job {job.pk}")


def _forget() -> None:
    Worker.objects.filter(seen_at__lt=timezone.now() - WORKER_FORGOTTEN).delete()


def _locked_jobs(ids: Iterable[int] | QuerySet[Any, Any]) -> list[Job]:
    """Jobs that nobody is writing to just now: the others are in good hands, or it will be their turn next time."""
    return list(Job.objects.select_for_update(no_key=True, skip_locked=True).filter(pk__in=ids).order_by("pk"))


def _resume_blocked() -> None:
    """Go on with the jobs that waited, now that there is room; what waits for something else than room looks again."""
    waiting = Job.objects.filter(state=JobState.BLOCKED)
    if not waiting.exists():
        return
    store = open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE)
    has_room = store.free_bytes() >= settings.RESUME_FREE_BYTES
    for job in _locked_jobs(waiting.values("pk")):
        steps = [step_facts(step) for step in job.steps.filter(state__in=sorted(OPEN_STEP_STATES))]
        is_there = has_room or job.blocked_reason != BlockedReason.DISK
        with contextlib.suppress(Refused):
            job_apply(job, transitions.resume(job_facts(job), steps, has_room=is_there, now=timezone.now()))


def _wake_queues() -> None:
    queues = Step.objects.filter(state=StepState.WAITING, job__state__in=[JobState.QUEUED, JobState.RUNNING])
    for queue in queues.order_by("queue").values_list("queue", flat=True).distinct():
        if ready_step([queue]) is not None:
            failpoint("reconcile.wake")
            wake_on_commit(queue)


@unit_of_work
def worker_seen(
    *,
    name: str,
    queues: list[str],
    device: str,
    pid: int,
    machine: Machine | None = None,
    code_version: str = "",
    trouble: str = "",
) -> None:
    """Note that a worker process is alive, and what it has."""
    failpoint("worker.seen")
    now = timezone.now()
    facts = {"queues": ",".join(queues), "device": device, "pid": pid, "seen_at": now, "code_version": code_version}
    facts |= {"trouble": trouble}
    facts |= asdict(machine) if machine else {}
    if not Worker.objects.filter(name=name).update(**facts):
        Worker.objects.get_or_create(name=name, defaults=facts | {"started_at": now})


@unit_of_work
def worker_gone(*, name: str) -> None:
    """A worker process said good-bye."""
    Worker.objects.filter(name=name).delete()
