"""The scrubber: every blob is hashed again within one cycle, a slice at a time, from a cursor that survives a restart.

What does not match its digest, or is not there although a row needs it, gets a row of its own; artifacts that it
belongs to may not be used until it is whole again. That is looked at more often than the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings

from compression_worker.contracts import CompressionError
from compression_worker.store import Blob, Store
from dashboard.lifecycle import ArtifactState, DamageKind
from dashboard.models import Artifact, Checkpoint, Damage, Escrow, Evaluation, SampleSet, Scrub, Sweep
from dashboard.services.blobs import DOCUMENT_BYTES
from dashboard.services.registry import artifact_mark_corrupt, artifact_mark_sound
from dashboard.services.storage_marks import weight_files
from dashboard.services.units import unit_of_work

SLICE_BYTES = 2_000_000_000
PACE = 0.8
"""The share of a cycle within which all is hashed: the rest is in reserve for workers that were away."""
RECHECK = timedelta(minutes=10)
RECHECKED_AT_ONCE = 5

Concerns = list[dict[str, Any]]
_FILES: dict[str, tuple[str, ...]] = {}


@dataclass
class Slice:
    """What one turn hashed."""

    cursor: str
    blobs: int = 0
    bytes: int = 0
    is_last: bool = False


def scrub_turn(*, store: Store, now: datetime, seconds: float) -> int:
    """Hash the next blobs that are due, for about ``seconds`` and at most :data:`SLICE_BYTES`; how many that were.

    ``now`` is the time by which the cycle goes; tests run it faster.
    """
    needed = needed_blobs(store)
    _recheck(store, needed, now)
    state = scrub_state()
    found_at = {"cursor": state.cursor, "started_at": state.started_at}
    cycle = timedelta(hours=settings.SCRUB_HOURS)
    if state.is_over:
        if state.started_at is not None and now < state.started_at + cycle:
            return 0
        state.started_at, state.cursor, state.blobs, state.bytes, state.is_over = now, "", 0, 0, False
    due = _due_bytes(state, now, cycle)
    done = _hash_slice(store, state.cursor, needed, now, seconds=seconds, limit=min(due, SLICE_BYTES))
    _advance(state, done, now, found_at)
    return done.blobs


def scrub_state() -> Scrub:
    """The one row of the scrubber."""
    state, _new = Scrub.objects.get_or_create(pk=1)
    return state


def _due_bytes(state: Scrub, now: datetime, cycle: timedelta) -> int:
    """How far behind the pace the cycle is. Where the size of the store is not known yet: as fast as turns allow."""
    total = Sweep.objects.filter(looked_at__isnull=False).values_list("store_bytes", flat=True).first()
    size = max(total or 0, state.last_bytes)
    if not size or state.started_at is None:
        return SLICE_BYTES
    return int(size * (now - state.started_at) / (cycle * PACE)) - state.bytes


def _hash_slice(
    store: Store, cursor: str, needed: dict[str, Concerns], now: datetime, *, seconds: float, limit: int
) -> Slice:
    done, deadline = Slice(cursor), time.monotonic() + seconds
    for blob in store.blobs(after=cursor):
        if done.bytes >= limit or time.monotonic() > deadline:
            break
        _missing_between(done.cursor, blob.digest, store, needed, now)
        _look(store, blob, needed, now)
        done.cursor, done.blobs, done.bytes = blob.digest, done.blobs + 1, done.bytes + blob.size
    else:
        _missing_between(done.cursor, "g", store, needed, now)
        done.is_last = True
    return done


def _look(store: Store, blob: Blob, needed: dict[str, Concerns], now: datetime) -> None:
    try:
        store.verify(blob.digest)
    except CompressionError as error:
        if error.code == "missing_blob" and blob.digest not in needed:
            return  # removed since it was listed
        damage_found(digest=blob.digest, error=error, concerns=needed.get(blob.digest, []), now=now)
    else:
        damage_mended(digest=blob.digest, now=now)


def _missing_between(after: str, before: str, store: Store, needed: dict[str, Concerns], now: datetime) -> None:
    """What rows need and the listing passed over."""
    for digest in sorted(one for one in needed if after < one < before):
        if not store.has(digest):
            error = CompressionError("missing_blob", f"the store has no blob {digest}")
            damage_found(digest=digest, error=error, concerns=needed[digest], now=now)


@unit_of_work
def _advance(state: Scrub, done: Slice, now: datetime, found_at: dict[str, Any]) -> None:
    """Move the cursor, unless somebody else moved it since it was ``found_at`` its place."""
    values: dict[str, Any] = {
        "cursor": done.cursor,
        "started_at": state.started_at,
        "blobs": state.blobs + done.blobs,
        "bytes": state.bytes + done.bytes,
        "is_over": done.is_last,
    }
    if done.is_last:
        values |= {
            "last_started_at": state.started_at,
            "last_finished_at": now,
            "last_blobs": values["blobs"],
            "last_bytes": values["bytes"],
        }
    Scrub.objects.filter(pk=1, **found_at).update(**values)


def _recheck(store: Store, needed: dict[str, Concerns], now: datetime) -> None:
    """Look at what is damaged again: a job that ran again, or an import, may have mended it."""
    for damage in Damage.objects.filter(mended_at=None, seen_at__lt=now - RECHECK).order_by("seen_at")[
        :RECHECKED_AT_ONCE
    ]:
        try:
            store.verify(damage.digest)
        except CompressionError as error:
            if error.code == "missing_blob" and damage.digest not in needed:
                damage_mended(digest=damage.digest, now=now)  # freed, and nobody needs it
            else:
                concerns = needed.get(damage.digest, [])
                damage_found(digest=damage.digest, error=error, concerns=concerns, now=now)
        else:
            damage_mended(digest=damage.digest, now=now)


@unit_of_work
def damage_found(*, digest: str, error: CompressionError, concerns: Concerns, now: datetime) -> Damage:
    """Write down that a blob is not what it should be, and keep the artifacts that it belongs to from being used."""
    kind = DamageKind.MISSING if error.code == "missing_blob" else DamageKind.DAMAGED
    values = {"kind": kind, "detail": error.message, "concerns": concerns, "seen_at": now}
    open_ones = Damage.objects.filter(mended_at=None)
    damage, _new = open_ones.update_or_create(
        digest=digest, mended_at=None, defaults=values, create_defaults=values | {"found_at": now}
    )
    for artifact in _artifacts(damage).filter(state=ArtifactState.PUBLISHED):
        artifact_mark_corrupt(artifact=artifact, detail=f"blob {digest[:12]} is {kind.value}")
    return damage


@unit_of_work
def damage_mended(*, digest: str, now: datetime) -> None:
    """The blob matches its digest (again). Artifacts that nothing else is wrong with are what they were."""
    damage = Damage.objects.select_for_update().filter(digest=digest, mended_at=None).first()
    if damage is None:
        return
    damage.mended_at = now
    damage.save(update_fields=["mended_at"])
    still_bad = {
        concern["pk"]
        for other in Damage.objects.filter(mended_at=None)
        for concern in other.concerns
        if concern["kind"] == "artifact"
    }
    for artifact in _artifacts(damage).filter(state=ArtifactState.CORRUPT).exclude(pk__in=still_bad):
        artifact_mark_sound(artifact=artifact, detail=f"blob {digest[:12]} is whole again")


def _artifacts(damage: Damage) -> Any:
    keys = [concern["pk"] for concern in damage.concerns if concern["kind"] == "artifact"]
    return Artifact.objects.filter(pk__in=keys).order_by("pk")


def needed_blobs(store: Store) -> dict[str, Concerns]:
    """The blobs that rows of the registry stand on, each with the rows that it belongs to."""
    found: dict[str, Concerns] = {}
    for digest, concern in _stands_on(store):
        found.setdefault(digest, []).append(concern)
    return found


def _stands_on(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    escrows = dict(Escrow.objects.values_list("variant", "digest"))
    released = set(Escrow.objects.filter(released_at__isnull=False).values_list("variant", flat=True))
    for checkpoint in Checkpoint.objects.only("pk", "name", "digest", "manifest"):
        concern = {"kind": "checkpoint", "pk": checkpoint.pk, "name": checkpoint.name}
        stands_on = {checkpoint.digest, *(file["sha256"] for file in checkpoint.manifest["files"].values())}
        if checkpoint.pk in released:
            stands_on -= weight_files(checkpoint).keys()
        if escrow := escrows.get(checkpoint.pk):
            stands_on |= {escrow, *_files_of(store, escrow)}
        for digest in stands_on:
            yield digest, concern
    kept = Artifact.objects.exclude(state=ArtifactState.RETIRED)
    for artifact in kept.only("pk", "name", "digest"):
        concern = {"kind": "artifact", "pk": artifact.pk, "name": artifact.name}
        for digest in {artifact.digest, *_files_of(store, artifact.digest)}:
            yield digest, concern
    for one in SampleSet.objects.only("pk", "name", "version", "digest"):
        yield one.digest, {"kind": "set", "pk": one.pk, "name": str(one)}
    for pk, digest in Evaluation.objects.values_list("pk", "digest"):
        yield digest, {"kind": "evaluation", "pk": pk, "name": f"#{pk}"}


def _files_of(store: Store, manifest: str) -> tuple[str, ...]:
    """The files that an artifact's manifest names; none while it cannot be read: then that is what is wrong."""
    if manifest not in _FILES:
        try:
            text = store.document(manifest, DOCUMENT_BYTES)
            files = json.loads(text or b"{}").get("files", {})
        except (CompressionError, ValueError):
            return ()
        if not files:
            return ()
        _FILES[manifest] = tuple(sorted({entry["sha256"] for entry in files.values()}))
    return _FILES[manifest]
