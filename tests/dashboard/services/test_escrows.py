"""Escrows: full precision is never lost, whoever gives weights up, sweeps, deploys or restores at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.core.exceptions import PermissionDenied
from django.db import Error, connection, transaction
from django.db.models.deletion import RestrictedError
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.launcher import Launcher, child_command
from compression_worker.store import Store
from dashboard.execution import Execution
from dashboard.lifecycle import JobKind, JobState, Refused, Role, SweepKind
from dashboard.models import Checkpoint, Damage, Environment, Escrow, Job, SweepBlob
from dashboard.services import adoption, demo_removal, evaluations, jobs, registry, rehearsals, releases, storage_scrub
from dashboard.services.escrows import escrow_create, escrow_release, escrow_restore
from dashboard.services.storage_marks import weight_files
from dashboard.services.storage_sweep import sweep_request, sweep_survey, sweep_work
from tests.dashboard.shelf import Shelf
from tests.factories import (
    deploy,
    make_artifact,
    make_checkpoint,
    make_environment,
    make_escrow,
    make_job,
    make_sample_set,
    make_user,
)
from tests.tiny import make_tiny_pair

# Deferred triggers speak at the end of a transaction, and a sweep waits for others to end.
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def pair(db: None) -> tuple[Checkpoint, Checkpoint]:
    base = make_checkpoint("base")
    return base, make_checkpoint("variant", base)


@pytest.fixture
def shelf(tmp_path: Path, settings: Settings) -> Shelf:
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    return Shelf(Store(tmp_path / "store"))


@pytest.fixture
def real_worker(settings: Settings, tmp_path: Path) -> Iterator[Execution]:
    """A worker whose child is the product's own, with a tiny pair to import."""
    make_tiny_pair(tmp_path / "models", shards=2)
    settings.IMPORT_ROOTS = {"models": str(tmp_path / "models")}
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    command = child_command(tmp_path / "store", {"models": tmp_path / "models"}, "cpu")
    present = Execution(name="real", queues=["cpu"], launcher=Launcher(command))
    yield present
    present.close()


def release(variant: Checkpoint, role: Role = Role.OPS) -> Escrow:
    return escrow_release(actor=make_user(role), variant=variant, reason="the disk is full")


def swept(store: Store) -> set[str]:
    """The digests that a clean-up took."""
    preview = sweep_survey(store=store)
    if preview.blobs:
        sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="the disk is full")
        assert sweep_work(store=store, seconds=20)
    return set(SweepBlob.objects.filter(sweep=preview, state="freed").values_list("digest", flat=True))


def test_the_whole_way_there_and_back(real_worker: Execution, tmp_path: Path) -> None:
    engineer, shelf = make_user(Role.ENGINEER), Shelf(Store(tmp_path / "store"))
    registry.checkpoint_import(actor=engineer, root="models", folder="base", name="base")
    real_worker.run_all()
    base = Checkpoint.objects.get(name="base")
    registry.checkpoint_import(actor=engineer, root="models", folder="variant", name="variant", base=base)
    real_worker.run_all()
    variant = Checkpoint.objects.get(name="variant")

    escrow_create(actor=engineer, variant=variant)
    with pytest.raises(Refused, match="under way"):
        escrow_create(actor=engineer, variant=variant)
    real_worker.run_all()
    escrow = Escrow.objects.get(variant=variant)
    assert sum(part["bytes"] for part in escrow.ledger) == escrow.escrow_bytes
    assert (escrow.source_bytes, escrow.is_released) == (variant.manifest["weight_bytes"], False)
    shelf.age()
    weights = set(weight_files(variant))
    assert not swept(shelf.store) & weights

    release(variant)
    shelf.age()
    taken = swept(shelf.store)
    assert weights <= taken
    assert set(SweepBlob.objects.filter(kind=SweepKind.RELEASED, state="freed").values_list("digest", flat=True)) == (
        weights
    )
    for needed in (escrow.digest, variant.digest, base.digest, *weight_files(base)):
        shelf.store.verify(needed)

    escrow_restore(actor=engineer, variant=variant)
    real_worker.run_all()
    escrow.refresh_from_db()
    assert not escrow.is_released
    for entry in variant.manifest["files"].values():
        shelf.store.verify(entry["sha256"])
    shelf.age()
    assert not swept(shelf.store) & weights


def test_an_escrow_that_lost_its_row_with_a_restored_database_gets_one_again(
    real_worker: Execution, tmp_path: Path
) -> None:
    engineer, store = make_user(Role.ENGINEER), Store(tmp_path / "store")
    registry.checkpoint_import(actor=engineer, root="models", folder="base", name="base")
    real_worker.run_all()
    base = Checkpoint.objects.get(name="base")
    registry.checkpoint_import(actor=engineer, root="models", folder="variant", name="variant", base=base)
    real_worker.run_all()
    variant = Checkpoint.objects.get(name="variant")
    escrow_create(actor=engineer, variant=variant)
    real_worker.run_all()
    before = Escrow.objects.get()
    Escrow.objects.all().delete()
    Job.objects.filter(kind=JobKind.ESCROW).delete()
    store.remove(weight_files(variant))
    (lost,) = adoption.lost_in(store)
    assert (lost.kind, lost.problem) == (JobKind.ESCROW, "")
    assert "is adopted" in adoption.adopt(lost)
    after = Escrow.objects.get()
    assert (after.digest, after.variant, after.escrow_bytes) == (before.digest, variant, before.escrow_bytes)
    assert adoption.lost_in(store) == []
    escrow_restore(actor=engineer, variant=variant)
    real_worker.run_all()
    for weight in weight_files(variant):
        store.verify(weight)


def test_what_cannot_be_kept_as_escrow_is_refused(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    with pytest.raises(Refused, match="no base"):
        escrow_create(actor=make_user(Role.ENGINEER), variant=base)
    with pytest.raises(PermissionDenied):
        escrow_create(actor=make_user(Role.VIEWER), variant=variant)
    make_escrow(variant)
    with pytest.raises(Refused, match="already"):
        escrow_create(actor=make_user(Role.ENGINEER), variant=variant)


def test_weights_are_given_up_with_a_reason_by_those_who_may_and_only_for_an_escrow(
    pair: tuple[Checkpoint, Checkpoint],
) -> None:
    _, variant = pair
    with pytest.raises(Refused, match="make one first"):
        release(variant)
    make_escrow(variant)
    with pytest.raises(PermissionDenied):
        release(variant, Role.MANAGER)
    with pytest.raises(Refused, match="Say why"):
        escrow_release(actor=make_user(Role.OPS), variant=variant, reason=" ")
    assert release(variant, Role.ENGINEER).is_released
    with pytest.raises(Refused, match="already"):
        release(variant)


def test_weights_stay_while_an_environment_stands_on_them(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    other, third = make_checkpoint("other", base), make_checkpoint("third", base)
    escrow, place = make_escrow(variant), make_environment()
    deploy(place, variant)
    with pytest.raises(Refused, match="stands on"):
        release(variant)
    deploy(place, other)
    with pytest.raises(Refused, match="stands on"):  # it is what the environment answered from before
        release(variant)
    with pytest.raises(Error, match="not given up"):
        Escrow.objects.filter(pk=escrow.pk).update(released_at=timezone.now())
    deploy(place, third)
    assert release(variant).is_released


def test_weights_stay_while_a_job_needs_them_or_something_is_damaged(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    make_escrow(variant)
    job = make_job(state=JobState.QUEUED, variant=variant)
    with pytest.raises(Refused, match="needs the weights"):
        release(variant)
    Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLED, finished_at=timezone.now())
    concerns = [{"kind": "checkpoint", "pk": base.pk, "name": base.name}]
    now = timezone.now()
    Damage.objects.create(digest="d" * 64, kind="damaged", detail="", concerns=concerns, found_at=now, seen_at=now)
    with pytest.raises(Refused, match="damaged"):
        release(variant)


@pytest.mark.parametrize(
    "ask",
    [
        lambda variant: jobs.compression_create(
            actor=make_user(Role.ENGINEER), method="bitdelta", variant=variant, config={"distill_steps": 0}
        ),
        lambda variant: evaluations.evaluation_create(
            actor=make_user(Role.ENGINEER), variant=variant, text_set=make_sample_set()
        ),
        lambda variant: rehearsals.rehearsal_create(actor=make_user(Role.OPS), variant=variant),
        lambda variant: releases.deployment_full_precision(
            actor=make_user(Role.OPS),
            environment=make_environment(),
            variant=variant,
            reason="a try",
            seen_generation=0,
        ),
        lambda variant: jobs.job_retry(
            actor=make_user(Role.ENGINEER),
            job=make_job(state=JobState.FAILED, variant=variant, spec={"first": {"name": "plan", "kind": "x.plan"}}),
        ),
    ],
    ids=["compression", "evaluation", "rehearsal", "deployment", "retry"],
)
def test_whoever_needs_the_weights_is_told_how_to_get_them(
    pair: tuple[Checkpoint, Checkpoint], ask: Callable[[Checkpoint], object]
) -> None:
    _, variant = pair
    make_escrow(variant, released_at=timezone.now())
    with pytest.raises(Refused, match="press 'Restore the weights'"):
        ask(variant)


def test_a_rehearsal_that_is_only_wished_for_is_left_out(pair: tuple[Checkpoint, Checkpoint]) -> None:
    _, variant = pair
    make_escrow(variant, released_at=timezone.now())
    rehearsals.rehearsal_ensure(actor=make_user(Role.ENGINEER), variant=variant)
    assert not Job.objects.filter(kind=JobKind.REHEARSE).exists()


def test_the_database_deploys_no_variant_whose_weights_are_given_up(pair: tuple[Checkpoint, Checkpoint]) -> None:
    _, variant = pair
    make_escrow(variant, released_at=timezone.now())
    with pytest.raises(Error, match="restored before it is deployed"):
        deploy(make_environment(), variant)


def test_the_database_keeps_the_only_way_back(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    escrow = make_escrow(variant, released_at=timezone.now())
    with pytest.raises(Error, match="stays while"):
        Escrow.objects.all().delete()
    with pytest.raises(RestrictedError):
        base.delete()
    with pytest.raises(Error, match="foreign key"):
        delete_by_hand(base)
    with pytest.raises(Error, match="Cannot update"):
        Escrow.objects.filter(pk=escrow.pk).update(digest="0" * 64)


def delete_by_hand(checkpoint: Checkpoint) -> None:
    """As somebody at a database's prompt would."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("DELETE FROM dashboard_checkpoint WHERE id = %s", [checkpoint.pk])


def test_the_database_keeps_the_escrow_of_what_is_deployed(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    make_escrow(variant)
    place = make_environment()
    deploy(place, variant)
    deploy(place, make_checkpoint("other", base))
    with pytest.raises(Error, match="stays while"):
        Escrow.objects.all().delete()
    deploy(place, make_checkpoint("third", base))
    Escrow.objects.all().delete()


def test_a_restore_asks_for_no_weights_and_is_told_of_in_history(pair: tuple[Checkpoint, Checkpoint]) -> None:
    base, variant = pair
    escrow = make_escrow(variant, released_at=timezone.now())
    job = escrow_restore(actor=make_user(Role.OPS), variant=variant)
    assert job.kind == JobKind.RESTORE
    assert job.spec["first"]["inputs"] == {"escrow": escrow.digest, "base": base.digest}
    with pytest.raises(Refused, match="under way"):
        escrow_restore(actor=make_user(Role.OPS), variant=variant)


def escrowed(shelf: Shelf, variant: Checkpoint) -> Escrow:
    """An escrow of two files on the shelf."""
    import json

    codes, manifest = shelf.blob(f"codes of {variant.name}"), {"files": {}}
    manifest["files"] = {"codes": {"sha256": codes}, "checkpoint.json": {"sha256": variant.digest}}
    return make_escrow(variant, digest=shelf.store.write_bytes(json.dumps(manifest).encode()))


def given_up(shelf: Shelf) -> set[str]:
    sweep = sweep_survey(store=shelf.store)
    return set(SweepBlob.objects.filter(sweep=sweep, kind=SweepKind.RELEASED).values_list("digest", flat=True))


def test_weights_that_somebody_else_needs_are_not_let_go(shelf: Shelf) -> None:
    base = shelf.checkpoint("base")
    variant = shelf.checkpoint("variant", base)
    escrow = escrowed(shelf, variant)
    shelf.artifact(variant, "kept")
    shelf.age()
    assert given_up(shelf) == set()
    release(variant)
    assert given_up(shelf) == set(weight_files(variant))
    again = make_checkpoint("again", base, digest=variant.digest, manifest=variant.manifest)
    assert given_up(shelf) == set()  # the same checkpoint under another name, with its own weights
    again.delete()
    job = make_job(JobKind.RESTORE, JobState.RUNNING, spec={"first": {"params": {"checkpoint": variant.digest}}})
    assert given_up(shelf) == set()  # they may just now have been restored
    Job.objects.filter(pk=job.pk).update(state=JobState.SUCCEEDED, finished_at=timezone.now())
    assert given_up(shelf) == set(weight_files(variant))
    Escrow.objects.filter(pk=escrow.pk).update(released_at=None)
    assert given_up(shelf) == set()


def test_a_clean_up_that_looked_before_a_restore_frees_nothing_of_it(shelf: Shelf) -> None:
    """The restore found the weights still there, so that nothing was written again and they look old."""
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    escrow = escrowed(shelf, variant)
    shelf.age()
    release(variant)
    preview = sweep_survey(store=shelf.store)
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="the disk is full")
    make_job(JobKind.RESTORE, variant=variant)
    Escrow.objects.filter(pk=escrow.pk).update(released_at=None)
    assert sweep_work(store=shelf.store, seconds=20)
    for weight in weight_files(variant):
        shelf.store.verify(weight)


def test_the_scrubber_misses_no_weights_that_were_given_up_and_watches_the_escrow(shelf: Shelf) -> None:
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    escrow = escrowed(shelf, variant)
    needed = storage_scrub.needed_blobs(shelf.store)
    assert weight_files(variant).keys() <= needed.keys()
    release(variant)
    needed = storage_scrub.needed_blobs(shelf.store)
    assert not weight_files(variant).keys() & needed.keys()
    assert [one["name"] for one in needed[escrow.digest]] == ["variant"]


def test_an_escrow_of_the_demo_goes_with_the_demo(settings: Settings, tmp_path: Path) -> None:
    settings.ARTIFACT_ROOT = str(tmp_path / "store")
    base = make_checkpoint("demo-base", is_demo=True)
    variant = make_checkpoint("demo-variant", base, is_demo=True)
    make_artifact(variant, is_demo=True)
    make_escrow(variant, released_at=timezone.now())
    demo_removal.demo_remove(actor=None)
    assert not Escrow.objects.exists()
    assert not Checkpoint.objects.exists()
    assert not Environment.objects.exists()
