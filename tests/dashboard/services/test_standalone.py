"""Artifacts that stand alone, of base models and of variants: made for real, and through every door that artifacts pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from django.db import Error, connection, transaction
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.launcher import Launcher, child_command
from compression_worker.store import Store
from dashboard.execution import Execution
from dashboard.lifecycle import ApprovalState, ArtifactState, DamageKind, JobKind, JobState, Refused, Role
from dashboard.models import Approval, Artifact, Checkpoint, Damage, Environment, Evaluation, Job, Step
from dashboard.selectors.jobs import job_steps
from dashboard.selectors.sharing import rounds_of, rounds_so_far, savings, sharing_of, sharing_so_far, sharing_words
from dashboard.selectors.storage import damages_of_artifact
from dashboard.selectors.trainings import training, training_so_far
from dashboard.services import adoption, storage_marks
from dashboard.services.escrows import escrow_release
from dashboard.services.evaluations import evaluation_create, sample_set_create
from dashboard.services.jobs import compression_create, job_retry
from dashboard.services.registry import checkpoint_import
from dashboard.services.releases import (
    approval_decide,
    approval_request,
    deployment_create,
    policy_create,
    rollback,
)
from tests.dashboard.shelf import Shelf
from tests.dashboard.world import environment, person
from tests.factories import (
    deploy,
    make_approval,
    make_artifact,
    make_certificate,
    make_checkpoint,
    make_environment,
    make_escrow,
    make_evaluation,
    make_sample_set,
    make_user,
)
from tests.tiny import make_tiny_pair

pytestmark = pytest.mark.django_db(transaction=True)

TEXT = b"".join(b"Paragraph %d: the quick brown fox jumps over the lazy dog.\n\n" % n for n in range(60))
CONFIG: dict[str, Any] = {"num_bits": 4, "samples": 8, "length": 32}
MEASURED = {"window_tokens": 32, "max_windows": 6, "max_new_tokens": 2, "bootstrap_resamples": 200}


@pytest.fixture
def pair(db: None) -> tuple[Checkpoint, Checkpoint]:
    base = make_checkpoint("base")
    return base, make_checkpoint("variant", base)


@pytest.fixture
def store(settings: Settings, tmp_path: Path) -> Store:
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    return Store(tmp_path / "store")


@pytest.fixture
def real_worker(settings: Settings, tmp_path: Path, store: Store) -> Iterator[Execution]:
    """A worker whose child is the product's own, with a tiny pair imported."""
    make_tiny_pair(tmp_path / "models")
    settings.IMPORT_ROOTS = {"models": str(tmp_path / "models")}
    command = child_command(tmp_path / "store", {"models": tmp_path / "models"}, "cpu")
    present = Execution(name="real", queues=["cpu"], launcher=Launcher(command))
    engineer = person(Role.ENGINEER)
    checkpoint_import(actor=engineer, root="models", folder="base", name="base")
    present.run_all()
    base = Checkpoint.objects.get(name="base")
    checkpoint_import(actor=engineer, root="models", folder="variant", name="variant", base=base)
    present.run_all()
    yield present
    present.close()


def compressed(worker: Execution, name: str) -> Artifact:
    """The checkpoint ``name``, quantized by a real child."""
    text = sample_set_create(actor=person(Role.ENGINEER), name=f"text-{name}", kind="text", data=TEXT + name.encode())
    job = compression_create(
        actor=person(Role.ENGINEER),
        method="gptq",
        variant=Checkpoint.objects.get(name=name),
        config=CONFIG,
        calibration=text,
    )
    assert set(job.spec["first"]["inputs"]) == {"variant", "calibration"}
    worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED, job.error
    return Artifact.objects.get(job=job)


LEARNING: dict[str, Any] = {
    **{"followers": 1, "rank": 4, "protect_first": 0, "protect_last": 0, "window_tokens": 16, "held_out": 2},
    **{"measure_windows": 2, "teacher_logits": 16, "tokens": 128, "batch_size": 2, "chunk_tokens": 64},
}
"""One block of two follows, and learns in two parts of two steps."""


def test_what_pages_draw_of_sharing_is_what_the_steps_and_the_artifact_really_tell(real_worker: Execution) -> None:
    text = sample_set_create(actor=person(Role.ENGINEER), name="shared", kind="text", data=TEXT)
    job = compression_create(
        actor=person(Role.ENGINEER),
        method="deltallm",
        variant=Checkpoint.objects.get(name="base"),
        config=LEARNING,
        calibration=text,
    )
    real_worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED, job.error
    artifact, steps = Artifact.objects.get(job=job), job_steps(job)
    shared, so_far = sharing_of(artifact), sharing_so_far(steps)
    assert shared is not None
    assert so_far is not None
    assert so_far == replace(shared, fewer=None)
    assert (shared.blocks, shared.groups) == (2, {1: 0})
    assert rounds_of(artifact) == rounds_so_far(steps)
    assert [sorted(one.chosen) for one in rounds_of(artifact)] == [[1]]
    trained, learned = training(artifact.figures), training_so_far(steps)
    assert (learned.losses, learned.total) == (trained.losses, 4)
    assert [(one["tokens"], one["kl"]) for one in learned.held_out] == [
        (one["tokens"], one["kl"]) for one in trained.held_out
    ]
    assert [one["tokens"] for one in trained.held_out] == [0, 64, 128]
    assert len(savings(artifact)) == 2
    assert "less in the store" in savings(artifact)[0]
    assert sharing_words(artifact) == "1 follower, rank 4"


def evaluated(worker: Execution, artifact: Artifact) -> Evaluation:
    text = sample_set_create(actor=person(Role.ENGINEER), name=f"held-{artifact.pk}", kind="text", data=TEXT)
    job = evaluation_create(
        actor=person(Role.ENGINEER), variant=artifact.variant, artifact=artifact, text_set=text, config=MEASURED
    )
    worker.run_all()
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED, job.error
    return Evaluation.objects.get(job=job)


@pytest.mark.parametrize(
    ("name", "targets"), [("base", ["variant", "compressed"]), ("variant", ["base", "variant", "compressed"])]
)
def test_from_a_model_to_a_rollback(real_worker: Execution, name: str, targets: list[str]) -> None:
    policy_create(actor=None, rules=[{"check": "true_ratio", "limit": 1.01, "severity": "block"}])
    artifact = compressed(real_worker, name)
    checkpoint = artifact.variant
    assert (artifact.base, artifact.stands_alone, checkpoint.name) == (checkpoint, True, name)
    evaluation = evaluated(real_worker, artifact)
    assert evaluation.results["targets"] == targets
    target = Step.objects.get(job=evaluation.job, name="compressed")
    assert "base" not in target.inputs, "what stands alone is measured without a base"

    approval = approval_request(actor=person(Role.ENGINEER), artifact=artifact, evaluation=evaluation)
    assert approval.base_fingerprint == checkpoint.fingerprint
    real_worker.run_all()  # the rehearsal of the way back
    approval_decide(actor=person(Role.MANAGER), approval=approval, approve=True, reason="small enough")
    place = environment()
    made = deployment_create(
        actor=person(Role.OPS), environment=place, artifact=artifact, approval=approval, reason="smaller",
        seen_generation=0,
    )  # fmt: skip
    assert pointer("production") == ("compressed", checkpoint.digest, checkpoint.digest, artifact.digest)
    assert {checkpoint.digest, artifact.digest} <= storage_marks.pinned_manifests()
    undone = rollback(actor=person(Role.OPS), environment=environment(), reason="refusals up", seen_generation=1)
    assert (undone.variant, undone.artifact, undone.replaces) == (checkpoint, None, made)
    assert pointer("production") == ("rollback", checkpoint.digest, None, None)


def pointer(name: str) -> tuple[object, ...]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT kind, variant_digest, base_digest, artifact_digest FROM serving_pointer WHERE environment = %s",
            [name],
        )
        return tuple(cursor.fetchone() or ())


def test_what_lost_its_row_with_a_restored_database_gets_one_again(real_worker: Execution, store: Store) -> None:
    artifacts = [compressed(real_worker, name) for name in ("base", "variant")]
    for artifact in artifacts:
        Artifact.objects.filter(pk=artifact.pk).delete()
        Job.objects.filter(pk=artifact.job_id).delete()
    assert sorted(adoption.adopt(lost) for lost in adoption.lost_in(store)) == sorted(
        f"artifact {one.digest[:12]} is adopted as '{one.name}-adopted'" for one in artifacts
    )
    for lost in artifacts:
        found = Artifact.objects.get(digest=lost.digest)
        assert (found.variant, found.base) == (lost.variant, lost.variant)
        again = job_retry(actor=person(Role.ENGINEER), job=found.job)
        assert set(again.steps.get(index=0).inputs) == {"variant"}


def test_a_base_that_has_nothing_but_standalone_artifacts_is_adopted_as_a_base(
    real_worker: Execution, store: Store
) -> None:
    artifact = compressed(real_worker, "variant")
    variant = artifact.variant
    Artifact.objects.all().delete()
    Job.objects.all().delete()
    Checkpoint.objects.filter(pk=variant.pk).delete()
    told = [adoption.adopt(lost) for lost in adoption.lost_in(store)]
    assert len(told) == 2, told
    again = Checkpoint.objects.get(digest=variant.digest)
    assert again.base == Checkpoint.objects.get(name="base"), "an artifact of its own says nothing of its base"
    assert Artifact.objects.get().base == again


def test_a_difference_still_needs_a_base(pair: tuple[Checkpoint, Checkpoint]) -> None:
    with pytest.raises(Refused, match="a method that compresses a model by itself"):
        compression_create(actor=person(Role.ENGINEER), method="bitdelta", variant=pair[0], config={"distill_steps": 0})


def test_an_evaluation_names_the_base_of_a_variant_alone(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    text = make_sample_set()
    for checkpoint, names in (
        (base, {"variant", "artifact", "text"}),
        (variant, {"base", "variant", "artifact", "text"}),
    ):
        artifact = make_artifact(checkpoint, alone=True, method="gptq")
        job = evaluation_create(actor=person(Role.ENGINEER), variant=checkpoint, artifact=artifact, text_set=text)
        assert set(job.spec["first"]["inputs"]) == names


def test_an_approval_falls_when_the_checkpoint_changes(pair: tuple[Checkpoint, Checkpoint]) -> None:
    from dashboard.selectors.approvals import evidence_problems

    approval = make_approval(make_evaluation(make_artifact(pair[0], alone=True)), ApprovalState.APPROVED)
    assert evidence_problems(approval) == []
    Checkpoint.objects.filter(pk=pair[0].pk).update(fingerprint="0" * 64)
    assert evidence_problems(Approval.objects.get(pk=approval.pk)) == [
        "the checkpoint that it was made from has changed"
    ]


def test_the_database_deploys_it_on_its_own_checkpoint_alone(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    artifact = make_artifact(variant, alone=True)
    approval = make_approval(make_evaluation(artifact), ApprovalState.APPROVED)
    place = make_environment()
    with pytest.raises(Error, match="a live approval of exactly its digests"), transaction.atomic():
        deploy(place, base, approval)
    Environment.objects.get(pk=place.pk)
    assert deploy(Environment.objects.get(pk=place.pk), variant, approval).base == variant


def test_weights_are_given_up_beside_a_standalone_artifact_and_stay_while_it_is_deployed(
    pair: tuple[Checkpoint, Checkpoint],
) -> None:
    """It answers without them, and a rollback does not."""
    _, variant = pair
    artifact = make_artifact(variant, alone=True)
    approval = make_approval(make_evaluation(artifact), ApprovalState.APPROVED)
    make_certificate(variant)
    escrow = make_escrow(variant)
    place = make_environment()
    live = deploy(place, variant, approval)
    with pytest.raises(Refused, match="stands on 'variant'"):
        escrow_release(actor=make_user(Role.OPS), variant=variant, reason="the disk is full")
    with pytest.raises(Error, match="weights that an environment stands on"), transaction.atomic():
        type(escrow).objects.filter(pk=escrow.pk).update(released_at=timezone.now())

    for _turn in range(2):  # the one before is a way back, too
        deploy(Environment.objects.get(pk=place.pk), pair[0])
    escrow_release(actor=make_user(Role.OPS), variant=variant, reason="the disk is full")
    assert Artifact.objects.get(pk=artifact.pk).state == ArtifactState.PUBLISHED
    with pytest.raises(Refused, match="kept as escrow alone"):
        deployment_create(
            actor=make_user(Role.OPS), environment=live.environment, artifact=artifact, approval=approval,
            reason="again", seen_generation=3,
        )  # fmt: skip


def test_its_files_are_kept_when_the_weights_of_its_checkpoint_go(store: Store, tmp_path: Path, db: None) -> None:
    shelf = Shelf(store)
    base = shelf.checkpoint("base")
    variant = shelf.checkpoint("variant", base)
    artifact = shelf.artifact(variant, alone=True)
    make_escrow(variant, digest=shelf.blob("an escrow"), released_at=timezone.now())
    marks = storage_marks.find_marks(store, storage_marks.listing(store))
    assert shelf.files(artifact) <= marks.needed
    assert not marks.needed & storage_marks.weight_files(variant).keys()


def test_damage_of_the_checkpoint_is_no_damage_of_what_stands_alone(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    alone, difference = make_artifact(base, alone=True), make_artifact(variant)
    now = timezone.now()
    Damage.objects.create(
        digest="d" * 64, kind=DamageKind.DAMAGED, detail="changed", found_at=now, seen_at=now,
        concerns=[{"kind": "checkpoint", "pk": base.pk, "name": "base"}],
    )  # fmt: skip
    assert damages_of_artifact(alone) == []
    assert len(damages_of_artifact(difference)) == 1
    assert Job.objects.filter(kind=JobKind.COMPRESS).exists()
