"""Machines and room: workers as they last reported themselves, the store's size, the queue."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import Count, Q, Sum
from django.utils import timezone

from dashboard.lifecycle import ACTIVE_JOB_STATES, StepState
from dashboard.models import Artifact, Checkpoint, SampleSet, Step, User, Worker


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


@dataclass(frozen=True)
class Room:
    """Bytes on the store's disk, and what the rows say lies in it; blobs are shared, so parts may add up to more."""

    total: int
    free: int
    checkpoints: int
    artifacts: int
    sample_sets: int

    @property
    def used(self) -> int:
        return self.total - self.free


def storage_room() -> Room:
    folder = Path(settings.ARTIFACT_ROOT)
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    return Room(
        total=disk.total,
        free=disk.free,
        checkpoints=Checkpoint.objects.aggregate(n=Sum("size_bytes"))["n"] or 0,
        artifacts=Artifact.objects.aggregate(n=Sum("artifact_bytes"))["n"] or 0,
        sample_sets=SampleSet.objects.aggregate(n=Sum("size_bytes"))["n"] or 0,
    )


def user_list() -> list[User]:
    return list(User.objects.order_by("username"))
