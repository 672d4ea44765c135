"""Moving an environment's pointer: deployments, rollback, and what servers report back.

The pointer moves only by compare-and-swap on the generation that the person saw. Locks are taken in one order:
actor, environment, approval, artifact, policy.
"""

from __future__ import annotations

from datetime import timedelta

from django.conf import settings
from django.utils import timezone
from django.utils.translation import gettext as _

from compression_worker.faults import failpoint
from dashboard.lifecycle import (
    ArtifactState,
    Conflict,
    DeploymentKind,
    DeploymentState,
    Refused,
    deployment_next,
)
from dashboard.models import Approval, Artifact, Checkpoint, Deployment, Environment, Policy, ServerReport, User
from dashboard.selectors.approvals import approval_problems, certificate_valid
from dashboard.services.approvals import approval_decide, approval_request, approval_revoke, policy_create
from dashboard.services.escrows import require_weights
from dashboard.services.rehearsals import certificate_publish, rehearsal_create
from dashboard.services.units import authorise, recorded, required, unit_of_work

__all__ = [
    "approval_decide",
    "approval_request",
    "approval_revoke",
    "certificate_publish",
    "deployment_create",
    "deployment_full_precision",
    "deployments_observe",
    "environment_create",
    "policy_create",
    "rehearsal_create",
    "rollback",
]


@unit_of_work
def deployment_create(
    *, actor: User, environment: Environment, artifact: Artifact, approval: Approval, reason: str, seen_generation: int
) -> Deployment:
    """Point ``environment`` at a compressed artifact. Needs a live approval, a published artifact and an unexpired
    rollback certificate of its variant; raises Conflict when ``seen_generation`` is no longer the present one."""
    actor = authorise(actor, "deploy.deploy")
    environment = _locked(environment, seen_generation)
    approval = Approval.objects.select_for_update(no_key=True).get(pk=approval.pk)
    artifact = Artifact.objects.select_for_update(no_key=True).get(pk=artifact.pk)
    list(Policy.objects.select_for_update(no_key=True).filter(active=True))
    _check_deployable(environment, artifact, approval)
    require_weights(artifact.variant)
    return _point(
        environment,
        Deployment(
            kind=DeploymentKind.COMPRESSED,
            variant=artifact.variant,
            base=artifact.base,
            artifact=artifact,
            approval=approval,
            digest=artifact.digest,
            is_demo=artifact.is_demo,
        ),
        actor=actor,
        reason=reason,
        former=DeploymentState.SUPERSEDED,
    )


def _check_deployable(environment: Environment, artifact: Artifact, approval: Approval) -> None:
    if artifact.state != ArtifactState.PUBLISHED:
        raise Refused(_("'%(artifact)s' is no longer published") % {"artifact": artifact.name})
    if approval.artifact_id != artifact.pk:
        raise Refused(_("this approval is for another artifact"))
    approval.artifact = artifact
    problems = approval_problems(approval)
    if problems:
        raise Refused(_("The approval does not count: %(problems)s.") % {"problems": "; ".join(problems)})
    if certificate_valid(artifact.variant) is None:
        raise Refused(_("The way back was not rehearsed lately: rehearse the rollback first."))
    active = environment.active
    if active is not None and active.artifact_id == artifact.pk and active.state != DeploymentState.REFUSED:
        raise Refused(_("%(environment)s points at it already") % {"environment": environment.name})


@unit_of_work
def deployment_full_precision(
    *, actor: User, environment: Environment, variant: Checkpoint, reason: str, seen_generation: int
) -> Deployment:
    """Point ``environment`` at an uncompressed variant; needs no approval."""
    actor = authorise(actor, "deploy.deploy")
    environment = _locked(environment, seen_generation)
    if _answers_in_full(environment, variant):
        raise Refused(
            _("%(environment)s answers from '%(variant)s' in full precision already")
            % {"environment": environment.name, "variant": variant.name}
        )
    require_weights(variant)
    return _point(
        environment,
        Deployment(kind=DeploymentKind.FULL_PRECISION, variant=variant, digest=variant.digest, is_demo=variant.is_demo),
        actor=actor,
        reason=reason,
        former=DeploymentState.SUPERSEDED,
    )


@unit_of_work
def rollback(*, actor: User, environment: Environment, reason: str, seen_generation: int) -> Deployment:
    """Point ``environment`` at full precision of what it serves now. Needs a reason, Postgres and nothing else."""
    actor = authorise(actor, "deploy.rollback")
    environment = _locked(environment, seen_generation)
    active = environment.active
    if active is None:
        raise Refused(_("nothing was ever deployed to %(environment)s") % {"environment": environment.name})
    if _answers_in_full(environment, active.variant):
        raise Refused(
            _("%(environment)s answers from '%(variant)s' in full precision already")
            % {"environment": environment.name, "variant": active.variant.name}
        )
    return _point(
        environment,
        Deployment(
            kind=DeploymentKind.ROLLBACK,
            variant=active.variant,
            digest=active.variant.digest,
            is_demo=active.is_demo,
        ),
        actor=actor,
        reason=reason,
        former=DeploymentState.ROLLED_BACK,
    )


def _locked(environment: Environment, seen_generation: int) -> Environment:
    """The environment, locked, if it still is at the generation that the person saw."""
    present = Environment.objects.select_for_update(no_key=True).get(pk=environment.pk)
    if present.generation != seen_generation:
        raise _outdated(present.name, seen_generation)
    failpoint("deploy.locked")
    return present


def _outdated(name: str, seen_generation: int) -> Conflict:
    return Conflict(
        _("%(environment)s has moved on from generation %(generation)d: look at it again")
        % {"environment": name, "generation": seen_generation}
    )


def _answers_in_full(environment: Environment, variant: Checkpoint) -> bool:
    active = environment.active
    return active is not None and active.artifact_id is None and active.digest == variant.digest


def _point(
    environment: Environment, deployment: Deployment, *, actor: User, reason: str, former: DeploymentState
) -> Deployment:
    """The compare-and-swap: a new generation, the pointer on it, the former one ended."""
    seen, replaced = environment.generation, environment.active
    deployment.environment, deployment.generation = environment, seen + 1
    deployment.reason = required(reason, _("Say why: the reason is kept in the history."))
    deployment.replaces, deployment.created_by = replaced, actor
    failpoint("deploy.checked")
    with recorded(actor=actor, reason=deployment.reason):
        deployment.save(force_insert=True)
        failpoint("deploy.row")
        moved = Environment.objects.filter(pk=environment.pk, generation=seen).update(
            generation=seen + 1, active=deployment
        )
        if not moved:
            raise _outdated(environment.name, seen)
        if replaced is not None:
            replaced.state, replaced.ended_at = deployment_next(replaced.state, former), timezone.now()
            replaced.save(update_fields=["state", "ended_at"])
        failpoint("deploy.pointer")
    return deployment


@unit_of_work
def environment_create(*, actor: User | None, name: str, alias: str) -> Environment:
    """A new place where clients ask; ``alias`` is the model name that they use. ``actor`` None: at installation."""
    if actor is not None:
        actor = authorise(actor, "environment.create")
    if Environment.objects.filter(name=name).exists() or Environment.objects.filter(alias=alias).exists():
        raise Refused(_("there is already an environment of this name or alias"))
    with recorded(actor=actor, reason=f"environment {name}"):
        return Environment.objects.create(name=name, alias=alias)


@unit_of_work
def deployments_observe() -> int:
    """Carry what servers report into the states of the active deployments; returns how many changed."""
    actives = Deployment.objects.select_for_update(no_key=True, of=("self",)).filter(active_in__isnull=False)
    return sum(_observe(deployment) for deployment in actives.select_related("environment").order_by("pk"))


def _observe(deployment: Deployment) -> bool:
    fresh = timezone.now() - timedelta(seconds=settings.SERVER_STALE_SECONDS)
    reports = ServerReport.objects.filter(environment=deployment.environment.name, reported_at__gte=fresh)
    target, detail = _reported_state(deployment, list(reports))
    if target is None or target == deployment.state:
        return False
    deployment.state, deployment.detail = deployment_next(deployment.state, target), detail
    if target == DeploymentState.LIVE:
        deployment.live_at = deployment.live_at or timezone.now()
    with recorded(actor=None, reason=detail or "reported by a server"):
        deployment.save(update_fields=["state", "detail", "live_at"])
        failpoint("deploy.observed")
    return True


def _reported_state(deployment: Deployment, reports: list[ServerReport]) -> tuple[DeploymentState | None, str]:
    """What the servers say of this generation together: one that answers from it is enough to call it live."""
    epoch = deployment.environment.epoch
    own = [report for report in reports if report.generation == deployment.generation]
    if any(report.state == "serving" and report.digest == deployment.digest for report in own):
        return _if_possible(deployment, DeploymentState.LIVE), ""
    # A server that refuses a generation goes on answering from the one before.
    bad = [report for report in own if report.state == "fallback" and report.epoch == epoch]
    told = [report for report in reports if (report.epoch, report.wanted) >= (epoch, deployment.generation)]
    bad += [report for report in told if report.state in ("refused", "rewound")]
    if bad:
        return _if_possible(deployment, DeploymentState.REFUSED), bad[0].message
    if any(report.state == "loading" for report in told):
        return _if_possible(deployment, DeploymentState.LOADING), ""
    return None, ""


def _if_possible(deployment: Deployment, target: DeploymentState) -> DeploymentState | None:
    """``target``, where the lifecycle knows a way there: a live one that a second server loads stays live."""
    try:
        return deployment_next(deployment.state, target)
    except Refused:
        return None
