"""The sweep half of mark-and-sweep: a preview, a person's request, and a worker that frees exactly that, or less.

A blob goes only when the preview listed it, nothing needs it when its turn comes, and nobody wrote it again since. The
last look and the deletion happen under the lock that deployments take, so that a deployment comes before both or after.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime, timedelta

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Count, Sum
from django.utils import timezone
from django.utils.translation import gettext as _

from compression_worker.store import Blob, Store
from dashboard.lifecycle import ACTIVE_JOB_STATES, Conflict, Refused, StepState, SweepKind, SweepState, sweep_next
from dashboard.models import Environment, Step, Sweep, SweepBlob, User
from dashboard.selectors.recovery import restored
from dashboard.services.blobs import Documents
from dashboard.services.storage_marks import (
    Marks,
    find_marks,
    listing,
    newest_rows,
    pinned_manifests,
    running_keys,
    unfinished_digests,
)
from dashboard.services.units import authorise, recorded, required, unit_of_work

LOCK = 7_301_002
"""The number of the advisory lock under which a sweep is changed by one worker at a time."""
TEMPORARY_AGE = timedelta(hours=24)
BATCH = 50
LOCKED_SECONDS = 0.5
"""A deployment or a rollback never waits for a clean-up longer than about this."""
CHUNK = 10

Row = SweepBlob.State


@unit_of_work
def sweep_look(*, actor: User) -> Sweep:
    """Ask a worker to look through the store now."""
    actor = authorise(actor, "storage.sweep")
    with recorded(actor=actor, reason="look through the store"):
        asked, _new = Sweep.objects.get_or_create(state=SweepState.LOOKING, defaults={"asked_by": actor})
    return asked


@unit_of_work
def sweep_request(*, actor: User | None, sweep: Sweep, reason: str) -> Sweep:
    """Ask for what the preview ``sweep`` lists to be freed. ``actor`` None: from the command line."""
    if actor is not None:
        actor = authorise(actor, "storage.sweep")
    reason = required(reason, _("Say why: the reason is kept in the history."))
    if restored():
        raise Refused(_("the database was restored from a backup: run 'manage.py recover --yes' first"))
    present = Sweep.objects.select_for_update().filter(pk=sweep.pk).first()
    if present is None or present.state != SweepState.PREVIEWED:
        raise Conflict(_("the store was looked through again in the meantime: look at the new preview"))
    if Sweep.objects.filter(state__in=[SweepState.REQUESTED, SweepState.RUNNING]).exists():
        raise Conflict(_("a clean-up is under way: wait until it is done"))
    if not present.blobs and not present.temporary_files:
        raise Refused(_("there is nothing to free"))
    present.asked_by, present.reason, present.requested_at = actor, reason, timezone.now()
    with recorded(actor=actor, reason=reason):
        return _move(present, SweepState.REQUESTED)


def _move(sweep: Sweep, target: SweepState) -> Sweep:
    sweep.state = sweep_next(sweep.state, target)
    sweep.save()
    return sweep


def sweep_survey(*, store: Store) -> Sweep:
    """Look through the whole store and write down what could be freed, in place of the preview before."""
    now = timezone.now()
    older_than = now - timedelta(days=settings.SWEEP_GRACE_DAYS)
    present = listing(store)
    marks = find_marks(store, present)
    found = [] if marks.unreadable else _candidates(present, marks, older_than)
    leftovers = store.leftovers((now - TEMPORARY_AGE).timestamp())
    preview = Sweep(
        looked_at=now,
        older_than=older_than,
        store_blobs=len(present),
        store_bytes=sum(blob.size for blob in present.values()),
        totals=_totals(found),
        blobs=len(found),
        bytes=sum(blob.size for blob, _kind in found),
        temporary_files=len(leftovers),
        temporary_bytes=sum(size for _name, size in leftovers),
        unreadable=list(marks.unreadable),
    )
    return _preview_write(preview, found)


def _candidates(present: dict[str, Blob], marks: Marks, older_than: datetime) -> list[tuple[Blob, SweepKind]]:
    limit = older_than.timestamp()
    return [
        (blob, kind)
        for blob in present.values()
        if blob.modified < limit and (kind := marks.kind_of(blob.digest)) is not None
    ]


def _totals(found: Iterable[tuple[Blob, SweepKind]]) -> dict[str, dict[str, int]]:
    totals = {kind.value: {"blobs": 0, "bytes": 0} for kind in SweepKind}
    for blob, kind in found:
        totals[kind]["blobs"] += 1
        totals[kind]["bytes"] += blob.size
    return totals


@unit_of_work
def _preview_write(preview: Sweep, found: list[tuple[Blob, SweepKind]]) -> Sweep:
    _lock()
    asked = Sweep.objects.select_for_update().filter(state__in=[SweepState.LOOKING, SweepState.PREVIEWED])
    asked.delete()
    preview.pk, preview.state = None, SweepState.PREVIEWED
    with recorded(actor=None, reason="looked through the store"):
        preview.save(force_insert=True)
    rows = (SweepBlob(sweep=preview, digest=blob.digest, kind=kind, size=blob.size) for blob, kind in found)
    SweepBlob.objects.bulk_create(rows, batch_size=1000)
    return preview


def _lock() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])


def sweep_under_way() -> Sweep | None:
    """The clean-up that somebody asked for and that is not done yet."""
    return Sweep.objects.filter(state__in=[SweepState.REQUESTED, SweepState.RUNNING]).first()


def sweep_work(*, store: Store, seconds: float) -> bool:
    """Carry on with the clean-up under way for about ``seconds``; True when it is done or there is none.

    Killed at any point, it is carried on by whoever calls next.
    """
    deadline = time.monotonic() + seconds
    sweep = sweep_under_way()
    if sweep is None:
        return True
    marks = find_marks(store, listing(store), sweep.condemned)
    if sweep.state == SweepState.REQUESTED and not _begin(sweep, store, marks):
        return False
    while time.monotonic() < deadline and sweep.listed.filter(state__in=[Row.PLANNED, Row.REMOVING]).exists():
        _announce(sweep, store)
        if not _free(sweep, store, marks):
            return False
    if sweep.listed.filter(state__in=[Row.PLANNED, Row.REMOVING]).exists():
        return False
    _finish(sweep, store)
    return True


@unit_of_work
def _begin(sweep: Sweep, store: Store, marks: Marks) -> bool:
    """Take the finished steps whose results are to go out of reuse, so that no claim is answered with them.

    Deletion waits until every transaction that may have read the steps before has ended.
    """
    _lock()
    if not _still_holds(sweep, marks, set()):
        return False
    sweep.refresh_from_db()
    if sweep.state != SweepState.REQUESTED:
        return True
    doomed = set(sweep.listed.values_list("digest", flat=True)) - marks.needed
    documents = Documents(store, doomed.__contains__)
    done = Step.objects.filter(state=StepState.DONE).exclude(key="").exclude(output="")
    condemned = {
        step.key: step.output
        for step in done.exclude(job__state__in=ACTIVE_JOB_STATES).only("key", "output").iterator()
        if step.output in doomed or documents.named_in(step.output) & doomed
    }
    if condemned.keys() & running_keys():
        return False
    Step.objects.filter(state=StepState.DONE, key__in=list(condemned)).update(key="")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id()::text::bigint")
        sweep.condemned_in = cursor.fetchone()[0]
    sweep.condemned, sweep.started_at = condemned, timezone.now()
    with recorded(actor=sweep.asked_by, reason=sweep.reason):
        _move(sweep, SweepState.RUNNING)
    return True


def _still_holds(sweep: Sweep, marks: Marks, pinned: set[str]) -> bool:
    """Whether nothing came since ``marks`` were found that might need what they let go. If so: look again."""
    if restored() or newest_rows() != marks.newest or not pinned <= marks.closures.keys():
        return False
    if (running_keys() - marks.running_keys) & sweep.condemned.keys():
        return False
    come = unfinished_digests() - marks.unfinished
    let_go = {digest for digest, closure in marks.closures.items() if not closure <= marks.needed}
    if come & let_go:
        return False
    return not sweep.listed.filter(digest__in=list(come)).exists()


@unit_of_work
def _announce(sweep: Sweep, store: Store) -> None:
    """Write down which blobs are about to go: one that is found gone after a kill was then ours."""
    if sweep.listed.filter(state=Row.REMOVING).exists():
        return
    for row in sweep.listed.filter(state=Row.PLANNED)[:BATCH]:
        row.state = Row.REMOVING if store.has(row.digest) else Row.GONE
        row.save(update_fields=["state"])


def _free(sweep: Sweep, store: Store, marks: Marks) -> bool:
    """Delete announced blobs for a moment, under the lock of deployments; False when the marks no longer hold."""
    with transaction.atomic():
        _lock()
        list(Environment.objects.select_for_update(no_key=True).order_by("pk"))
        pinned = pinned_manifests()
        if not _claims_ended(sweep) or not _still_holds(sweep, marks, pinned):
            return False
        spared = marks.needed.union(*(marks.closures[digest] for digest in pinned))
        deadline = time.monotonic() + LOCKED_SECONDS
        rows = list(sweep.listed.select_for_update().filter(state=Row.REMOVING)[:BATCH])
        for at in range(0, len(rows), CHUNK):
            if time.monotonic() > deadline:
                break
            _free_chunk(sweep, store, rows[at : at + CHUNK], spared)
    return True


def _claims_ended(sweep: Sweep) -> bool:
    """Whether no transaction is left that began before the steps went out of reuse."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint > %s", [sweep.condemned_in])
        row: tuple[bool] = cursor.fetchone()
    return row[0]


def _free_chunk(sweep: Sweep, store: Store, rows: list[SweepBlob], spared: frozenset[str]) -> None:
    doomed = [row.digest for row in rows if row.digest not in spared]
    before = sweep.older_than.timestamp() if sweep.older_than else 0.0
    freed = store.discard(doomed, before=before)
    for row in rows:
        if row.digest in freed:
            row.state, row.size = Row.FREED, freed[row.digest]
        elif row.digest in spared or store.has(row.digest):
            row.state = Row.KEPT
        else:
            row.state = Row.FREED  # by us, before we were killed
        row.save(update_fields=["state", "size"])


@unit_of_work
def _finish(sweep: Sweep, store: Store) -> None:
    _lock()
    sweep.refresh_from_db()
    if sweep.state != SweepState.RUNNING:
        return
    _files, bytes_freed = store.discard_leftovers((timezone.now() - TEMPORARY_AGE).timestamp())
    freed = sweep.listed.filter(state=Row.FREED).aggregate(blobs=Count("pk"), bytes=Sum("size"))
    sweep.freed_blobs, sweep.freed_bytes = freed["blobs"], (freed["bytes"] or 0) + bytes_freed
    sweep.kept_blobs = sweep.listed.filter(state=Row.KEPT).count()
    sweep.finished_at = timezone.now()
    with recorded(actor=sweep.asked_by, reason=sweep.reason):
        _move(sweep, SweepState.DONE)
