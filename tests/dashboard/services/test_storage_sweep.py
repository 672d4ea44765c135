"""Freeing the store: exactly what the preview said, never what anything needs, and the figure is what really went."""

from __future__ import annotations

import os
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from django.core.exceptions import PermissionDenied
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from compression_worker.store import Store
from dashboard.lifecycle import (
    ApprovalState,
    ArtifactState,
    Conflict,
    JobState,
    Refused,
    Role,
    StepState,
    SweepKind,
    SweepState,
)
from dashboard.models import Artifact, Environment, Job, Step, Sweep, SweepBlob
from dashboard.selectors.history import history
from dashboard.services import storage_sweep
from dashboard.services.releases import deployment_create, deployment_full_precision, rollback
from dashboard.services.steps import step_claim
from dashboard.services.storage_marks import find_marks, listing
from dashboard.services.storage_sweep import sweep_look, sweep_request, sweep_survey, sweep_work
from tests.dashboard.shelf import OLD, Shelf
from tests.factories import deploy, make_approval, make_certificate, make_environment, make_evaluation, make_user

# A sweep waits for transactions to end: a test inside one would wait for itself.
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def shelf(tmp_path: Path, settings: object) -> Shelf:
    settings.ARTIFACT_ROOT = str(tmp_path / "store")  # type: ignore[attr-defined]
    return Shelf(Store(tmp_path / "store"))


@pytest.fixture
def admin() -> object:
    return make_user(Role.ADMIN)


def listed(sweep: Sweep) -> dict[str, str]:
    return dict(SweepBlob.objects.filter(sweep=sweep).values_list("digest", "kind"))


def swept(shelf: Shelf, seconds: float = 20.0) -> Sweep:
    """Preview, request, and all the work."""
    preview = sweep_survey(store=shelf.store)
    asked = sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="the disk is full")
    assert sweep_work(store=shelf.store, seconds=seconds)
    asked.refresh_from_db()
    return asked


def test_each_kind_is_told_apart_and_what_is_needed_is_not_listed(shelf: Shelf) -> None:
    base = shelf.checkpoint("base")
    variant = shelf.checkpoint("variant", base)
    kept, retired = shelf.artifact(variant, "kept"), shelf.artifact(variant, "old", state=ArtifactState.RETIRED)
    leftover = shelf.blob()
    shelf.age()
    young = shelf.blob()
    preview = sweep_survey(store=shelf.store)
    found = listed(preview)
    steps = list(Step.objects.values_list("output", flat=True))
    layers = {digest for digest in shelf.present() if b"weights layer" in shelf.store.read_bytes(digest)}
    assert {one for one, kind in found.items() if kind == SweepKind.RETIRED} == shelf.files(retired)
    assert {one for one, kind in found.items() if kind == SweepKind.INTERMEDIATE} == {*steps, *layers}
    assert {one for one, kind in found.items() if kind == SweepKind.LEFTOVER} == {leftover}
    assert preview.blobs == len(found)
    assert preview.bytes == sum(shelf.store.size(digest) for digest in found)
    assert {kind: counts["blobs"] for kind, counts in preview.totals.items()} == {
        "leftover": 1,
        "intermediate": 6,
        "retired": 3,
        "released": 0,
    }
    assert young not in found
    assert not shelf.files(kept) & found.keys()


def test_exactly_that_is_freed_and_the_bytes_are_what_the_disk_got_back(shelf: Shelf) -> None:
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    kept = shelf.artifact(variant, "kept")
    shelf.artifact(variant, "old", state=ArtifactState.RETIRED)
    shelf.blob()
    shelf.age()
    before = {digest: shelf.store.size(digest) for digest in shelf.present()}
    preview = sweep_survey(store=shelf.store)
    plan = set(listed(preview))
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="the disk is full")
    assert shelf.present() == set(before), "nothing goes before a worker does it"
    assert sweep_work(store=shelf.store, seconds=20)
    preview.refresh_from_db()
    assert set(before) - shelf.present() == plan
    assert preview.state == SweepState.DONE
    assert preview.freed_bytes == preview.bytes == sum(before[digest] for digest in plan)
    assert (preview.freed_blobs, preview.kept_blobs) == (len(plan), 0)
    for digest in shelf.files(kept) | shelf.files(variant):
        shelf.store.verify(digest)
    assert listed(sweep_survey(store=shelf.store)) == {}


def test_temporary_files_go_after_a_day_and_are_counted(shelf: Shelf) -> None:
    for name, hours in (("old", 25), ("young", 23)):
        file = shelf.store.root / "tmp" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half a blob")
        os.utime(file, (time.time() - 3600 * hours,) * 2)
    preview = sweep_survey(store=shelf.store)
    assert (preview.blobs, preview.temporary_files, preview.temporary_bytes) == (0, 1, 11)
    assert swept(shelf).freed_bytes == 11
    assert [path.name for path in (shelf.store.root / "tmp").iterdir()] == ["young"]


def test_unfinished_work_is_never_listed(shelf: Shelf) -> None:
    """What a running job has made, what it was given, and what an equal step made long ago for it to reuse."""
    given, made, reused = shelf.blob(), shelf.blob(), shelf.blob()
    job = shelf.job([{"layer": made}], JobState.RUNNING)
    Step.objects.filter(job=job).update(inputs={"calibration": given})
    former = shelf.job([{"layer": reused}]).steps.get()
    Step.objects.create(job=job, index=1, name="again", kind="k", key=former.key, state=StepState.RUNNING)
    shelf.age()
    assert listed(sweep_survey(store=shelf.store)) == {}
    Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLED, finished_at=timezone.now() - OLD)
    assert {given, made, reused} <= listed(sweep_survey(store=shelf.store)).keys()


def test_results_are_kept_for_a_while_after_their_job(shelf: Shelf, settings: object) -> None:
    layer = shelf.blob()
    shelf.job([{"layer": layer}], ago=timedelta(days=20))
    shelf.age()
    assert listed(sweep_survey(store=shelf.store)) == {}
    settings.STEP_KEEP_DAYS = 10  # type: ignore[attr-defined]
    assert listed(sweep_survey(store=shelf.store))[layer] == SweepKind.INTERMEDIATE


def test_a_step_whose_result_went_is_computed_again_by_the_next_that_wants_it(shelf: Shelf) -> None:
    layer = shelf.blob()
    former = shelf.job([{"layer": layer}]).steps.get()
    shelf.age()
    assert swept(shelf).freed_blobs == 2
    former.refresh_from_db()
    assert former.key == "", "no claim is answered with it any more"
    assert former.output, "what it was stays on record"


def test_a_claim_made_before_the_results_went_out_of_reuse_keeps_them(shelf: Shelf) -> None:
    """The claim was answered with an old output; its worker verifies that and reports it while the sweep runs."""
    layer = shelf.blob()
    former = shelf.job([{"layer": layer}]).steps.get()
    key = former.key
    shelf.age()
    preview = sweep_survey(store=shelf.store)
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="room")
    job = shelf.job([], JobState.RUNNING)
    Step.objects.create(job=job, index=0, name="again", kind="k", key=key, state=StepState.RUNNING)
    while not sweep_work(store=shelf.store, seconds=5):
        pass
    preview.refresh_from_db()
    assert (preview.freed_blobs, preview.kept_blobs) == (0, 2)
    former.refresh_from_db()
    assert former.key == key


def test_deletion_waits_for_a_claim_that_was_under_way_when_the_steps_went_out_of_reuse(shelf: Shelf) -> None:
    shelf.job([{"layer": shelf.blob()}])
    shelf.age()
    sweep_request(actor=make_user(Role.ADMIN), sweep=sweep_survey(store=shelf.store), reason="room")
    begun, end = threading.Event(), threading.Event()

    def a_claim() -> None:
        with connection.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT pg_current_xact_id()")
            begun.set()
            end.wait(30)
            cursor.execute("COMMIT")
        connection.close()

    thread = threading.Thread(target=a_claim)
    thread.start()
    begun.wait(30)
    assert not sweep_work(store=shelf.store, seconds=5)
    assert Sweep.objects.get().state == SweepState.RUNNING
    assert len(shelf.present()) == 2
    end.set()
    thread.join()
    assert sweep_work(store=shelf.store, seconds=5)
    assert shelf.present() == set()


def released(shelf: Shelf) -> tuple[Environment, Artifact]:
    """An environment that serves an approved artifact, and full precision before that."""
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    artifact, environment = shelf.artifact(variant), make_environment("production")
    deploy(environment, variant)
    deploy(environment, variant, make_approval(make_evaluation(artifact), ApprovalState.APPROVED))
    return environment, artifact


def test_the_way_back_is_never_freed_not_even_of_a_withdrawn_artifact(shelf: Shelf) -> None:
    environment, artifact = released(shelf)
    Artifact.objects.update(state=ArtifactState.RETIRED)
    shelf.age()
    swept(shelf)
    assert shelf.files(artifact) <= shelf.present(), "it answers now"
    rollback(actor=make_user(Role.OPS), environment=environment, reason="odd", seen_generation=2)
    assert listed(sweep_survey(store=shelf.store)) == {}, "it answered before that"
    assert shelf.files(artifact.variant) | shelf.files(artifact.base) <= shelf.present()
    environment.refresh_from_db()
    other = shelf.checkpoint("other", artifact.base)
    deployment_full_precision(
        actor=make_user(Role.OPS), environment=environment, variant=other, reason="new", seen_generation=3
    )
    sweep = swept(shelf)
    assert sweep.freed_blobs == 3
    assert shelf.files(other) | shelf.files(artifact.variant) | shelf.files(artifact.base) <= shelf.present()


@pytest.mark.parametrize("moment", ["after the preview", "after the request", "between two looks of the worker"])
def test_a_deployment_made_in_between_keeps_what_it_needs(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Rows are written past the services, which would refuse a withdrawn artifact: the sweep does not rely on that."""
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    artifact, environment = shelf.artifact(variant), make_environment("production")
    approval = make_approval(make_evaluation(artifact), ApprovalState.APPROVED)
    Artifact.objects.update(state=ArtifactState.RETIRED)
    shelf.age()
    everything = shelf.files(artifact)

    def deployed() -> None:
        Artifact.objects.update(state=ArtifactState.PUBLISHED)
        deploy(environment, variant, approval)
        Artifact.objects.update(state=ArtifactState.RETIRED)

    preview = sweep_survey(store=shelf.store)
    assert everything <= listed(preview).keys()
    if moment == "after the preview":
        deployed()
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="room")
    if moment == "after the request":
        deployed()
    if moment == "between two looks of the worker":
        announce, calls = storage_sweep._announce, list[int]()

        def announce_then_deploy(sweep: Sweep, store: Store) -> None:
            announce(sweep, store)
            if not calls:
                calls.append(1)
                deployed()

        monkeypatch.setattr(storage_sweep, "_announce", announce_then_deploy)
    while not sweep_work(store=shelf.store, seconds=5):
        pass
    assert everything <= shelf.present()
    preview.refresh_from_db()
    assert preview.kept_blobs == len(everything)
    assert preview.freed_bytes < preview.bytes


def test_a_deployment_waits_for_the_deletion_that_was_faster_and_then_sees_it(shelf: Shelf) -> None:
    """The lock of the environment: while a batch is being deleted, no pointer moves."""
    environment, artifact = released(shelf)
    shelf.blob()
    shelf.age()
    order: list[str] = []
    discard = Store.discard

    def slow(self: Store, digests: list[str], **options: float) -> dict[str, int]:
        mover.start()
        time.sleep(0.5)
        order.append("deleted")
        return discard(self, digests, **options)

    def move() -> None:
        rollback(actor=make_user(Role.OPS), environment=environment, reason="odd", seen_generation=2)
        order.append("moved")
        connection.close()

    mover = threading.Thread(target=move)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "discard", slow)
        patch.setattr(storage_sweep, "BATCH", 1000)
        patch.setattr(storage_sweep, "CHUNK", 1000)
        swept(shelf)
    mover.join(30)
    assert order == ["deleted", "moved"]
    assert shelf.files(artifact) <= shelf.present()


def test_a_batch_holds_the_lock_for_a_moment_only(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(40):
        shelf.blob()
    shelf.age()
    discard = Store.discard

    def slow(self: Store, digests: list[str], **options: float) -> dict[str, int]:
        time.sleep(0.3)
        return discard(self, digests, **options)

    monkeypatch.setattr(Store, "discard", slow)
    sweep_request(actor=make_user(Role.ADMIN), sweep=sweep_survey(store=shelf.store), reason="room")
    marks = find_marks(shelf.store, listing(shelf.store))
    sweep = Sweep.objects.get()
    storage_sweep._begin(sweep, shelf.store, marks)
    storage_sweep._announce(sweep, shelf.store)
    started = time.monotonic()
    assert storage_sweep._free(sweep, shelf.store, marks)
    assert time.monotonic() - started < 1.2
    assert 0 < len(shelf.present()) < 40


@pytest.mark.parametrize("at", range(1, 9))
def test_killed_anywhere_it_is_carried_on_and_no_byte_is_lost_from_the_count(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Killed at the n-th touch of the store or row: what the next worker makes of it is the same as without the kill."""
    for _ in range(12):
        shelf.blob()
    shelf.age()
    monkeypatch.setattr(storage_sweep, "BATCH", 5)
    monkeypatch.setattr(storage_sweep, "CHUNK", 2)
    preview = sweep_survey(store=shelf.store)
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="room")

    class Killed(BaseException):
        pass

    calls = 0
    discard = Store.discard

    def dying(self: Store, digests: list[str], **options: float) -> dict[str, int]:
        nonlocal calls
        calls += 1
        if calls == at:
            discard(self, digests[: 1 + at % 2], **options)
            raise Killed
        return discard(self, digests, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "discard", dying)
        try:
            sweep_work(store=shelf.store, seconds=20)
        except Killed:
            pass
        else:
            assert at > 7
    assert sweep_work(store=shelf.store, seconds=20)
    preview.refresh_from_db()
    assert (preview.state, preview.freed_blobs, preview.freed_bytes) == (SweepState.DONE, 12, preview.bytes)
    assert shelf.present() == set()


def test_what_was_written_again_since_the_preview_stays(shelf: Shelf) -> None:
    again, idle = shelf.store.write_bytes(b"written again"), shelf.store.write_bytes(b"idle")
    shelf.age()
    preview = sweep_survey(store=shelf.store)
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="room")
    shelf.store.write_bytes(b"written again")
    assert sweep_work(store=shelf.store, seconds=5)
    assert shelf.present() == {again}
    preview.refresh_from_db()
    assert (preview.freed_bytes, preview.kept_blobs) == (len(b"idle"), 1)
    assert idle not in shelf.present()


def test_what_was_gone_before_its_turn_is_not_counted_as_freed(shelf: Shelf) -> None:
    gone = shelf.blob()
    shelf.age()
    preview = sweep_survey(store=shelf.store)
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="room")
    shelf.store.path(gone).unlink()
    assert sweep_work(store=shelf.store, seconds=5)
    preview.refresh_from_db()
    assert (preview.freed_blobs, preview.freed_bytes) == (0, 0)


@pytest.mark.parametrize("how", ["missing", "damaged at its first byte", "cut"])
def test_nothing_is_offered_while_a_document_that_says_what_is_needed_cannot_be_read(shelf: Shelf, how: str) -> None:
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    shelf.artifact(variant)
    shelf.blob()
    shelf.age()
    # As another process would find it: this one has read the document before.
    storage_sweep.Documents.named_in.__globals__["_NAMED"].clear()
    whole = shelf.store.read_bytes(variant.digest)
    if how == "missing":
        shelf.store.path(variant.digest).unlink()
    elif how == "cut":
        shutil.copyfile(os.devnull, shelf.store.path(variant.digest).with_suffix(".cut"))
        os.replace(shelf.store.path(variant.digest).with_suffix(".cut"), shelf.store.path(variant.digest))
    else:
        shelf.damage(variant.digest)
    preview = sweep_survey(store=shelf.store)
    assert preview.unreadable == [variant.digest]
    assert listed(preview) == {}
    with pytest.raises(Refused, match="nothing to free"):
        sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="room")
    shelf.store.write_bytes(whole)
    assert sweep_survey(store=shelf.store).unreadable == []


def test_only_an_administrator_asks_and_says_why(shelf: Shelf) -> None:
    shelf.blob()
    shelf.age()
    preview = sweep_survey(store=shelf.store)
    for role in set(Role) - {Role.ADMIN}:
        with pytest.raises(PermissionDenied):
            sweep_request(actor=make_user(role), sweep=preview, reason="room")
        with pytest.raises(PermissionDenied):
            sweep_look(actor=make_user(role))
    admin = make_user(Role.ADMIN)
    with pytest.raises(Refused, match="Say why"):
        sweep_request(actor=admin, sweep=preview, reason="  ")
    sweep_request(actor=admin, sweep=preview, reason="the disk is full")
    change = history(kind="Sweep")[0]
    assert (change.who, change.why) == (admin.username, "the disk is full")
    with pytest.raises(Conflict, match="looked through again"):
        sweep_request(actor=admin, sweep=preview, reason="twice")


def test_a_preview_that_was_replaced_cannot_be_asked_for(shelf: Shelf) -> None:
    shelf.blob()
    shelf.age()
    old = sweep_survey(store=shelf.store)
    sweep_survey(store=shelf.store)
    with pytest.raises(Conflict, match="look at the new preview"):
        sweep_request(actor=make_user(Role.ADMIN), sweep=old, reason="room")
    assert not SweepBlob.objects.filter(sweep_id=old.pk).exists()


def test_the_command_says_what_it_would_free_and_frees_it_for_a_reason(
    shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    leftover = shelf.blob()
    shelf.age()
    size = shelf.store.size(leftover)
    call_command("sweep", dry_run=True)
    said = capsys.readouterr().out
    assert "Leftovers of broken attempts: 1 blobs" in said
    assert f"to free: 1 blobs, {size} B" in said
    assert shelf.store.has(leftover)
    with pytest.raises(CommandError):
        call_command("sweep")
    call_command("sweep", "--reason", "a test")
    assert f"freed 1 blobs, {size} B" in capsys.readouterr().out
    assert not shelf.store.has(leftover)


def test_a_claim_after_the_sweep_is_offered_nothing(shelf: Shelf) -> None:
    former = shelf.job([{"layer": shelf.blob()}]).steps.get()
    shelf.age()
    spec = {"kind": "k", "params": {}, "inputs": {}, "seed": 0}
    from compression_worker.contracts import StepSpec

    Step.objects.filter(pk=former.pk).update(key=StepSpec.from_json(spec).key)
    job = shelf.job([], JobState.QUEUED)
    Step.objects.create(job=job, index=0, name="again", kind="k", queue="cpu")
    offered = step_claim(worker="w", queues=["cpu"])
    assert offered is not None
    assert offered.cached == former.output
    Job.objects.filter(pk=job.pk).update(state=JobState.CANCELLED, finished_at=timezone.now())
    swept(shelf)
    late = shelf.job([], JobState.QUEUED)
    Step.objects.create(job=late, index=0, name="again", kind="k", queue="cpu")
    claim = step_claim(worker="w", queues=["cpu"])
    assert claim is not None
    assert claim.cached == ""


def test_a_real_deployment_after_the_preview_goes_through_beside_the_sweep(shelf: Shelf) -> None:
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    artifact, environment = shelf.artifact(variant), make_environment("production")
    approval = make_approval(make_evaluation(artifact), ApprovalState.APPROVED)
    make_certificate(variant)
    for _ in range(60):
        shelf.blob()
    shelf.age()
    sweep_request(actor=make_user(Role.ADMIN), sweep=sweep_survey(store=shelf.store), reason="room")
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not sweep_work(store=shelf.store, seconds=5):
                pass
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    deployment_create(
        actor=make_user(Role.OPS),
        environment=environment,
        artifact=artifact,
        approval=approval,
        reason="go",
        seen_generation=0,
    )
    thread.join(60)
    assert errors == []
    assert shelf.files(artifact) | shelf.files(variant) | shelf.files(artifact.base) <= shelf.present()
