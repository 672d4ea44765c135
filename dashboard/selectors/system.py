"""Machines: workers as they last reported themselves, and the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db.models import Count, Q
from django.utils import timezone

from dashboard.lifecycle import ACTIVE_JOB_STATES, StepState
from dashboard.models import Step, User, Worker


@dataclass(frozen=True)
class WorkerRow:
    worker: Worker
    is_alive: bool
    step: Step | None


def worker_rows() -> list[WorkerRow]:
    alive_since = timezone.now() - timedelta(seconds=2 * settings.LEASE_SECONDS)
    running = {step.owner: step for step in Step.objects.filter(state=StepState.RUNNING).select_related("job")}
    return [
        WorkerRow(worker, worker.seen_at >= alive_since, running.get(worker.name)) for worker in Worker.objects.all()
    ]


def queue_depths() -> list[Mapping[str, Any]]:
    """Waiting and running steps of unfinished jobs, by queue."""
    steps = Step.objects.filter(job__state__in=ACTIVE_JOB_STATES)
    depths: list[Mapping[str, Any]] = [
        *steps.values("queue")
        .annotate(
            waiting=Count("pk", filter=Q(state=StepState.WAITING)),
            running=Count("pk", filter=Q(state=StepState.RUNNING)),
        )
        .order_by("queue")
    ]
    return depths


def user_list() -> list[User]:
    return list(User.objects.order_by("username"))
