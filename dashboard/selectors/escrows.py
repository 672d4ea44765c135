"""What keeping a variant's full precision costs, as its own weights and as escrow, and whether it may change."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import Q

from dashboard.lifecycle import ACTIVE_JOB_STATES, JobKind
from dashboard.models import Checkpoint, Environment, Escrow, Job


@dataclass(frozen=True)
class FullPrecision:
    """The two ways of keeping a variant; ``job`` is the escrow or the restore under way."""

    variant: Checkpoint
    copy_bytes: int
    escrow: Escrow | None
    job: Job | None
    place: Environment | None

    @property
    def may_release(self) -> bool:
        """Whether its own weights can be given up now."""
        return self.escrow is not None and not self.escrow.is_released and self.job is None and self.place is None


def full_precision(variant: Checkpoint) -> FullPrecision | None:
    """None for a base: nothing can be kept in its place."""
    if variant.base_id is None:
        return None
    under_way = Job.objects.filter(
        variant=variant, kind__in=[JobKind.ESCROW, JobKind.RESTORE], state__in=ACTIVE_JOB_STATES
    )
    size = int(variant.manifest.get("weight_bytes") or variant.size_bytes)
    return FullPrecision(variant, size, escrow_of(variant), under_way.order_by("pk").first(), stands_on(variant))


def escrow_of(variant: Checkpoint) -> Escrow | None:
    return Escrow.objects.select_related("variant", "base", "job", "released_by").filter(variant=variant).first()


def stands_on(variant: Checkpoint) -> Environment | None:
    """An environment that answers from the variant, in full or compressed, or did so before what it answers from."""
    active = Q(active__variant=variant) | Q(active__replaces__variant=variant)
    return Environment.objects.filter(active).order_by("name").first()


def released_files(variant: Checkpoint) -> list[tuple[str, int, str]]:
    """Name, bytes and digest of the weight files that giving up would let go; those of other checkpoints stay."""
    others = Checkpoint.objects.exclude(pk=variant.pk).filter(Q(escrow=None) | Q(escrow__released_at=None))
    kept = {
        entry["sha256"]
        for manifest in others.values_list("manifest", flat=True)
        for entry in manifest["files"].values()
    }
    return [
        (name, entry["size"], entry["sha256"])
        for name, entry in sorted(variant.manifest["files"].items())
        if name.endswith(".safetensors") and entry["sha256"] not in kept
    ]
