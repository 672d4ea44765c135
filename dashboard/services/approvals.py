"""Approvals and the policy that they are measured against."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone
from django.utils.translation import gettext as _

from compression_worker.contracts import canonical_json, sha256
from compression_worker.faults import failpoint
from dashboard.lifecycle import ApprovalState, ArtifactState, Conflict, Refused
from dashboard.models import Approval, Artifact, Evaluation, Policy, User
from dashboard.selectors.approvals import evidence_problems, policy_active
from dashboard.services.rehearsals import rehearsal_ensure
from dashboard.services.units import authorise, recorded, required, unit_of_work
from dashboard.verdicts import Check, Outcome, evaluate_policy, summary_words

SEVERITIES = frozenset({"block", "warn"})


@unit_of_work
def approval_request(*, actor: User, artifact: Artifact, evaluation: Evaluation, note: str = "") -> Approval:
    """Ask for approval of ``artifact`` on the evidence of ``evaluation``; queues a rehearsal where none is valid."""
    actor = authorise(actor, "approval.request")
    artifact = Artifact.objects.select_for_update(no_key=True).get(pk=artifact.pk)
    policy = _policy_locked()
    _check_request(artifact, evaluation)
    with recorded(actor=actor, reason=note.strip() or f"approval of {artifact.name} asked for"):
        approval = Approval.objects.create(
            artifact=artifact,
            evaluation=evaluation,
            policy=policy,
            artifact_digest=artifact.digest,
            evaluation_digest=evaluation.digest,
            base_fingerprint=artifact.base.fingerprint,
            policy_digest=policy.digest,
            requested_by=actor,
            submitted_by=artifact.job.created_by,
            note=note.strip(),
            expires_at=timezone.now() + timedelta(days=settings.APPROVAL_REQUEST_DAYS),
            is_demo=artifact.is_demo,
        )
        rehearsal_ensure(actor=actor, variant=artifact.variant)
        failpoint("approve.request")
    return approval


def _check_request(artifact: Artifact, evaluation: Evaluation) -> None:
    if artifact.state != ArtifactState.PUBLISHED:
        raise Refused(_("'%(artifact)s' is no longer published") % {"artifact": artifact.name})
    if evaluation.artifact_id != artifact.pk:
        raise Refused(_("this evaluation is of something else: evaluate '%(name)s' first") % {"name": artifact.name})
    approvals_expire(artifact=artifact)
    if Approval.objects.filter(artifact=artifact, state=ApprovalState.PENDING).exists():
        raise Refused(_("approval of '%(name)s' is asked for already") % {"name": artifact.name})


def approvals_expire(*, artifact: Artifact | None = None) -> int:
    """Close the requests that nobody decided on in time; returns how many."""
    overdue = Approval.objects.filter(state=ApprovalState.PENDING, expires_at__lte=timezone.now())
    overdue = overdue.filter(artifact=artifact) if artifact else overdue
    with recorded(actor=None, reason="nobody decided in time"):
        return overdue.update(state=ApprovalState.EXPIRED)


def _policy_locked() -> Policy:
    """The policy in force, kept in force until the transaction ends."""
    policy = Policy.objects.select_for_update(no_key=True).filter(active=True).first()
    if policy is None:
        raise Refused(_("no policy is in force: an administrator has to make one first"))
    return policy


@unit_of_work
def approval_decide(*, actor: User, approval: Approval, approve: bool, reason: str) -> Approval:
    """Approve or reject a pending request. Refused to who asked for it and to who submitted the job."""
    actor = authorise(actor, "approval.decide")
    reason = required(reason, _("Say why: the reason is kept with the decision."))
    approval = _locked(approval)
    if approval.state != ApprovalState.PENDING:
        raise Conflict(_("somebody has decided on it already: %(state)s") % {"state": approval.get_state_display()})
    _check_independent(actor, approval)
    if approve:
        _check_approvable(approval)
        approval.expires_at = timezone.now() + timedelta(days=settings.APPROVAL_DAYS)
    state = ApprovalState.APPROVED if approve else ApprovalState.REJECTED
    return _decide(approval, state, actor, reason)


@unit_of_work
def approval_revoke(*, actor: User, approval: Approval, reason: str) -> Approval:
    """Take an approval back. What is deployed stays deployed until somebody rolls back."""
    actor = authorise(actor, "approval.decide")
    reason = required(reason, _("Say why: the reason is kept with the decision."))
    approval = _locked(approval)
    if approval.state != ApprovalState.APPROVED:
        raise Conflict(_("it is not approved now: %(state)s") % {"state": approval.get_state_display()})
    _check_independent(actor, approval)
    return _decide(approval, ApprovalState.REVOKED, actor, reason)


def _locked(approval: Approval) -> Approval:
    """The rows that a decision rests on, locked in the order that everybody keeps: approval, artifact, policy."""
    approval = Approval.objects.select_for_update(no_key=True).get(pk=approval.pk)
    approval.artifact = Artifact.objects.select_for_update(no_key=True).get(pk=approval.artifact_id)
    list(Policy.objects.select_for_update(no_key=True).filter(active=True))
    return approval


def _check_independent(actor: User, approval: Approval) -> None:
    if actor.pk == approval.requested_by_id:
        raise Refused(_("you asked for this approval: somebody else has to decide"))
    if actor.pk == approval.submitted_by_id:
        raise Refused(_("you submitted this job: somebody else has to decide"))


def _check_approvable(approval: Approval) -> None:
    problems = evidence_problems(approval)
    if approval.expires_at <= timezone.now():
        problems.append(_("the request has expired"))
    checks = evaluate_policy(approval.policy.rules, approval.evaluation.results, approval.artifact.true_ratio)
    if any(check.outcome == Outcome.FAIL for check in checks):
        problems.append(_("policy: %(checks)s") % {"checks": summary_words(checks)})
    if problems:
        raise Refused(_("It cannot be approved: %(problems)s.") % {"problems": "; ".join(problems)})


def _decide(approval: Approval, state: ApprovalState, actor: User, reason: str) -> Approval:
    approval.state, approval.decided_by, approval.decided_at, approval.reason = state, actor, timezone.now(), reason
    with recorded(actor=actor, reason=reason):
        approval.save(update_fields=["state", "decided_by", "decided_at", "reason", "expires_at"])
        failpoint("approve.decide")
    return approval


@unit_of_work
def policy_create(*, actor: User | None, rules: list[dict[str, Any]]) -> Policy:
    """A new active policy; every approval under the former one stops counting. ``actor`` None: at installation."""
    if actor is not None:
        actor = authorise(actor, "policy.change")
    _check_rules(rules)
    # All versions, so that two who make one at the same time get different numbers.
    former = list(Policy.objects.select_for_update(no_key=True).order_by("-version"))
    version = former[0].version + 1 if former else 1
    digest = sha256(canonical_json(rules))
    present = policy_active()
    if present is not None and present.digest == digest:
        raise Refused(_("these are the rules of the policy in force"))
    with recorded(actor=actor, reason=f"policy version {version}"):
        Policy.objects.filter(active=True).update(active=False)
        return Policy.objects.create(version=version, rules=rules, digest=digest, active=True, created_by=actor)


def _check_rules(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        if rule.get("check") not in Check.values:
            raise Refused(_("there is no check '%(check)s'") % {"check": rule.get("check")})
        if rule.get("severity") not in SEVERITIES:
            raise Refused(_("a check either blocks or warns"))
        if isinstance(rule.get("limit"), bool) or not isinstance(rule.get("limit"), int | float):
            raise Refused(_("the limit of '%(check)s' is not a number") % {"check": rule["check"]})
