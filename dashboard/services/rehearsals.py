"""Rehearsals of the way back to full precision, and the certificates that they earn."""

from __future__ import annotations

from datetime import timedelta

from django.conf import settings
from django.db.models import Q
from django.utils import timezone
from django.utils.translation import gettext as _

from compression_worker.contracts import PlannedStep
from compression_worker.faults import failpoint
from compression_worker.preflight import rehearsal_estimate
from dashboard.lifecycle import ACTIVE_JOB_STATES, ApprovalState, ArtifactState, JobKind, Refused
from dashboard.models import Approval, Checkpoint, Job, RollbackCertificate, Step, User
from dashboard.selectors.approvals import certificate_valid
from dashboard.selectors.preflight import model_of
from dashboard.services.escrows import is_released, require_weights
from dashboard.services.ordering import job_order, unique_seed
from dashboard.services.units import authorise, recorded, unit_of_work

PROMPT = "Once upon a time"
RENEWAL_SHARE = 0.25
"""A certificate is renewed when this share of its life is left."""
PAUSE_AFTER_REHEARSAL = timedelta(minutes=30)


@unit_of_work
def rehearsal_create(*, actor: User, variant: Checkpoint) -> Job:
    """Queue a real rehearsal of the way back to full precision of ``variant``."""
    actor = authorise(actor, "rehearsal.create")
    with recorded(actor=actor, reason=f"rehearse the rollback of {variant.name}"):
        if rehearsal_under_way(variant):
            raise Refused(_("a rehearsal of '%(name)s' is under way") % {"name": variant.name})
        require_weights(variant)
        return rehearsal_order(actor=actor, variant=variant)


def rehearsal_order(*, actor: User, variant: Checkpoint) -> Job:
    """Write the job down. Its key is its own each time: a rehearsal from memory proves nothing.

    It is never refused for want of room: the way back is worth a try.
    """
    first = PlannedStep(
        name="rehearse",
        kind="release.rehearse",
        group="rehearse",
        params={"prompt": PROMPT},
        inputs={"variant": variant.digest},
        seed=unique_seed(),
    )
    return job_order(
        actor=actor,
        kind=JobKind.REHEARSE,
        title=f"rehearse the rollback of {variant.name}",
        spec={"prompt": PROMPT},
        first=first,
        variant=variant,
        estimate=rehearsal_estimate(model_of(variant)).to_json(),
    )


def rehearsal_ensure(*, actor: User, variant: Checkpoint) -> None:
    """Queue a rehearsal unless one is valid or under way. Weights that were given up are restored before one."""
    if certificate_valid(variant) is None and not rehearsal_under_way(variant) and not is_released(variant):
        rehearsal_order(actor=actor, variant=variant)


def rehearsal_under_way(variant: Checkpoint) -> bool:
    return Job.objects.filter(kind=JobKind.REHEARSE, variant=variant, state__in=ACTIVE_JOB_STATES).exists()


def certificate_publish(*, job: Job, step: Step) -> RollbackCertificate:
    """The certificate of a rehearsal that went well. Called by the last step's finish, in its transaction."""
    variant, data = job.variant, step.data
    if variant is None or variant.digest != job.spec["first"]["inputs"]["variant"]:
        raise Refused("the variant was removed or replaced during the rehearsal")
    if not data["answer"].strip():
        raise Refused(f"full precision of '{variant.name}' loaded, but gave no answer to the prompt")
    certificate = RollbackCertificate.objects.create(
        variant=variant,
        job=job,
        digest=variant.digest,
        seconds=data["measured"]["seconds"],
        details=data,
        expires_at=timezone.now() + timedelta(hours=settings.ROLLBACK_CERTIFICATE_HOURS),
    )
    failpoint("publish.certificate")
    return certificate


def rehearsals_renew() -> None:
    """Keep the certificates of variants with an approved artifact: rehearse again before they run out."""
    soon = timezone.now() + timedelta(hours=settings.ROLLBACK_CERTIFICATE_HOURS * RENEWAL_SHARE)
    approved = Approval.objects.filter(
        state=ApprovalState.APPROVED, expires_at__gt=timezone.now(), artifact__state=ArtifactState.PUBLISHED
    )
    for approval in approved.select_related("artifact__variant", "requested_by").order_by("artifact__variant", "-pk"):
        variant = approval.artifact.variant
        if not _renewed(variant, soon) and not is_released(variant):
            with recorded(actor=None, reason="the rollback certificate runs out soon"):
                rehearsal_order(actor=approval.requested_by, variant=variant)


def _renewed(variant: Checkpoint, soon: object) -> bool:
    """Valid for long enough, or a rehearsal was asked for not long ago (whatever came of it)."""
    if RollbackCertificate.objects.filter(variant=variant, digest=variant.digest, expires_at__gt=soon).exists():
        return True
    recent = Q(created_at__gt=timezone.now() - PAUSE_AFTER_REHEARSAL) | Q(state__in=ACTIVE_JOB_STATES)
    return Job.objects.filter(recent, kind=JobKind.REHEARSE, variant=variant).exists()
