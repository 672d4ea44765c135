"""Writing a new job down: the row, its first step, and the wake after the commit."""

from __future__ import annotations

import secrets
from typing import Any

from django.utils.translation import gettext as _

from compression_worker.contracts import PlannedStep
from compression_worker.faults import failpoint
from dashboard.lifecycle import JobKind, JobState, Refused, StepState
from dashboard.models import Checkpoint, Job, Step, User
from dashboard.selectors.preflight import Preflight
from dashboard.selectors.queues import default_queue, light_queue, offered_queues, step_queue
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
    queue: str = "",
    estimate: dict[str, Any] | None = None,
) -> Job:
    """A queued job. ``spec`` says it in a person's terms; ``first`` is its first step, kept in the spec for a retry.

    ``queue`` is where its heavy steps go; ``estimate`` what the pre-flight promised.
    """
    job = Job.objects.create(
        kind=kind,
        title=title[:200],
        spec=spec | {"first": first.to_json()},
        method=method,
        variant=variant,
        state=JobState.QUEUED,
        priority=priority,
        queue=queue or default_queue(),
        estimate=estimate,
        cloned_from=cloned_from,
        created_by=actor,
        is_demo=is_demo or bool(variant and variant.is_demo),
    )
    failpoint("order.job")
    steps_insert(job=job, planned=[first])
    failpoint("order.steps")
    return job


def queue_checked(queue: str) -> str:
    """``queue``, or the default one; refuses one that nobody offers."""
    offered = offered_queues()
    if queue and queue not in offered:
        raise Refused(
            _("there is no queue '%(queue)s'; known: %(known)s") % {"queue": queue, "known": ", ".join(offered)}
        )
    return queue or default_queue()


def require_fit(found: Preflight) -> dict[str, Any]:
    """What to keep of the pre-flight of a job that fits; refuses one that does not, with what would."""
    if not found.fits:
        raise Refused(found.words)
    return found.record()


def steps_insert(*, job: Job, planned: list[PlannedStep]) -> list[Step]:
    """Add a plan's steps behind the job's present ones. ``@3`` is the plan's fourth step: stored as its real index."""
    offset, light = job.steps.count(), light_queue()
    made = Step.objects.bulk_create(
        Step(
            job=job,
            index=offset + at,
            name=step.name[:100],
            group=step.group,
            kind=step.kind,
            params=step.params,
            inputs={name: _absolute(value, offset) for name, value in step.inputs.items()},
            seed=step.seed,
            queue=step_queue(step.kind, job.queue, light),
        )
        for at, step in enumerate(planned)
    )
    for queue in sorted({step.queue for step in made}):
        wake_on_commit(queue)
    return made


def wake_waiting(job: Job) -> None:
    """Wake whoever may claim one of the job's waiting steps: they need not be in its own queue."""
    waiting = job.steps.filter(state=StepState.WAITING).order_by("queue")
    for queue in waiting.values_list("queue", flat=True).distinct():
        wake_on_commit(queue)


def _absolute(value: str, offset: int) -> str:
    return f"@{offset + int(value[1:])}" if value.startswith("@") else value


def unique_seed() -> int:
    """For steps that have to be really done each time: no other step has their key."""
    return secrets.randbits(62)
