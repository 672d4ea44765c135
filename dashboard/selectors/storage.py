"""The store as pages show it: room, what could be freed and what was, damage, how far the scrubber has come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import Sum
from django.utils import timezone

from dashboard.lifecycle import SweepKind, SweepState
from dashboard.models import Artifact, Checkpoint, Damage, SampleSet, Scrub, Sweep

LARGEST = 20
PAST_SWEEPS = 10
MENDED_SHOWN = timedelta(days=30)


@dataclass(frozen=True)
class Room:
    """Bytes on the store's disk, and what the rows say lies in it; blobs are shared, so parts may add up to more.

    Of a store in a bucket: the disk with this machine's copies, since a bucket does not say how much it takes.
    """

    bucket: str
    total: int
    free: int
    checkpoints: int
    artifacts: int
    sample_sets: int

    @property
    def used(self) -> int:
        return self.total - self.free


def storage_room() -> Room:
    is_bucket = "://" in settings.ARTIFACT_ROOT
    folder = Path(settings.ARTIFACT_CACHE or Path.home()) if is_bucket else Path(settings.ARTIFACT_ROOT)
    while not folder.exists():
        folder = folder.absolute().parent
    disk = shutil.disk_usage(folder)
    return Room(
        bucket=settings.ARTIFACT_ROOT if is_bucket else "",
        total=disk.total,
        free=disk.free,
        checkpoints=Checkpoint.objects.aggregate(n=Sum("size_bytes"))["n"] or 0,
        artifacts=Artifact.objects.aggregate(n=Sum("artifact_bytes"))["n"] or 0,
        sample_sets=SampleSet.objects.aggregate(n=Sum("size_bytes"))["n"] or 0,
    )


@dataclass(frozen=True)
class KindRow:
    kind: SweepKind
    blobs: int
    bytes: int


def sweep_preview() -> Sweep | None:
    """The newest look through the store that nobody has acted on."""
    return Sweep.objects.filter(state=SweepState.PREVIEWED).first()


def sweep_get(pk: int) -> Sweep:
    return Sweep.objects.get(pk=pk)


def sweep_present() -> Sweep | None:
    """The clean-up under way."""
    return Sweep.objects.filter(state__in=[SweepState.REQUESTED, SweepState.RUNNING]).select_related("asked_by").first()


def sweep_is_asked_for() -> bool:
    """Whether a worker has been asked to look again and has not yet."""
    return Sweep.objects.filter(state=SweepState.LOOKING).exists()


def sweeps_past() -> list[Sweep]:
    return list(Sweep.objects.filter(state=SweepState.DONE).select_related("asked_by")[:PAST_SWEEPS])


def kind_rows(sweep: Sweep | None) -> list[KindRow]:
    """What freeing it would take, kind by kind."""
    if sweep is None:
        return []
    return [KindRow(kind, **sweep.totals.get(kind, {"blobs": 0, "bytes": 0})) for kind in SweepKind]


def largest(sweep: Sweep | None) -> list[Any]:
    """The largest blobs of a preview."""
    return list(sweep.listed.order_by("-size", "digest")[:LARGEST]) if sweep else []


def sweep_lines(sweep: Sweep) -> Iterator[str]:
    """Every blob of a preview or a clean-up, one a line."""
    for row in sweep.listed.order_by("kind", "digest").iterator(chunk_size=1000):
        yield f"{row.digest} {row.size:>15} {row.kind:<12} {row.state}\n"


@dataclass(frozen=True)
class Progress:
    """The cycle of the scrubber: what it has hashed of what there is, and when it began."""

    scrub: Scrub
    total: int

    @property
    def share(self) -> float:
        return min(1.0, self.scrub.bytes / self.total) if self.total else 0.0

    @property
    def is_late(self) -> bool:
        """No cycle has ended in the time that one may take, twice over."""
        since = self.scrub.last_finished_at or self.scrub.started_at
        limit: datetime = timezone.now() - 2 * timedelta(hours=settings.SCRUB_HOURS)
        return since is not None and since < limit


def scrub_progress() -> Progress | None:
    scrub = Scrub.objects.first()
    if scrub is None:
        return None
    looked = Sweep.objects.filter(looked_at__isnull=False).values_list("store_bytes", flat=True).first()
    return Progress(scrub, max(looked or 0, scrub.bytes))


def damages_open() -> list[Damage]:
    return list(Damage.objects.filter(mended_at=None))


def damages_mended() -> list[Damage]:
    """Those of the last weeks."""
    return list(Damage.objects.filter(mended_at__gte=timezone.now() - MENDED_SHOWN)[:PAST_SWEEPS])


def damages_of_artifact(artifact: Artifact) -> list[Damage]:
    """What is wrong with its own files, or with the base, where it needs one to answer."""
    own = {("artifact", artifact.pk)}
    return _concerning(own if artifact.stands_alone else own | {("checkpoint", artifact.base_id)})


def damages_of_checkpoint(checkpoint: Checkpoint) -> list[Damage]:
    return _concerning({("checkpoint", checkpoint.pk)})


def _concerning(rows: set[tuple[str, int]]) -> list[Damage]:
    return [one for one in damages_open() if any((row["kind"], row["pk"]) in rows for row in one.concerns)]
