"""Looking through, freeing and hashing a store in a bucket: the same as in a folder, on a real S3 server."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
from django.utils import timezone

from compression_worker.bucket import BucketStore
from dashboard.lifecycle import ArtifactState, Role, SweepKind
from dashboard.models import Artifact, Damage, Scrub, Sweep
from dashboard.services.storage import storage_turn
from dashboard.services.storage_scrub import scrub_turn
from dashboard.services.storage_sweep import sweep_request
from tests.dashboard.shelf import Shelf
from tests.factories import make_user
from tests.seaweed import BUCKET, Seaweed

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_clean_up_and_the_scrubber_work_on_a_bucket(
    tmp_path: Path, settings: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Seaweed(tmp_path / "seaweed")
    try:
        server.start()
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        settings.ARTIFACT_ROOT = f"s3://{BUCKET}/product"  # type: ignore[attr-defined]
        settings.ARTIFACT_CACHE = str(tmp_path / "cache")  # type: ignore[attr-defined]
        settings.SWEEP_GRACE_DAYS = 0  # type: ignore[attr-defined]
        walk(server, Shelf(BucketStore(f"s3://{BUCKET}/product", tmp_path / "other-machine")))
    finally:
        server.kill()


def walk(server: Seaweed, shelf: Shelf) -> None:
    variant = shelf.checkpoint("variant", shelf.checkpoint("base"))
    kept, retired = shelf.artifact(variant, "kept"), shelf.artifact(variant, "old", state=ArtifactState.RETIRED)
    going = shelf.files(retired)
    leftover = shelf.blob()
    before = {blob.digest: blob.size for blob in shelf.store.blobs()}
    time.sleep(2.1)  # dates in a bucket are whole seconds
    assert storage_turn()
    preview = Sweep.objects.get()
    kinds = dict(preview.listed.values_list("digest", "kind"))
    assert {digest for digest, kind in kinds.items() if kind == SweepKind.RETIRED} == going
    assert kinds[leftover] == SweepKind.LEFTOVER
    sweep_request(actor=make_user(Role.ADMIN), sweep=preview, reason="the bill")
    Scrub.objects.update(turn_until=None)
    assert storage_turn()
    preview.refresh_from_db()
    present = {blob.digest for blob in shelf.store.blobs()}
    assert before.keys() - present == kinds.keys()
    assert preview.freed_bytes == sum(before[digest] for digest in kinds)
    victim = sorted(shelf.files(kept) - {kept.digest})[0]
    server.client().call_s3("put_object", Bucket=BUCKET, Key=shelf.store._key(victim), Body=b"damaged")  # type: ignore[attr-defined]
    now = timezone.now() + timedelta(days=2)
    for _ in range(3):
        scrub_turn(store=shelf.store, now=now, seconds=20)
        now += timedelta(hours=23)
    assert [damage.digest for damage in Damage.objects.all()] == [victim]
    assert Artifact.objects.get(pk=kept.pk).state == ArtifactState.CORRUPT
