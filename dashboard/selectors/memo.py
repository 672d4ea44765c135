"""What an approver reads: what is saved, what gets worse, which checks pass, how to go back, who may decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.db.models import Case, QuerySet, Value, When
from django.utils import timezone
from django.utils.translation import gettext as _

from dashboard.lifecycle import ACTIVE_JOB_STATES, ApprovalState, JobKind, Role
from dashboard.models import Approval, Artifact, Evaluation, Job, Policy, RollbackCertificate, User
from dashboard.permissions import allows
from dashboard.selectors.approvals import approval_problems, certificate_valid, evidence_problems
from dashboard.selectors.environments import approval_holds, certificate_latest
from dashboard.selectors.evaluations import MetricRow, metric_rows
from dashboard.verdicts import CheckResult, Outcome, VerdictKind, evaluate_policy, summary_words


@dataclass(frozen=True)
class Binding:
    """One of the digests that an approval holds to, then and now."""

    label: str
    then: str
    now: str

    @property
    def holds(self) -> bool:
        return self.then == self.now


@dataclass(frozen=True)
class Memo:
    approval: Approval
    rows: list[MetricRow]
    worse: list[MetricRow]
    checks: list[CheckResult]
    bindings: list[Binding]
    problems: list[str]
    certificate: RollbackCertificate | None
    certificate_holds: bool
    rehearsal: Job | None

    @property
    def saved_bytes(self) -> int:
        return self.approval.artifact.source_bytes - self.approval.artifact.artifact_bytes

    @property
    def obstacles(self) -> list[str]:
        """Why nobody could approve it now: what changed since it was asked for, and checks that block."""
        blocked = any(check.outcome == Outcome.FAIL for check in self.checks)
        return [*self.problems, *([summary_words(self.checks)] if blocked else [])]


def approval_list(state: str = "", limit: int = 100) -> list[Approval]:
    """Waiting ones first, then the latest; ``holds`` says in one query what :func:`approval_problems` explains."""
    waiting_first = Case(When(state=ApprovalState.PENDING, then=Value(0)), default=Value(1))
    found = _related(Approval.objects.annotate(holds=approval_holds())).order_by(waiting_first, "-requested_at")
    return list((found.filter(state=state) if state else found)[:limit])


def approval_list_of(artifact: Artifact) -> list[Approval]:
    return list(_related(artifact.approvals.all()).order_by("-requested_at"))


def approvals_waiting() -> QuerySet[Approval]:
    return _related(Approval.objects.filter(state=ApprovalState.PENDING, expires_at__gt=timezone.now()))


def approval_get(pk: int) -> Approval:
    return _related(Approval.objects.all()).get(pk=pk)


def _related(approvals: QuerySet[Approval]) -> QuerySet[Approval]:
    return approvals.select_related(
        "artifact__variant", "artifact__base", "evaluation", "policy", "requested_by", "submitted_by", "decided_by"
    )


def memo(approval: Approval) -> Memo:
    artifact = approval.artifact
    rules = approval.policy.rules
    rows = metric_rows(approval.evaluation.results, rules)
    certificate = certificate_latest(artifact.variant_id)
    problems = evidence_problems(approval) if approval.state == ApprovalState.PENDING else approval_problems(approval)
    return Memo(
        approval=approval,
        rows=rows,
        worse=[row for row in rows if row.verdict and row.verdict.kind in (VerdictKind.WORSE, VerdictKind.UNCLEAR)],
        checks=evaluate_policy(rules, approval.evaluation.results, artifact.true_ratio),
        bindings=bindings(approval),
        problems=problems,
        certificate=certificate,
        certificate_holds=certificate_valid(artifact.variant) is not None,
        rehearsal=rehearsal_running(artifact.variant_id),
    )


def bindings(approval: Approval) -> list[Binding]:
    artifact = approval.artifact
    policy = Policy.objects.filter(active=True).first()
    return [
        Binding(_("Artifact"), approval.artifact_digest, artifact.digest),
        Binding(_("Evaluation"), approval.evaluation_digest, approval.evaluation.digest),
        Binding(_stands_on(artifact), approval.base_fingerprint, artifact.base.fingerprint),
        Binding(_("Policy"), approval.policy_digest, policy.digest if policy else ""),
    ]


def _stands_on(artifact: Artifact) -> str:
    """What the third digest is of."""
    return _("Uncompressed model") if artifact.stands_alone else _("Base model")


def rehearsal_running(variant_id: int) -> Job | None:
    return Job.objects.filter(kind=JobKind.REHEARSE, variant_id=variant_id, state__in=ACTIVE_JOB_STATES).first()


def decision_hindrance(user: User, approval: Approval) -> str:
    """Why ``user`` may not decide on ``approval``; empty when they may."""
    if approval.state != ApprovalState.PENDING:
        return _("It has been decided already.")
    if not allows(user.role, "approval.decide"):
        return _("Only a manager can approve or reject; you are signed in as %(role)s.") % {
            "role": Role(user.role).label
        }
    if approval.requested_by_id == user.pk:
        return _("You asked for this approval; another manager has to decide.")
    if approval.submitted_by_id == user.pk:
        return _("You submitted the compression job; another manager has to decide.")
    return _("The request has expired; ask again.") if approval.expires_at <= timezone.now() else ""


def request_hindrance(user: User, artifact: Artifact, evaluations: Sequence[Evaluation]) -> str:
    """Why ``user`` may not ask for approval of ``artifact``; empty when they may."""
    if not allows(user.role, "approval.request"):
        return _("Only an engineer can ask for approval.")
    if not evaluations:
        return _("Evaluate it first: an approval rests on an evaluation.")
    if artifact.approvals.filter(state=ApprovalState.PENDING).exists():
        return _("A request is waiting already.")
    return ""
