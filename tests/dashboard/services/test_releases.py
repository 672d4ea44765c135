"""Deployments and rollback: what they need, what they leave behind, and what races do to them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pghistory.models
import pytest
from django.core.exceptions import PermissionDenied
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.launcher import Outcome
from dashboard.lifecycle import (
    ApprovalState,
    Conflict,
    DeploymentKind,
    DeploymentState,
    JobKind,
    JobState,
    Refused,
    Role,
)
from dashboard.models import Approval, Deployment, Environment, Job, RollbackCertificate, ServerReport, User
from dashboard.services.reconciling import reconcile
from dashboard.services.registry import artifact_mark_corrupt
from dashboard.services.releases import (
    approval_decide,
    approval_request,
    approval_revoke,
    deployment_create,
    deployment_full_precision,
    deployments_observe,
    environment_create,
    rehearsal_create,
    rollback,
)
from dashboard.services.steps import step_claim, step_finish
from tests.dashboard.world import (
    approved,
    artifact,
    at_once,
    certificate,
    checkpoint,
    digest,
    environment,
    evaluation,
    pair,
    person,
    requested,
)

pytestmark = pytest.mark.django_db(transaction=True)


def deploy(approval: Approval, **values: Any) -> Deployment:
    given: dict[str, Any] = {
        "actor": person(Role.OPS),
        "environment": environment(),
        "artifact": approval.artifact,
        "approval": approval,
        "reason": "to save memory",
        "seen_generation": environment().generation,
    }
    return deployment_create(**(given | values))


def back(**values: Any) -> Deployment:
    given: dict[str, Any] = {
        "actor": person(Role.OPS),
        "environment": environment(),
        "reason": "refusals up",
        "seen_generation": environment().generation,
    }
    return rollback(**(given | values))


def in_full(**values: Any) -> Deployment:
    given: dict[str, Any] = {
        "actor": person(Role.OPS),
        "environment": environment(),
        "variant": pair()[1],
        "reason": "first",
        "seen_generation": environment().generation,
    }
    return deployment_full_precision(**(given | values))


def test_the_first_deployment_is_full_precision_without_an_approval() -> None:
    first = in_full()
    assert (first.generation, first.kind, first.digest) == (1, DeploymentKind.FULL_PRECISION, pair()[1].digest)
    present = environment()
    assert (present.generation, present.active) == (1, first)


def test_a_compressed_deployment_moves_the_pointer_and_ends_the_former() -> None:
    first = in_full()
    approval = approved()
    second = deploy(approval)
    first.refresh_from_db()
    assert (second.generation, second.replaces, second.digest) == (2, first, approval.artifact.digest)
    assert (second.kind, second.base, second.variant) == ("compressed", *pair())
    assert first.state == DeploymentState.SUPERSEDED
    assert first.ended_at is not None
    assert environment().active == second
    event = pghistory.models.Events.objects.tracks(second).get()
    assert event.pgh_context == {"user": person(Role.OPS).pk, "reason": "to save memory"}


def test_a_rollback_points_at_full_precision_of_the_same_variant() -> None:
    bad = deploy(approved())
    undone = back()
    bad.refresh_from_db()
    assert (undone.kind, undone.generation, undone.variant, undone.artifact) == ("rollback", 2, bad.variant, None)
    assert (undone.digest, undone.replaces) == (bad.variant.digest, bad)
    assert (bad.state, environment().active) == (DeploymentState.ROLLED_BACK, undone)


@pytest.mark.parametrize("state", ["requested", "loading", "live", "refused"])
def test_a_rollback_works_from_every_state_and_with_everything_else_gone(state: str) -> None:
    approval = approved()
    deploy(approval)
    Deployment.objects.update(state=state)
    artifact_mark_corrupt(artifact=approval.artifact, detail="its bytes are gone")
    RollbackCertificate.objects.all().delete()
    Approval.objects.update(state=ApprovalState.REVOKED)
    assert back().kind == DeploymentKind.ROLLBACK


def test_a_rollback_needs_a_reason_and_something_to_go_back_from() -> None:
    with pytest.raises(Refused, match="nothing was ever deployed"):
        back()
    deploy(approved())
    with pytest.raises(Refused, match="Say why"):
        back(reason="  ")
    back()
    with pytest.raises(Refused, match="in full precision already"):
        back()


def test_a_rollback_of_what_somebody_else_moved_is_a_conflict() -> None:
    deploy(approved())
    with pytest.raises(Conflict, match="moved on from generation 0"):
        back(seen_generation=0)


@pytest.mark.parametrize("role", [Role.VIEWER, Role.ENGINEER, Role.MANAGER])
def test_only_operations_move_the_pointer(role: Role) -> None:
    approval = approved()
    with pytest.raises(PermissionDenied):
        deploy(approval, actor=person(role))
    deploy(approval)
    with pytest.raises(PermissionDenied):
        back(actor=person(role))
    with pytest.raises(PermissionDenied):
        in_full(actor=person(role))


def test_a_role_taken_away_while_the_page_was_open_counts() -> None:
    ops = person(Role.OPS)
    deploy(approved())
    User.objects.filter(pk=ops.pk).update(role=Role.VIEWER)
    with pytest.raises(PermissionDenied):
        back(actor=ops)


def test_a_pending_rejected_or_revoked_approval_deploys_nothing() -> None:
    asked = requested()
    certificate(asked.artifact.variant)
    with pytest.raises(Refused, match="nobody has decided"):
        deploy(asked)
    manager = person(Role.MANAGER)
    approval_decide(actor=manager, approval=asked, approve=True, reason="fine")
    approval_revoke(actor=manager, approval=asked, reason="not fine")
    with pytest.raises(Refused, match="it was revoked"):
        deploy(asked)
    assert not Deployment.objects.exists()


def test_an_approval_of_another_artifact_deploys_nothing() -> None:
    approval = approved()
    with pytest.raises(Refused, match="another artifact"):
        deploy(approval, artifact=artifact("other"))


def test_without_a_rehearsed_way_back_nothing_compressed_is_deployed() -> None:
    approval = approved()
    RollbackCertificate.objects.update(expires_at=timezone.now())
    with pytest.raises(Refused, match="not rehearsed lately"):
        deploy(approval)
    certificate(approval.artifact.variant)
    assert deploy(approval).generation == 1


def test_a_rehearsal_of_other_bytes_does_not_count() -> None:
    approval = approved()
    RollbackCertificate.objects.update(digest=digest("an older import"))
    with pytest.raises(Refused, match="not rehearsed"):
        deploy(approval)


def test_deploying_the_same_artifact_twice_is_refused() -> None:
    approval = approved()
    deploy(approval)
    with pytest.raises(Refused, match="points at it already"):
        deploy(approval)


def test_what_was_rolled_back_from_needs_a_new_approval() -> None:
    approval = approved()
    made = approval.artifact
    deploy(approval)
    back()
    with pytest.raises(Refused, match="rolled back from"):
        deploy(approval)
    again = approval_request(actor=person(Role.ENGINEER), artifact=made, evaluation=evaluation(made))
    approval_decide(actor=person(Role.MANAGER), approval=again, approve=True, reason="fixed the prompt")
    assert deploy(again).generation == 3


def test_going_back_to_full_precision_without_a_rollback_keeps_the_approval() -> None:
    approval = approved()
    deploy(approval)
    in_full()
    assert deploy(approval).generation == 3


def test_full_precision_of_what_is_served_in_full_already_is_refused() -> None:
    in_full()
    with pytest.raises(Refused, match="in full precision already"):
        in_full()
    assert in_full(variant=checkpoint("other", pair()[0])).generation == 2


def test_environments_are_apart() -> None:
    approval = approved()
    deploy(approval, environment=environment("staging"), seen_generation=0)
    assert environment().generation == 0
    assert deploy(approval).generation == 1


def test_an_environment_has_a_name_of_its_own() -> None:
    assert environment_create(actor=person(Role.ADMIN), name="canary", alias="support").generation == 0
    with pytest.raises(Refused):
        environment_create(actor=None, name="canary", alias="other")
    with pytest.raises(PermissionDenied):
        environment_create(actor=person(Role.OPS), name="more", alias="more")


# What servers report


def report(deployment: Deployment, **values: Any) -> None:
    now = timezone.now()
    given = {
        "wanted": deployment.generation,
        "generation": deployment.generation,
        "digest": deployment.digest,
        "state": "serving",
        "started_at": now,
        "reported_at": now,
    }
    ServerReport.objects.update_or_create(
        server="server-1", environment=deployment.environment.name, defaults=given | values
    )


def observed(deployment: Deployment) -> str:
    deployments_observe()
    deployment.refresh_from_db()
    return deployment.state


def test_a_deployment_is_live_when_a_server_answers_from_it() -> None:
    deployment = deploy(approved())
    report(deployment, generation=0, digest="", state="loading")
    assert observed(deployment) == DeploymentState.LOADING
    report(deployment)
    assert observed(deployment) == DeploymentState.LIVE
    assert deployment.live_at is not None
    assert deployments_observe() == 0


def test_a_server_of_another_digest_confirms_nothing() -> None:
    deployment = deploy(approved())
    report(deployment, digest=digest("something else"))
    assert observed(deployment) == DeploymentState.REQUESTED


def test_a_report_that_is_stale_confirms_nothing(settings: Settings) -> None:
    deployment = deploy(approved())
    report(deployment, reported_at=timezone.now() - timedelta(seconds=settings.SERVER_STALE_SECONDS + 1))
    assert observed(deployment) == DeploymentState.REQUESTED


def test_a_refusal_is_kept_with_what_the_server_said() -> None:
    deployment = deploy(approved())
    report(deployment, generation=0, state="refused", message="blob 12ab does not match its digest")
    assert observed(deployment) == DeploymentState.REFUSED
    assert deployment.detail == "blob 12ab does not match its digest"
    report(deployment)
    assert observed(deployment) == DeploymentState.LIVE


def test_a_refusal_of_an_earlier_generation_says_nothing_of_this_one() -> None:
    deployment = deploy(approved())
    report(deployment, wanted=0, generation=0, state="refused", message="an earlier one was damaged")
    assert observed(deployment) == DeploymentState.REQUESTED


def test_a_server_that_fell_back_by_itself_is_shown_as_a_refusal() -> None:
    deployment = deploy(approved())
    report(deployment)
    assert observed(deployment) == DeploymentState.LIVE
    report(deployment, state="fallback", message="non-finite logits")
    assert observed(deployment) == DeploymentState.REFUSED


def test_a_live_deployment_stays_live_while_another_server_loads() -> None:
    deployment = deploy(approved())
    report(deployment)
    observed(deployment)
    report(deployment, generation=0, digest="", state="loading")
    assert observed(deployment) == DeploymentState.LIVE


# Rehearsals


def rehearse(data: dict[str, Any]) -> Job:
    job = rehearsal_create(actor=person(Role.OPS), variant=pair()[1])
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    assert claim.cached == ""
    outcome = Outcome(kind="done", output=digest("rehearsed"), data=data, measured={"seconds": 1.25})
    step_finish(claim=claim, outcome=outcome)
    job.refresh_from_db()
    return job


REHEARSED = {"files": 3, "bytes": 1_200, "tensors": 21, "prompt": "Once upon a time", "answer": " there was a model"}


def test_a_rehearsal_earns_a_certificate_for_a_day() -> None:
    job = rehearse(REHEARSED)
    earned = RollbackCertificate.objects.get()
    assert (job.state, earned.variant, earned.seconds) == (JobState.SUCCEEDED, pair()[1], 1.25)
    assert earned.digest == pair()[1].digest
    assert timedelta(hours=23) < earned.expires_at - timezone.now() <= timedelta(hours=24)


def test_a_rehearsal_without_an_answer_earns_nothing() -> None:
    assert rehearse(REHEARSED | {"answer": " "}).state == JobState.FAILED
    assert not RollbackCertificate.objects.exists()


def test_one_rehearsal_at_a_time_and_each_is_really_done() -> None:
    rehearsal_create(actor=person(Role.OPS), variant=pair()[1])
    with pytest.raises(Refused, match="under way"):
        rehearsal_create(actor=person(Role.OPS), variant=pair()[1])
    with pytest.raises(PermissionDenied):
        rehearsal_create(actor=person(Role.VIEWER), variant=pair()[1])


def test_the_certificate_of_an_approved_variant_is_renewed_before_it_runs_out() -> None:
    approved()
    Job.objects.filter(kind=JobKind.REHEARSE).update(
        state="succeeded", finished_at=timezone.now(), created_at=timezone.now() - timedelta(hours=20)
    )
    reconcile()
    assert not Job.objects.filter(kind=JobKind.REHEARSE, state="queued").exists()
    RollbackCertificate.objects.update(expires_at=timezone.now() + timedelta(hours=2))
    for _ in range(2):
        reconcile()
    assert Job.objects.filter(kind=JobKind.REHEARSE, state="queued").count() == 1


# Races: what a page showed is compared with what is, in the transaction that changes it. All eight actions at once:
# tests/reliability/test_races.py


def check_history(present: Environment) -> None:
    """One deployment and one event for each generation, without a gap, and the pointer on the last."""
    generations = list(present.deployments.order_by("generation").values_list("generation", flat=True))
    assert generations == list(range(1, present.generation + 1))
    for deployment in present.deployments.all():
        inserted = pghistory.models.Events.objects.tracks(deployment).filter(pgh_label="insert")
        assert inserted.count() == 1
    if present.active is not None:
        assert present.active.generation == present.generation


def test_of_eight_who_roll_back_at_once_one_does() -> None:
    deploy(approved())
    seen = environment().generation
    person(Role.OPS)
    results = at_once(*[lambda: back(seen_generation=seen)] * 8)
    made = [result for result in results if isinstance(result, Deployment)]
    assert len(made) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 7
    assert environment().generation == seen + 1
    check_history(environment())


def test_a_revoked_approval_is_never_deployed_after_the_revocation() -> None:
    manager = person(Role.MANAGER)
    for number in range(25):
        approval = approved(artifact(f"artifact {number}"))
        seen = environment().generation
        revoked, deployed = at_once(
            lambda approval=approval: approval_revoke(actor=manager, approval=approval, reason="back"),
            lambda approval=approval, seen=seen: deploy(approval, seen_generation=seen),
        )
        assert isinstance(revoked, Approval)
        approval.refresh_from_db()
        if isinstance(deployed, Deployment):
            # Both clocks were read while the approval's row was locked: the order is that of the locks.
            assert approval.decided_at is not None
            assert deployed.created_at < approval.decided_at
        else:
            assert isinstance(deployed, Refused)
    check_history(environment())
