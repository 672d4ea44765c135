"""Freeing blobs takes what nothing needs any more, and never a byte that a row still leads to."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_worker.contracts import canonical_json
from compression_worker.store import Store
from dashboard.models import SampleSet
from dashboard.services.blobs import blobs_free

pytestmark = pytest.mark.django_db


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def document(store: Store, *named: str) -> str:
    return store.write_bytes(canonical_json({"blobs": dict(enumerate(named))}))


def needed(store: Store, digest: str) -> None:
    SampleSet.objects.create(name="kept", kind="text", digest=digest, samples=1, size_bytes=store.size(digest))


def test_it_frees_what_a_document_names_and_counts_the_bytes(store: Store) -> None:
    weights = store.write_bytes(b"w" * 100)
    inner = document(store, weights)
    outer = document(store, inner)
    size = sum(store.size(digest) for digest in (weights, inner, outer))
    assert blobs_free(store=store, candidates={outer}) == (3, size)
    assert not any(store.has(digest) for digest in (weights, inner, outer))


def test_a_blob_that_a_row_leads_to_through_documents_stays(store: Store) -> None:
    shared = store.write_bytes(b"shared")
    lonely = store.write_bytes(b"lonely")
    needed(store, document(store, document(store, shared)))
    assert blobs_free(store=store, candidates={document(store, shared, lonely)})[0] == 2
    assert store.has(shared)
    assert not store.has(lonely)


def test_blobs_that_nobody_asked_to_free_stay_even_without_a_row(store: Store) -> None:
    other = store.write_bytes(b"of a job that writes right now")
    blobs_free(store=store, candidates={store.write_bytes(b"old")})
    assert store.has(other)


def test_a_view_of_a_freed_blob_goes_and_other_views_stay(store: Store) -> None:
    gone, kept = store.write_bytes(b"gone"), store.write_bytes(b"kept")
    needed(store, kept)
    old, present = store.view({"a.json": gone, "b.json": kept}), store.view({"b.json": kept})
    blobs_free(store=store, candidates={gone})
    assert not old.exists()
    assert (present / "b.json").read_bytes() == b"kept"


def test_a_digest_that_the_store_never_had_is_nothing_to_free(store: Store) -> None:
    assert blobs_free(store=store, candidates={"0" * 64}) == (0, 0)
