"""Which bytes of the store the rows still need, and freeing those that none does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db.models import Model, QuerySet

from compression_worker.contracts import CompressionError
from compression_worker.store import Store
from dashboard.models import Artifact, Checkpoint, Escrow, Evaluation, Job, RollbackCertificate, SampleSet, Step

DIGEST = re.compile(r"[0-9a-f]{64}")
DOCUMENT_BYTES = 32_000_000
"""Documents that name other blobs are JSON and far smaller than this; weights are not looked into."""
REMEMBERED = 200_000
_NAMED: dict[str, frozenset[str]] = {}


class Documents:
    """Which blobs lead to which: the documents of a store, each read once by a process, since a blob never changes.

    ``has`` says which digests are blobs of the store at all. ``unreadable`` collects the documents that are damaged or
    missing: what they name is not known.
    """

    def __init__(self, store: Store, has: Callable[[str], bool] | None = None) -> None:
        self._store = store
        self._has = has or store.has
        self.unreadable: set[str] = set()

    def reachable(self, digests: Iterable[str]) -> set[str]:
        """The blobs among ``digests``, and those that the documents among them name."""
        found: set[str] = set()
        waiting = {digest for digest in digests if self._has(digest)}
        while waiting:
            digest = waiting.pop()
            found.add(digest)
            waiting |= {named for named in self.named_in(digest) if named not in found and self._has(named)}
        return found

    def named_in(self, digest: str) -> frozenset[str]:
        """Everything in the document that reads like a digest; nothing for weights and for what cannot be read."""
        if digest in _NAMED:
            return _NAMED[digest]
        try:
            text = self._store.document(digest, DOCUMENT_BYTES)
        except CompressionError:
            self.unreadable.add(digest)
            return frozenset()
        if text is None:  # not remembered: a document whose first byte is damaged looks like weights, until mended
            return frozenset()
        if len(_NAMED) >= REMEMBERED:
            _NAMED.clear()
        _NAMED[digest] = frozenset(DIGEST.findall(text.decode("utf-8", errors="replace")))
        return _NAMED[digest]

    def can_read(self, digest: str) -> bool:
        """Whether ``digest`` is a document whose names are known."""
        return bool(self.named_in(digest))


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
    doomed = Documents(store).reachable(candidates)
    kept: set[str] = set()
    for model in (Artifact, Checkpoint, Escrow, Evaluation, Job, RollbackCertificate, SampleSet):
        kept |= digests_of_rows(_all(model))
    keeping = Documents(store)
    doomed -= keeping.reachable(kept)
    if keeping.unreadable:
        return 0, 0  # nobody knows what a damaged document needs: a later clean-up takes the rest
    freed = store.remove(doomed)
    return len(doomed), freed


def _all(model: type[Model]) -> QuerySet[Any]:
    return model._default_manager.all()
