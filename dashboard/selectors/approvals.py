"""What an approval is worth now: bound to four digests, to a time, and to what happened since."""

from __future__ import annotations

from django.utils import timezone
from django.utils.translation import gettext as _

from dashboard.lifecycle import ApprovalState, ArtifactState, DeploymentKind
from dashboard.models import Approval, Artifact, Checkpoint, Deployment, Policy, RollbackCertificate


def approval_problems(approval: Approval) -> list[str]:
    """Why ``approval`` does not count for a deployment now; empty while it is live."""
    return state_problems(approval) + evidence_problems(approval)


def state_problems(approval: Approval) -> list[str]:
    """Not approved, not any more, or for too long."""
    match approval.state:
        case ApprovalState.PENDING:
            return [_("nobody has decided on it yet"), *_expiry(approval)]
        case ApprovalState.APPROVED:
            return _expiry(approval)
        case ApprovalState.REJECTED:
            return [_("it was rejected")]
        case ApprovalState.REVOKED:
            return [_("it was revoked")]
    return [_("nobody decided on it in time")]


def _expiry(approval: Approval) -> list[str]:
    return [_("it has expired")] if approval.expires_at <= timezone.now() else []


def evidence_problems(approval: Approval) -> list[str]:
    """What has changed since somebody asked: each of the four digests, the artifact's state, a rollback."""
    artifact, evaluation = approval.artifact, approval.evaluation
    policy = policy_active()
    found = [
        (artifact.digest != approval.artifact_digest, _("the artifact has changed")),
        (artifact.state != ArtifactState.PUBLISHED, _("the artifact is no longer published")),
        (evaluation.digest != approval.evaluation_digest, _("the evaluation has changed")),
        (evaluation.artifact_id != artifact.pk, _("the evaluation is of another artifact")),
        (artifact.base.fingerprint != approval.base_fingerprint, _base_changed(artifact)),
        (policy is None or policy.digest != approval.policy_digest, _("another policy is in force")),
        (rolled_back_since(approval), _("the artifact was rolled back from after this was asked: ask again")),
    ]
    return [message for is_so, message in found if is_so]


def _base_changed(artifact: Artifact) -> str:
    if artifact.stands_alone:
        return _("the checkpoint that it was made from has changed")
    return _("the base model has changed")


def rolled_back_since(approval: Approval) -> bool:
    """A rollback is a verdict on the artifact, too: what was asked before it does not put the artifact back."""
    return Deployment.objects.filter(
        kind=DeploymentKind.ROLLBACK, replaces__artifact=approval.artifact_id, created_at__gte=approval.requested_at
    ).exists()


def policy_active() -> Policy | None:
    """The policy in force."""
    return Policy.objects.filter(active=True).first()


def certificate_valid(variant: Checkpoint) -> RollbackCertificate | None:
    """The newest rehearsal of the way back to ``variant`` that still counts."""
    return RollbackCertificate.objects.filter(
        variant=variant, digest=variant.digest, expires_at__gt=timezone.now()
    ).first()


def approval_live(artifact: Artifact) -> Approval | None:
    """The newest approval of ``artifact`` that a deployment may rest on."""
    approved = Approval.objects.filter(artifact=artifact, state=ApprovalState.APPROVED)
    candidates = approved.select_related("artifact__base", "evaluation")
    return next((approval for approval in candidates if not approval_problems(approval)), None)
