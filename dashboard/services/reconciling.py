"""Putting right what was left behind: the reconciler runs every few seconds, on any worker, one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db import connection
from django.db.models import QuerySet
from django.utils import timezone

from compression_worker.store import open_store
from dashboard.lifecycle import BlockedReason, JobState, StepState
from dashboard.models import Job, Step, Worker
from dashboard.services.approvals import approvals_expire
from dashboard.services.endings import job_move
from dashboard.services.logs import log_line
from dashboard.services.rehearsals import rehearsals_renew
from dashboard.services.releases import deployments_observe
from dashboard.services.steps import job_settle, leases_return, ready_step
from dashboard.services.units import recorded, unit_of_work
from dashboard.services.wakes import wake_on_commit

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
    with recorded(actor=None, reason="reconciled"):
        _return_leases()
        _resume_blocked()
        approvals_expire()
        rehearsals_renew()
        Worker.objects.filter(seen_at__lt=timezone.now() - WORKER_FORGOTTEN).delete()
    deployments_observe()
    _wake_queues()
    return True


def _lock() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [LOCK])
        row: tuple[bool] = cursor.fetchone()
    return row[0]


def _return_leases() -> None:
    """Also of jobs that somebody cancelled while their worker was gone: those are never claimed again."""
    lapsed = Step.objects.filter(state=StepState.RUNNING).extra(where=["lease_until < clock_timestamp()"])
    for job in _locked_jobs(lapsed.values_list("job_id", flat=True)):
        if leases_return(job):
            log_line(job=job, level="warning", text="a worker was lost: its step goes back into the queue")
    for job in _locked_jobs(Job.objects.filter(state=JobState.RUNNING).exclude(cancel_requested="").values("pk")):
        job_settle(job)


def _locked_jobs(ids: Iterable[int] | QuerySet[Any, Any]) -> list[Job]:
    """Jobs that nobody is writing to just now: the others are in good hands, or it will be their turn next time."""
    return list(Job.objects.select_for_update(no_key=True, skip_locked=True).filter(pk__in=ids).order_by("pk"))


def _resume_blocked() -> None:
    """Go on with the jobs that waited for room, now that there is some."""
    waiting = Job.objects.filter(state=JobState.BLOCKED, blocked_reason=BlockedReason.DISK)
    if not waiting.exists():
        return
    if open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE).free_bytes() < settings.RESUME_FREE_BYTES:
        return
    for job in _locked_jobs(waiting.values("pk")):
        if job.steps.filter(state=StepState.WAITING, not_before__gt=timezone.now()).exists():
            continue
        running = job.steps.filter(state=StepState.RUNNING).exists()
        job_move(job, JobState.RUNNING if running else JobState.QUEUED)


def _wake_queues() -> None:
    queues = Step.objects.filter(state=StepState.WAITING, job__state__in=[JobState.QUEUED, JobState.RUNNING])
    for queue in queues.order_by("queue").values_list("queue", flat=True).distinct():
        if ready_step([queue]) is not None:
            wake_on_commit(queue)


@unit_of_work
def worker_seen(*, name: str, queues: list[str], device: str, pid: int) -> None:
    """Note that a worker process is alive."""
    now = timezone.now()
    known = Worker.objects.filter(name=name).update(queues=",".join(queues), device=device, pid=pid, seen_at=now)
    if not known:
        Worker.objects.get_or_create(
            name=name,
            defaults={
                "queues": ",".join(queues),
                "device": device,
                "pid": pid,
                "started_at": now,
                "seen_at": now,
            },
        )


@unit_of_work
def worker_gone(*, name: str) -> None:
    """A worker process said good-bye."""
    Worker.objects.filter(name=name).delete()
