"""Who may approve what, on which evidence, and what makes an approval fall."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pghistory.models
import pytest
from django.core.exceptions import PermissionDenied
from django.utils import timezone

from dashboard.lifecycle import ApprovalState, Conflict, JobKind, Refused, Role
from dashboard.models import Approval, Artifact, Checkpoint, Evaluation, Job, Policy, User
from dashboard.selectors.approvals import approval_live, approval_problems
from dashboard.services.approvals import approval_decide, approval_request, approval_revoke, policy_create
from dashboard.services.reconciling import reconcile
from dashboard.services.registry import artifact_retire
from tests.dashboard.world import (
    RESULTS,
    RULES,
    approved,
    artifact,
    certificate,
    digest,
    evaluation,
    person,
    policy,
    requested,
)

pytestmark = pytest.mark.django_db(transaction=True)


def decide(approval: Approval, approve: bool = True, by: User | None = None, reason: str = "read it") -> Approval:
    return approval_decide(actor=by or person(Role.MANAGER), approval=approval, approve=approve, reason=reason)


def test_a_request_is_bound_to_what_was_looked_at() -> None:
    asked = requested()
    assert asked.state == ApprovalState.PENDING
    assert asked.artifact_digest == asked.artifact.digest
    assert asked.evaluation_digest == asked.evaluation.digest
    assert asked.base_fingerprint == asked.artifact.base.fingerprint
    assert asked.policy_digest == policy().digest
    assert asked.submitted_by == asked.artifact.job.created_by
    assert timedelta(days=6) < asked.expires_at - timezone.now() <= timedelta(days=7)


def test_a_request_queues_a_rehearsal_only_when_none_is_valid_or_under_way() -> None:
    first = artifact("one")
    requested(first)
    requested(artifact("two"))
    assert Job.objects.filter(kind=JobKind.REHEARSE, state="queued").count() == 1
    Job.objects.filter(kind=JobKind.REHEARSE).update(state="cancelled", finished_at=timezone.now())
    certificate(first.variant)
    requested(artifact("three"))
    assert not Job.objects.filter(kind=JobKind.REHEARSE, state="queued").exists()


@pytest.mark.parametrize("role", [Role.VIEWER, Role.MANAGER, Role.OPS, Role.ADMIN])
def test_only_engineers_ask(role: Role) -> None:
    made = artifact()
    policy()
    with pytest.raises(PermissionDenied):
        approval_request(actor=person(role), artifact=made, evaluation=evaluation(made))


def test_evidence_about_something_else_is_refused() -> None:
    policy()
    with pytest.raises(Refused, match="something else"):
        approval_request(actor=person(Role.ENGINEER), artifact=artifact(), evaluation=evaluation(artifact("other")))


def test_a_second_request_for_the_same_artifact_is_refused() -> None:
    asked = requested()
    with pytest.raises(Refused, match="asked for already"):
        requested(asked.artifact)


def test_without_a_policy_nobody_can_ask() -> None:
    made = artifact()
    with pytest.raises(Refused, match="no policy"):
        approval_request(actor=person(Role.ENGINEER), artifact=made, evaluation=evaluation(made))


def test_a_manager_approves_with_a_reason_and_history_knows() -> None:
    decided = decide(requested())
    assert (decided.state, decided.decided_by, decided.reason) == ("approved", person(Role.MANAGER), "read it")
    assert approval_problems(decided) == []
    assert timedelta(days=29) < decided.expires_at - timezone.now() <= timedelta(days=30)
    event = pghistory.models.Events.objects.tracks(decided).order_by("-pgh_id").first()
    assert event.pgh_context == {"user": person(Role.MANAGER).pk, "reason": "read it"}
    assert approval_live(decided.artifact) == decided


def test_a_manager_rejects() -> None:
    rejected = decide(requested(), approve=False)
    assert rejected.state == ApprovalState.REJECTED
    assert approval_problems(rejected) == ["it was rejected"]


@pytest.mark.parametrize("role", [Role.VIEWER, Role.ENGINEER, Role.OPS, Role.ADMIN])
def test_only_managers_decide(role: Role) -> None:
    asked = requested()
    with pytest.raises(PermissionDenied):
        decide(asked, by=person(role, f"another {role}"))


def test_who_asked_does_not_decide_even_as_a_manager_now() -> None:
    asked = requested()
    User.objects.filter(pk=asked.requested_by_id).update(role=Role.MANAGER)
    for approve in (True, False):
        with pytest.raises(Refused, match="you asked"):
            decide(asked, approve=approve, by=asked.requested_by)


def test_who_submitted_the_job_does_not_decide_even_if_another_asked() -> None:
    submitter = person(Role.ENGINEER, "submitter")
    asked = requested(artifact(by=submitter))
    assert asked.requested_by != submitter
    User.objects.filter(pk=submitter.pk).update(role=Role.MANAGER)
    with pytest.raises(Refused, match="you submitted"):
        decide(asked, by=submitter)


def test_a_decision_needs_a_reason() -> None:
    with pytest.raises(Refused, match="Say why"):
        decide(requested(), reason=" \n ")


def test_a_decision_is_made_once() -> None:
    asked = requested()
    decide(asked)
    with pytest.raises(Conflict):
        decide(asked, approve=False)


def test_a_request_that_expired_cannot_be_approved() -> None:
    asked = requested()
    Approval.objects.filter(pk=asked.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    with pytest.raises(Refused, match="expired"):
        decide(asked)


def test_a_blocking_check_that_fails_cannot_be_approved() -> None:
    policy_create(actor=None, rules=[{"check": "true_ratio", "limit": 50, "severity": "block"}])
    with pytest.raises(Refused, match="1 check fails"):
        decide(requested())


def test_a_warning_can_be_approved() -> None:
    policy_create(actor=None, rules=[{"check": "true_ratio", "limit": 50, "severity": "warn"}])
    assert decide(requested()).state == ApprovalState.APPROVED


def test_a_manager_takes_an_approval_back() -> None:
    live = approved()
    revoked = approval_revoke(actor=person(Role.MANAGER, "second manager"), approval=live, reason="complaints")
    assert (revoked.state, revoked.reason) == (ApprovalState.REVOKED, "complaints")
    assert approval_problems(revoked) == ["it was revoked"]
    with pytest.raises(Conflict):
        approval_revoke(actor=person(Role.MANAGER), approval=revoked, reason="again")


def change_artifact(approval: Approval) -> None:
    Artifact.objects.filter(pk=approval.artifact_id).update(digest=digest("rebuilt"))


def change_evaluation(approval: Approval) -> None:
    Evaluation.objects.filter(pk=approval.evaluation_id).update(digest=digest("measured again"))


def change_base(approval: Approval) -> None:
    Checkpoint.objects.filter(pk=approval.artifact.base_id).update(fingerprint=digest("one ulp more"))


def change_policy(approval: Approval) -> None:
    policy_create(actor=None, rules=[*RULES, {"check": "true_ratio", "limit": 2, "severity": "warn"}])


def retire(approval: Approval) -> None:
    artifact_retire(actor=person(Role.ENGINEER), artifact=approval.artifact, reason="old")


def expire(approval: Approval) -> None:
    Approval.objects.filter(pk=approval.pk).update(expires_at=timezone.now())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_artifact, "the artifact has changed"),
        (change_evaluation, "the evaluation has changed"),
        (change_base, "the base model has changed"),
        (change_policy, "another policy is in force"),
        (retire, "the artifact is no longer published"),
        (expire, "it has expired"),
    ],
)
def test_an_approval_falls_when_what_it_rests_on_changes(change: Callable[[Approval], None], problem: str) -> None:
    live = approved()
    assert approval_problems(live) == []
    change(live)
    assert approval_problems(Approval.objects.get(pk=live.pk)) == [problem]
    assert approval_live(live.artifact) is None


@pytest.mark.parametrize("change", [change_artifact, change_evaluation, change_base, change_policy])
def test_a_request_cannot_be_approved_once_its_evidence_changed(change: Callable[[Approval], None]) -> None:
    asked = requested()
    change(asked)
    with pytest.raises(Refused, match="cannot be approved"):
        decide(Approval.objects.get(pk=asked.pk))


def test_a_request_nobody_decided_on_is_closed_and_can_be_asked_again() -> None:
    asked = requested()
    Approval.objects.filter(pk=asked.pk).update(expires_at=timezone.now())
    reconcile()
    asked.refresh_from_db()
    assert asked.state == ApprovalState.EXPIRED
    assert requested(asked.artifact).state == ApprovalState.PENDING


def test_a_new_policy_gets_the_next_version_and_only_one_is_in_force() -> None:
    first = policy()
    second = policy_create(
        actor=person(Role.ADMIN), rules=[{"check": "kl_divergence", "limit": 0.1, "severity": "block"}]
    )
    first.refresh_from_db()
    assert (first.version, second.version, first.active, second.active) == (1, 2, False, True)
    with pytest.raises(Refused, match="policy in force"):
        policy_create(actor=person(Role.ADMIN), rules=second.rules)
    assert Policy.objects.filter(active=True).count() == 1


@pytest.mark.parametrize(
    "rule",
    [
        {"check": "beauty", "limit": 1, "severity": "block"},
        {"check": "true_ratio", "limit": "much", "severity": "block"},
        {"check": "true_ratio", "limit": True, "severity": "block"},
        {"check": "true_ratio", "limit": 1, "severity": "maybe"},
    ],
)
def test_a_policy_that_nobody_can_check_is_refused(rule: dict[str, object]) -> None:
    with pytest.raises(Refused):
        policy_create(actor=person(Role.ADMIN), rules=[rule])


def test_only_administrators_change_the_policy() -> None:
    with pytest.raises(PermissionDenied):
        policy_create(actor=person(Role.MANAGER), rules=RULES)


def test_an_evaluation_with_nothing_measured_does_not_pass_a_check() -> None:
    made = artifact()
    policy()
    bare = evaluation(made, results=RESULTS | {"metrics": []})
    asked = approval_request(actor=person(Role.ENGINEER), artifact=made, evaluation=bare)
    with pytest.raises(Refused, match="check fails"):
        decide(asked)
