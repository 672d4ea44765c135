"""The rules that the database keeps by itself, whatever code, shell or script writes to it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.utils import timezone

from dashboard.lifecycle import Role
from dashboard.models import Approval, Deployment, Environment, Job, Step
from dashboard.services.approvals import policy_create
from dashboard.services.releases import deployment_create, deployment_full_precision, rollback
from tests.dashboard.world import RULES, approved, artifact, digest, environment, evaluation, pair, person, requested

pytestmark = pytest.mark.django_db


def sql(statement: str, *values: Any) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(statement, values)


def refused(statement: str, *values: Any, match: str) -> None:
    with pytest.raises(DatabaseError, match=match):
        sql(statement, *values)


def insert_deployment(live: Approval, **values: Any) -> Deployment:
    """A compressed deployment past every service."""
    given: dict[str, Any] = {
        "environment": environment(),
        "generation": 1,
        "kind": "compressed",
        "variant": live.artifact.variant,
        "base": live.artifact.base,
        "artifact": live.artifact,
        "approval": live,
        "digest": live.artifact.digest,
        "reason": "by hand",
    }
    with transaction.atomic():
        return Deployment.objects.create(**(given | values))


def deployed() -> Deployment:
    approval = approved()
    return deployment_create(
        actor=person(Role.OPS),
        environment=environment(),
        artifact=approval.artifact,
        approval=approval,
        reason="go",
        seen_generation=0,
    )


@pytest.mark.parametrize("who", ["requested_by_id", "submitted_by_id"])
def test_nobody_approves_what_they_asked_for_or_submitted(who: str) -> None:
    asked = requested(artifact(by=person(Role.ENGINEER, "submitter")))
    refused(
        "UPDATE dashboard_approval SET state = 'approved', decided_by_id = %s, decided_at = now() WHERE id = %s",
        getattr(asked, who),
        asked.pk,
        match="approval_not_by_its_submitter",
    )


def test_an_approval_is_decided_by_somebody() -> None:
    asked = requested()
    refused(
        "UPDATE dashboard_approval SET state = 'approved' WHERE id = %s",
        asked.pk,
        match="approval_decided_by_somebody",
    )


@pytest.mark.parametrize("column", ["artifact_digest", "evaluation_digest", "base_fingerprint", "policy_digest"])
def test_what_an_approval_is_bound_to_never_changes(column: str) -> None:
    live = approved()
    refused(
        f"UPDATE dashboard_approval SET {column} = %s WHERE id = %s",
        digest("another"),
        live.pk,
        match="stays bound to what was looked at",
    )


def test_a_compressed_deployment_without_an_approval_is_refused() -> None:
    live = approved()
    with pytest.raises(DatabaseError, match="needs a live approval"):
        insert_deployment(live, approval=None)


def test_full_precision_carries_no_artifact() -> None:
    with pytest.raises(IntegrityError, match="deployment_compressed_needs_approval"):
        insert_deployment(approved(), kind="full_precision")


def test_a_live_approval_of_exactly_these_digests_is_taken() -> None:
    assert insert_deployment(approved()).pk


def pending(approval: Approval) -> None:
    Approval.objects.filter(pk=approval.pk).update(state="pending", decided_by=None)


def revoke(approval: Approval) -> None:
    Approval.objects.filter(pk=approval.pk).update(state="revoked")


def expire(approval: Approval) -> None:
    Approval.objects.filter(pk=approval.pk).update(expires_at=timezone.now() - timedelta(seconds=1))


def rebuild(approval: Approval) -> None:
    sql("UPDATE dashboard_artifact SET digest = %s WHERE id = %s", digest("rebuilt"), approval.artifact_id)


def retire(approval: Approval) -> None:
    sql("UPDATE dashboard_artifact SET state = 'retired' WHERE id = %s", approval.artifact_id)


def measure_again(approval: Approval) -> None:
    sql("UPDATE dashboard_evaluation SET digest = %s WHERE id = %s", digest("again"), approval.evaluation_id)


def replace_base(approval: Approval) -> None:
    sql("UPDATE dashboard_checkpoint SET fingerprint = %s WHERE id = %s", digest("ulp"), approval.artifact.base_id)


def other_policy(approval: Approval) -> None:
    policy_create(actor=None, rules=[*RULES, {"check": "true_ratio", "limit": 2, "severity": "warn"}])


@pytest.mark.parametrize(
    "change", [pending, revoke, expire, rebuild, retire, measure_again, replace_base, other_policy]
)
def test_an_approval_that_is_not_live_deploys_nothing_even_by_hand(change: Callable[[Approval], None]) -> None:
    approval = approved()
    change(approval)
    with pytest.raises(DatabaseError, match="needs a live approval"):
        insert_deployment(approval)


def test_another_digest_than_the_approved_one_is_refused() -> None:
    with pytest.raises(DatabaseError, match="needs a live approval"):
        insert_deployment(approved(), digest=digest("smuggled"))


def test_a_deployment_needs_a_reason() -> None:
    with pytest.raises(IntegrityError, match="deployment_has_a_reason"):
        insert_deployment(approved(), reason="")


@pytest.mark.parametrize("step", [0, 2, -1])
def test_a_generation_grows_by_exactly_one(step: int) -> None:
    present = deployed()
    refused(
        "UPDATE dashboard_environment SET generation = generation + %s, active_id = NULL WHERE id = %s",
        step,
        present.environment_id,
        match="grows by one",
    )


def test_an_environment_points_only_at_its_own_generation() -> None:
    present = deployed()
    other = Environment.objects.create(name="staging", alias="staging")
    refused(
        "UPDATE dashboard_environment SET generation = 1, active_id = %s WHERE id = %s",
        present.pk,
        other.pk,
        match="its own generation",
    )


def test_a_generation_is_deployed_once() -> None:
    deployed()
    approval = approved(artifact("second"))
    with pytest.raises(IntegrityError, match="deployment_generation_once"):
        insert_deployment(approval)


@pytest.mark.parametrize("column", ["artifact_id", "approval_id", "digest", "generation", "kind"])
def test_what_was_deployed_never_changes(column: str) -> None:
    present = deployed()
    value = {"digest": digest("x"), "generation": 9, "kind": "rollback"}.get(column)
    refused(
        f"UPDATE dashboard_deployment SET {column} = %s WHERE id = %s", value, present.pk, match="(?i)cannot update"
    )


def test_base_variant_and_artifact_of_a_deployment_cannot_be_deleted() -> None:
    present = deployed()
    rollback(actor=person(Role.OPS), environment=present.environment, reason="back", seen_generation=1)
    for table, row in (
        ("checkpoint", present.base_id),
        ("checkpoint", present.variant_id),
        ("artifact", present.artifact_id),
        ("deployment", present.pk),
    ):
        with pytest.raises(IntegrityError):
            sql(f"SET CONSTRAINTS ALL IMMEDIATE; DELETE FROM dashboard_{table} WHERE id = {row}")


def test_the_way_back_of_a_deployment_is_pinned_by_the_deployment_alone() -> None:
    _, variant = pair()
    ops = person(Role.OPS)
    deployment_full_precision(actor=ops, environment=environment(), variant=variant, reason="first", seen_generation=0)
    delete = f"SET CONSTRAINTS ALL IMMEDIATE; DELETE FROM dashboard_checkpoint WHERE id = {variant.pk}"
    refused(delete, match="dashboard_deployment")


def test_history_is_only_added_to() -> None:
    deployed()
    refused("UPDATE dashboard_deploymentevent SET reason = 'nicer'", match="(?i)cannot update")
    refused("DELETE FROM dashboard_deploymentevent", match="(?i)cannot update or delete")


def test_history_is_never_emptied() -> None:
    deployed()
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL deltaworks.may_empty_history = ''")  # as a connection of the product has it
        cursor.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE 'dashboard_%event'")
        tables = [name for (name,) in cursor.fetchall()]
    assert "dashboard_deploymentevent" in tables
    for name in tables:
        refused(f"TRUNCATE {name}", match="history is only added to")


def test_a_job_has_an_end_exactly_when_it_has_ended() -> None:
    job = Job.objects.create(kind="compress", title="x", spec={}, created_by=person(Role.ENGINEER))
    refused("UPDATE dashboard_job SET state = 'dead' WHERE id = %s", job.pk, match="job_finished_when_terminal")
    refused("UPDATE dashboard_job SET state = 'sleeping' WHERE id = %s", job.pk, match="job_state_known")
    Step.objects.create(job=job, index=0, name="a", kind="b")
    with pytest.raises(IntegrityError, match="step_once_per_index"), transaction.atomic():
        Step.objects.create(job=job, index=0, name="a", kind="b")


def test_an_unknown_role_is_no_role() -> None:
    viewer = person(Role.VIEWER)
    refused("UPDATE dashboard_user SET role = 'root' WHERE id = %s", viewer.pk, match="user_role_known")


def test_only_one_policy_is_in_force() -> None:
    evaluation(artifact())
    policy_create(actor=None, rules=RULES)
    refused(
        "INSERT INTO dashboard_policy (version, rules, digest, active, created_at) VALUES (9, '[]', 'x', true, now())",
        match="policy_one_active",
    )


def test_a_checkpoint_is_not_its_own_base() -> None:
    base, _ = pair()
    refused("UPDATE dashboard_checkpoint SET base_id = id WHERE id = %s", base.pk, match="not_its_own_base")
