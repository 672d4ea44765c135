"""What of the store is needed: the mark half of mark-and-sweep, and what an environment's way back stands on.

Needed is what rows lead to: checkpoints, published artifacts, evaluations, sample sets, certificates, unfinished jobs
with their steps, finished steps that may still be reused, and whatever an environment serves or served before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from django.conf import settings
from django.db.models import Max, Q, QuerySet
from django.utils import timezone

from compression_worker.store import Blob, Store
from dashboard.lifecycle import ACTIVE_JOB_STATES, ArtifactState, JobKind, StepState, SweepKind
from dashboard.models import (
    Artifact,
    Checkpoint,
    Environment,
    Escrow,
    Evaluation,
    Job,
    RollbackCertificate,
    SampleSet,
    Step,
)
from dashboard.services.blobs import Documents, digests_of_rows

NOT_RELEASED = Q(escrow=None) | Q(escrow__released_at=None)
"""Checkpoints whose own weights are kept."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What was found, and what it was found from, so that a later look can tell whether it still holds."""

    needed: frozenset[str]
    kinds: Mapping[str, SweepKind]  # of blobs that a row leads to and that are not needed; any other is a leftover
    closures: Mapping[str, frozenset[str]]  # of each checkpoint and artifact, by the digest of its manifest
    unfinished: frozenset[str]  # every digest that unfinished jobs name
    running_keys: frozenset[str]
    newest: tuple[int, ...]
    unreadable: tuple[str, ...]

    def kind_of(self, digest: str) -> SweepKind | None:
        """What freeing ``digest`` would be, None where it is needed."""
        return None if digest in self.needed else self.kinds.get(digest, SweepKind.LEFTOVER)


def listing(store: Store) -> dict[str, Blob]:
    """Every blob of the store."""
    return {blob.digest: blob for blob in store.blobs()}


def find_marks(store: Store, present: Mapping[str, Blob], condemned: Mapping[str, str] | None = None) -> Marks:
    """Mark what is needed among ``present``. ``condemned``: key -> output of steps that are no longer offered."""
    # Read before anything else: what comes later is then seen to have come.
    newest, unfinished = newest_rows(), unfinished_digests()
    keys = running_keys()
    documents = Documents(store, present.__contains__)
    pinned = pinned_manifests()
    closures = {
        digest: frozenset(documents.reachable([digest]))
        for rows in (Checkpoint.objects.all(), Artifact.objects.all())
        for digest in rows.values_list("digest", flat=True)
    }
    roots = unfinished | _registry_digests() | pinned | _reusable_outputs(keys)
    roots |= {output for key, output in (condemned or {}).items() if key in keys}
    needed = documents.reachable(roots)
    retired = _retired(pinned)
    kinds = dict.fromkeys(documents.reachable(retired), SweepKind.RETIRED)
    # What was measured on a withdrawn artifact, and the steps that made it, do not keep its bytes.
    lasting = documents.reachable(_evaluation_digests() | digests_of_rows(_lately_ended())) - kinds.keys()
    for digest in documents.reachable(_outputs(Step.objects.filter(job__finished_at__lt=_kept_since()))):
        kinds.setdefault(digest, SweepKind.INTERMEDIATE)
    released = _released_weights(documents, closures, unfinished | pinned)
    needed = (needed | lasting) - released
    kinds |= dict.fromkeys(released, SweepKind.RELEASED)
    vital = _vital(pinned)
    return Marks(
        needed=frozenset(needed),
        kinds={digest: kind for digest, kind in kinds.items() if digest not in needed},
        closures=closures,
        unfinished=frozenset(unfinished),
        running_keys=frozenset(keys),
        newest=newest,
        unreadable=tuple(sorted(one for one in vital if one not in present or not documents.can_read(one))),
    )


def pinned_manifests() -> set[str]:
    """What each environment's active deployment and the one before it need: the variant in full, base and artifact."""
    found: set[str] = set()
    environments = Environment.objects.filter(active__isnull=False)
    for at in ("active__", "active__replaces__"):
        for name in ("variant__digest", "variant__base__digest", "base__digest", "artifact__digest"):
            found |= set(environments.values_list(at + name, flat=True))
    return {digest for digest in found if digest}


def unfinished_digests() -> set[str]:
    """Every digest that an unfinished job or one of its steps names."""
    return digests_of_rows(Job.objects.filter(state__in=ACTIVE_JOB_STATES))


def running_keys() -> set[str]:
    """The keys of steps of unfinished jobs: an equal step that is done may be about to answer for them."""
    keys = Step.objects.filter(job__state__in=ACTIVE_JOB_STATES).exclude(key="").values_list("key", flat=True)
    return set(keys)


def newest_rows() -> tuple[int, ...]:
    """Grows with each row that may need blobs of the store."""
    models = (Artifact, Checkpoint, Escrow, Evaluation, RollbackCertificate, SampleSet)
    restores = Job.objects.filter(kind=JobKind.RESTORE)
    rows = (*(model._default_manager for model in models), restores)
    return tuple(one.aggregate(newest=Max("pk"))["newest"] or 0 for one in rows)


def _registry_digests() -> set[str]:
    kept = Artifact.objects.exclude(state=ArtifactState.RETIRED)
    found = digests_of_rows(kept)
    for rows in (Checkpoint, Escrow, RollbackCertificate, SampleSet):
        found |= digests_of_rows(rows._default_manager.all())
    return found


def _evaluation_digests() -> set[str]:
    return set(Evaluation.objects.values_list("digest", flat=True))


def _vital(pinned: set[str]) -> set[str]:
    """Manifests without which nobody can say what is needed. One of a corrupt artifact is known to be of no use."""
    published = Artifact.objects.filter(state__in=[ArtifactState.STAGED, ArtifactState.PUBLISHED])
    checkpoints = Checkpoint.objects.values_list("digest", flat=True)
    escrows = Escrow.objects.values_list("digest", flat=True)
    return {*checkpoints, *escrows, *published.values_list("digest", flat=True), *pinned}


def _released_weights(documents: Documents, closures: Mapping[str, frozenset[str]], used: set[str]) -> frozenset[str]:
    """Weights that a person gave up for an escrow. Everything that names their checkpoint leads to them, and none of it
    needs them; what keeps them is another checkpoint with the same file, an unfinished job or an environment."""
    given_up = {
        escrow.variant.digest: weight_files(escrow.variant)
        for escrow in Escrow.objects.filter(released_at__isnull=False).select_related("variant")
    }
    whole = set(Checkpoint.objects.filter(NOT_RELEASED).values_list("digest", flat=True))
    spared = whole | used
    let_go = {weight for digest, weights in given_up.items() if digest not in spared for weight in weights}
    if not let_go:
        return frozenset()
    manifests = [*Artifact.objects.values_list("digest", flat=True), *Escrow.objects.values_list("digest", flat=True)]
    kept = set().union(*(closures[digest] for digest in spared & closures.keys() & (whole | given_up.keys())))
    return frozenset(let_go.difference(kept, *(documents.named_in(digest) for digest in manifests)))


def weight_files(checkpoint: Checkpoint) -> dict[str, int]:
    """Digest and size of each weight file of a checkpoint."""
    files = checkpoint.manifest["files"].items()
    return {entry["sha256"]: entry["size"] for name, entry in files if name.endswith(".safetensors")}


def _retired(pinned: set[str]) -> set[str]:
    """Manifests of withdrawn artifacts that nothing else holds: an equal one may have been published again."""
    digests = Artifact.objects.values_list("digest", flat=True)
    retired = set(digests.filter(state=ArtifactState.RETIRED))
    return retired - pinned - set(digests.exclude(state=ArtifactState.RETIRED))


def _kept_since() -> datetime:
    return timezone.now() - timedelta(days=settings.STEP_KEEP_DAYS)


def _lately_ended() -> QuerySet[Job]:
    return Job.objects.filter(~Q(state__in=ACTIVE_JOB_STATES), finished_at__gte=_kept_since())


def _outputs(steps: QuerySet[Step]) -> set[str]:
    """Outputs that may be reused. A step without a key is offered to nobody any more."""
    done = steps.filter(state=StepState.DONE).exclude(key="").exclude(output="")
    return set(done.values_list("output", flat=True).distinct())


def _reusable_outputs(keys: set[str]) -> set[str]:
    return _outputs(Step.objects.filter(key__in=keys))
