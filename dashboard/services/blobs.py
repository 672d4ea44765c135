"""Which bytes of the store the rows still need, and freeing those that none does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db.models import Model, QuerySet

from compression_worker.store import Store
from dashboard.models import Artifact, Checkpoint, Evaluation, Job, RollbackCertificate, SampleSet, Step

DIGEST = re.compile(r"[0-9a-f]{64}")
DOCUMENT_BYTES = 32_000_000
"""Documents that name other blobs are JSON and far smaller than this; weights are not looked into."""


def digests_of_rows(rows: QuerySet[Any]) -> set[str]:
    """Every digest that a column of ``rows`` names, steps of jobs included."""
    encoder = DjangoJSONEncoder()
    text = encoder.encode(list(rows.values()))
    if rows.model is Job:
        steps = Step.objects.filter(job__in=rows).values("params", "inputs", "output", "data")
        text += encoder.encode(list(steps))
    return set(DIGEST.findall(text))


def blobs_free(*, store: Store, candidates: Iterable[str]) -> tuple[int, int]:
    """Remove what is reachable from ``candidates`` and from no row. Returns how many blobs and bytes that freed."""
    doomed = _reachable(store, candidates)
    kept: set[str] = set()
    for model in (Artifact, Checkpoint, Evaluation, Job, RollbackCertificate, SampleSet):
        kept |= digests_of_rows(_all(model))
    doomed -= _reachable(store, kept)
    freed = store.remove(doomed)
    return len(doomed), freed


def _all(model: type[Model]) -> QuerySet[Any]:
    return model._default_manager.all()


def _reachable(store: Store, digests: Iterable[str]) -> set[str]:
    """The blobs among ``digests``, and those that the documents among them name."""
    found: set[str] = set()
    waiting = {digest for digest in digests if store.has(digest)}
    while waiting:
        digest = waiting.pop()
        found.add(digest)
        waiting |= {named for named in _named_in(store, digest) if named not in found and store.has(named)}
    return found


def _named_in(store: Store, digest: str) -> set[str]:
    if store.size(digest) > DOCUMENT_BYTES:
        return set()
    with store.open(digest) as file:
        if file.read(1) != b"{":
            return set()
        return set(DIGEST.findall(file.read().decode("utf-8", errors="replace")))
