"""How jobs change state and end: published, failed, cancelled, dead. The caller holds the job's row lock.

``dashboard.transitions`` decides; here its decisions about jobs become rows.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from django.db import DataError, IntegrityError, transaction
from django.utils import timezone

from compression_worker.faults import failpoint
from dashboard import transitions
from dashboard.lifecycle import OPEN_STEP_STATES, AttemptOutcome, JobKind, JobState, Refused, StepState
from dashboard.models import Attempt, Job
from dashboard.services.escrows import escrow_publish, weights_publish
from dashboard.services.evaluations import evaluation_publish
from dashboard.services.ordering import wake_waiting
from dashboard.services.registry import artifact_publish, checkpoint_publish
from dashboard.services.releases import certificate_publish
from dashboard.transitions import Effect, JobFacts

PUBLISHERS: dict[str, Any] = {
    JobKind.IMPORT: checkpoint_publish,
    JobKind.COMPRESS: artifact_publish,
    JobKind.EVALUATE: evaluation_publish,
    JobKind.REHEARSE: certificate_publish,
    JobKind.ESCROW: escrow_publish,
    JobKind.RESTORE: weights_publish,
}


def job_facts(job: Job) -> JobFacts:
    """What of the row decides."""
    return JobFacts(state=JobState(job.state), cancel=job.cancel_requested, blocked=job.blocked_reason)


def job_apply(
    job: Job, facts: JobFacts, effects: Collection[Effect] = (), *, code: str = "", message: str = ""
) -> None:
    """Bring the row to where ``facts`` says, with what to tell the person, and carry the effects out."""
    if code or message:
        job.error_code, job.error = code[:64], message.replace("\0", "")
    if Effect.CANCEL_REST in effects:
        cancel_rest(job)
    _write(job, facts)
    if Effect.PUBLISH in effects:
        _publish(job)
    if Effect.WAKE in effects:
        wake_waiting(job)


def _write(job: Job, facts: JobFacts) -> None:
    if facts == job_facts(job):
        return
    job.state, job.cancel_requested, job.blocked_reason = facts.state, facts.cancel, facts.blocked
    if facts.state == JobState.RUNNING and job.started_at is None:
        job.started_at = timezone.now()
    if transitions.is_terminal(facts):
        job.finished_at = timezone.now()
    changing = ("state", "cancel_requested", "blocked_reason", "started_at", "finished_at", "error_code", "error")
    job.save(update_fields=changing)


def cancel_rest(job: Job) -> None:
    """Cancel the steps that are waiting or running. Whoever still computes one finds its fence closed."""
    now = timezone.now()
    Attempt.objects.filter(step__job=job, step__state=StepState.RUNNING, outcome=AttemptOutcome.RUNNING).update(
        outcome=AttemptOutcome.CANCELLED, finished_at=now
    )
    job.steps.filter(state__in=sorted(OPEN_STEP_STATES)).update(
        state=StepState.CANCELLED, owner="", lease_until=None, finished_at=now
    )
    failpoint("cancel.rest")


def _publish(job: Job) -> None:
    """All steps are done: check the result and publish it, in the transaction that makes the job succeeded."""
    failpoint("publish.begin")
    code, message = "", ""
    try:
        with transaction.atomic():
            PUBLISHERS[job.kind](job=job, step=job.steps.order_by("-index")[0])
    except Refused as refusal:
        code, message = "refused_result", str(refusal)
    except (KeyError, TypeError, ValueError, DataError, IntegrityError) as error:
        code, message = "bad_result", f"the result cannot be published: {error!r}"
    job_apply(job, transitions.published(job_facts(job), accepted=not code), code=code, message=message)
    failpoint("publish.done")


def job_settle(job: Job) -> None:
    """A job's state is a function of its steps: end what was cancelled and publish what is complete."""
    job_apply(job, *transitions.settle(job_facts(job), step_states(job)))


def job_ask_cancel(job: Job, how: str) -> None:
    """A person's wish, and the end of the job where nothing of it is running."""
    facts, effects = transitions.cancel(job_facts(job), step_states(job), how)
    job_apply(job, facts, effects)


def step_states(job: Job) -> set[StepState]:
    """The states in which steps of the job are."""
    return {StepState(state) for state in job.steps.order_by().values_list("state", flat=True).distinct()}
