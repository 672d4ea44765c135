"""How jobs change state and end: published, failed, cancelled, dead. The caller holds the job's row lock."""

from __future__ import annotations

from typing import Any

from django.db import DataError, IntegrityError, transaction
from django.utils import timezone

from dashboard.lifecycle import (
    TERMINAL_JOB_STATES,
    AttemptOutcome,
    JobKind,
    JobState,
    Refused,
    StepState,
    job_next,
)
from dashboard.models import Attempt, Job
from dashboard.services.evaluations import evaluation_publish
from dashboard.services.registry import artifact_publish, checkpoint_publish
from dashboard.services.releases import certificate_publish

PUBLISHERS: dict[str, Any] = {
    JobKind.IMPORT: checkpoint_publish,
    JobKind.COMPRESS: artifact_publish,
    JobKind.EVALUATE: evaluation_publish,
    JobKind.REHEARSE: certificate_publish,
}


def job_move(job: Job, target: JobState, *, blocked_reason: str = "") -> None:
    """Bring the job into ``target``, if its lifecycle allows that from where it is."""
    job.state = job_next(job.state, target)
    job.blocked_reason = blocked_reason
    if target == JobState.RUNNING and job.started_at is None:
        job.started_at = timezone.now()
    if target in TERMINAL_JOB_STATES:
        job.finished_at = timezone.now()
    job.save()


def job_end(job: Job, target: JobState, *, code: str = "", message: str = "") -> None:
    """A terminal state, with what to tell the person. Steps that did not end by themselves are cancelled."""
    job.error_code, job.error = code[:64], message.replace("\0", "")
    cancel_rest(job)
    job_move(job, target)


def cancel_rest(job: Job) -> None:
    """Cancel the steps that are waiting or running. Whoever still computes one finds its fence closed."""
    now = timezone.now()
    Attempt.objects.filter(step__job=job, step__state=StepState.RUNNING, outcome=AttemptOutcome.RUNNING).update(
        outcome=AttemptOutcome.CANCELLED, finished_at=now
    )
    job.steps.filter(state__in=[StepState.WAITING, StepState.RUNNING]).update(
        state=StepState.CANCELLED, owner="", lease_until=None, finished_at=now
    )


def job_succeed(job: Job) -> None:
    """All steps are done: check the result and publish it, in the transaction that makes the job succeeded."""
    job_move(job, JobState.VERIFYING)
    try:
        with transaction.atomic():
            PUBLISHERS[job.kind](job=job, step=job.steps.order_by("-index")[0])
    except Refused as refusal:
        job_end(job, JobState.FAILED, code="refused_result", message=str(refusal))
    except (KeyError, TypeError, ValueError, DataError, IntegrityError) as error:
        job_end(job, JobState.FAILED, code="bad_result", message=f"the result cannot be published: {error!r}")
    else:
        job_move(job, JobState.SUCCEEDED)
