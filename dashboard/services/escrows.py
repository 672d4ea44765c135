"""Escrows: keeping a variant as its difference from the base, giving its own weights up for it, getting them back.

Giving up only says that the weights are no longer needed: a clean-up frees them later, and a restore makes them again.
Whoever needs full precision itself asks :func:`require_weights` first, so that none is started that could not read it.
"""

from __future__ import annotations

from django.utils import timezone
from django.utils.translation import gettext as _

from compression_worker.contracts import PlannedStep
from compression_worker.escrow.estimate import escrow_estimate, restore_estimate
from compression_worker.faults import failpoint
from dashboard.lifecycle import ACTIVE_JOB_STATES, JobKind, Refused
from dashboard.models import Checkpoint, Environment, Escrow, Job, Step, User
from dashboard.selectors.escrows import escrow_of, stands_on
from dashboard.selectors.preflight import model_of, plain_preflight
from dashboard.selectors.queues import default_queue
from dashboard.selectors.recovery import restored
from dashboard.selectors.storage import damages_of_checkpoint
from dashboard.services.ordering import job_order, require_fit, unique_seed
from dashboard.services.units import authorise, recorded, required, unit_of_work

UNDER_WAY = frozenset({JobKind.ESCROW, JobKind.RESTORE})


@unit_of_work
def escrow_create(*, actor: User, variant: Checkpoint) -> Job:
    """Queue the escrow of ``variant`` against its base."""
    actor = authorise(actor, "escrow.create")
    if variant.base is None:
        raise Refused(_("'%(name)s' has no base model to take the difference from") % {"name": variant.name})
    if Escrow.objects.filter(variant=variant).exists():
        raise Refused(_("'%(name)s' is kept as escrow already") % {"name": variant.name})
    _refuse_while_under_way(variant)
    inputs = {"base": variant.base.digest, "variant": variant.digest}
    title = f"escrow of {variant.name}"
    with recorded(actor=actor, reason=title):
        return job_order(
            actor=actor,
            kind=JobKind.ESCROW,
            title=title,
            spec={},
            first=PlannedStep(name="plan", kind="escrow.plan", group="plan", inputs=inputs),
            variant=variant,
            estimate=require_fit(plain_preflight(escrow_estimate(model_of(variant)), default_queue())),
        )


def escrow_publish(*, job: Job, step: Step) -> Escrow:
    """The escrow that a job made and proved. Called by the last step's finish, in its transaction."""
    variant, data = job.variant, step.data
    if variant is None or variant.base is None:
        raise Refused("the variant was removed during the job")
    if (data["variant"], data["base"]) != (variant.digest, variant.base.digest):
        raise Refused("the escrow was made from another variant or another base: run the job again")
    if Escrow.objects.filter(variant=variant).exists():
        raise Refused(f"'{variant.name}' was kept as escrow in the meantime")
    total = sum(part["bytes"] for part in data["parts"])
    if total != data["artifact_bytes"]:
        raise Refused(f"the ledger adds up to {total} bytes, the escrow has {data['artifact_bytes']}")
    escrow = Escrow.objects.create(
        variant=variant,
        base=variant.base,
        job=job,
        digest=data["escrow"],
        source_bytes=data["source_bytes"],
        escrow_bytes=data["artifact_bytes"],
        ledger=data["parts"],
    )
    failpoint("publish.escrow")
    return escrow


@unit_of_work
def escrow_release(*, actor: User, variant: Checkpoint, reason: str) -> Escrow:
    """Give the variant's own weights up: from now on its full precision is its escrow, and a clean-up may free them.

    Environments are locked as deployments lock them, so that one comes before this or is refused.
    """
    actor = authorise(actor, "escrow.release")
    reason = required(reason, _("Say why: the reason is kept in the history."))
    list(Environment.objects.select_for_update(no_key=True).order_by("pk"))
    escrow = _locked(variant)
    if escrow is None:
        raise Refused(_("'%(name)s' is not kept as escrow yet: make one first") % {"name": variant.name})
    if escrow.is_released:
        raise Refused(_("the weights of '%(name)s' were given up already") % {"name": variant.name})
    if restored():
        raise Refused(_("the database was restored from a backup: run 'manage.py recover --yes' first"))
    if place := stands_on(variant):
        raise Refused(
            _("%(environment)s stands on '%(name)s': its weights stay, so that a rollback waits for nothing")
            % {"environment": place.name, "name": variant.name}
        )
    if job := Job.objects.filter(variant=variant, state__in=ACTIVE_JOB_STATES).order_by("pk").first():
        raise Refused(_("%(job)s needs the weights: wait for it or stop it") % {"job": job})
    if damages_of_checkpoint(variant) or damages_of_checkpoint(escrow.base):
        raise Refused(_("the escrow, the variant or its base is damaged: put that right first"))
    escrow.released_at, escrow.released_by = timezone.now(), actor
    with recorded(actor=actor, reason=reason):
        escrow.save(update_fields=["released_at", "released_by"])
    return escrow


@unit_of_work
def escrow_restore(*, actor: User, variant: Checkpoint) -> Job:
    """Queue the way back: the variant's own weights, out of its escrow. Also where they are there and damaged.

    Never refused for want of room: a job without room waits for some.
    """
    actor = authorise(actor, "escrow.restore")
    escrow = _locked(variant)
    if escrow is None:
        raise Refused(_("'%(name)s' is not kept as escrow yet: make one first") % {"name": variant.name})
    _refuse_while_under_way(variant)
    first = PlannedStep(
        name="restore",
        kind="escrow.restore",
        group="restore",
        params={"checkpoint": variant.digest},
        inputs={"escrow": escrow.digest, "base": escrow.base.digest},
        seed=unique_seed(),
    )
    title = f"restore the weights of {variant.name}"
    with recorded(actor=actor, reason=title):
        return job_order(
            actor=actor,
            kind=JobKind.RESTORE,
            title=title,
            spec={},
            first=first,
            variant=variant,
            estimate=restore_estimate(model_of(variant)).to_json(),
        )


def weights_publish(*, job: Job, step: Step) -> Escrow:
    """The variant's own weights are there again. Called by the last step's finish, in its transaction."""
    escrow = _locked(job.variant) if job.variant else None
    if escrow is None or step.data["restored"] != escrow.variant.digest:
        raise Refused("the variant was removed or replaced during the restore")
    escrow.released_at = escrow.released_by = None
    escrow.save(update_fields=["released_at", "released_by"])
    return escrow


def is_released(variant: Checkpoint) -> bool:
    """Whether the variant's own weights were given up."""
    escrow = escrow_of(variant)
    return escrow is not None and escrow.is_released


def require_weights(variant: Checkpoint) -> None:
    """Refuse what needs the variant's own weights while they are given up; until the transaction ends they stay."""
    escrow = _locked(variant)
    if escrow is not None and escrow.is_released:
        raise Refused(
            _("'%(name)s' is kept as escrow alone: press 'Restore the weights' on its page, then ask again")
            % {"name": variant.name}
        )


def _locked(variant: Checkpoint) -> Escrow | None:
    rows = Escrow.objects.select_for_update(no_key=True, of=("self",)).select_related("variant", "base")
    return rows.filter(variant=variant).first()


def _refuse_while_under_way(variant: Checkpoint) -> None:
    under_way = Job.objects.filter(kind__in=UNDER_WAY, variant=variant, state__in=ACTIVE_JOB_STATES)
    if job := under_way.order_by("pk").first():
        raise Refused(_("%(job)s is under way") % {"job": job})
