"""Writing a new job down: the row, its first step, and the wake after the commit."""

from __future__ import annotations

import secrets
from typing import Any

from django.conf import settings

from compression_worker.contracts import PlannedStep
from compression_worker.faults import failpoint
from dashboard.lifecycle import JobKind, JobState
from dashboard.models import Checkpoint, Job, Step, User
from dashboard.services.wakes import wake_on_commit


def job_order(
    *,
    actor: User,
    kind: JobKind,
    title: str,
    spec: dict[str, Any],
    first: PlannedStep,
    variant: Checkpoint | None = None,
    method: str = "",
    priority: int = 0,
    cloned_from: Job | None = None,
    is_demo: bool = False,
) -> Job:
    """A queued job. ``spec`` says it in a person's terms; ``first`` is its first step, kept in the spec for a retry."""
    job = Job.objects.create(
        kind=kind,
        title=title[:200],
        spec=spec | {"first": first.to_json()},
        method=method,
        variant=variant,
        state=JobState.QUEUED,
        priority=priority,
        queue=settings.WORKER_QUEUES[0],
        cloned_from=cloned_from,
        created_by=actor,
        is_demo=is_demo or bool(variant and variant.is_demo),
    )
    failpoint("order.job")
    steps_insert(job=job, planned=[first])
    failpoint("order.steps")
    wake_on_commit(job.queue)
    return job


def steps_insert(*, job: Job, planned: list[PlannedStep]) -> list[Step]:
    """Add a plan's steps behind the job's present ones. ``@3`` is the plan's fourth step: stored as its real index."""
    offset = job.steps.count()
    return Step.objects.bulk_create(
        Step(
            job=job,
            index=offset + at,
            name=step.name[:100],
            group=step.group,
            kind=step.kind,
            params=step.params,
            inputs={name: _absolute(value, offset) for name, value in step.inputs.items()},
            seed=step.seed,
            queue=job.queue,
        )
        for at, step in enumerate(planned)
    )


def _absolute(value: str, offset: int) -> str:
    return f"@{offset + int(value[1:])}" if value.startswith("@") else value


def unique_seed() -> int:
    """For steps that have to be really done each time: no other step has their key."""
    return secrets.randbits(62)
