"""The Storage page: what would be freed and what was, damage where it matters, and only an administrator frees."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from dashboard.lifecycle import Role, SweepState
from dashboard.models import Artifact, Checkpoint, Damage, Scrub, Sweep
from tests.factories import digest, make_sweep


def page(client: Client) -> str:
    return client.get(reverse("storage")).content.decode()


def test_the_preview_says_what_would_go_kind_by_kind(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    html = page(client_as(Role.VIEWER))
    assert "Leftovers of broken attempts" in html
    assert "Withdrawn artifacts" in html
    assert "10 blobs" in html
    assert 'title="2,000 B"' in html
    assert "Free it" not in html, "not for a viewer"
    listing = b"".join(client_as(Role.VIEWER).get(reverse("sweep-list", args=[world.sweep.pk])).streaming_content)
    assert {line.split()[0] for line in listing.decode().splitlines()} == set(
        world.sweep.listed.values_list("digest", flat=True)
    )


def test_an_administrator_asks_for_it_with_a_reason(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.ADMIN)
    address = reverse("sweep-free", args=[world.sweep.pk])
    refused = client.post(address, {"reason": " "})
    assert refused.status_code == 422
    assert "Free it" in refused.content.decode()
    assert client.post(address, {"reason": "the disk is full"}).status_code == 302
    world.sweep.refresh_from_db()
    assert (world.sweep.state, world.sweep.reason) == (SweepState.REQUESTED, "the disk is full")
    html = page(client)
    assert "the disk is full" in html
    assert "Freeing 2 blobs" in html
    late = client.post(address, {"reason": "again"})
    assert late.status_code == 409
    assert client.post(reverse("sweep-free", args=[0]), {"reason": "x"}).status_code == 404


@pytest.mark.parametrize("role", sorted(set(Role) - {Role.ADMIN}))
def test_nobody_else_may(world: SimpleNamespace, client_as: Callable[[Role], Client], role: Role) -> None:
    client = client_as(role)
    assert client.post(reverse("sweep-free", args=[world.sweep.pk]), {"reason": "x"}).status_code == 403
    assert client.post(reverse("storage-look")).status_code == 403
    assert Sweep.objects.get().state == SweepState.PREVIEWED


def test_a_worker_can_be_asked_to_look(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.ADMIN)
    assert "Look through the store now" in page(client)
    client.post(reverse("storage-look"))
    assert Sweep.objects.filter(state=SweepState.LOOKING).count() == 1
    assert "A worker is asked to look" in page(client)


def test_what_went_is_shown_beside_what_was_expected(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    make_sweep(
        SweepState.DONE, reason="spring", finished_at=timezone.now(), freed_blobs=1, freed_bytes=1500, kept_blobs=1
    )
    html = page(client_as(Role.VIEWER))
    assert "spring" in html
    assert 'title="1,500 B"' in html


def test_a_document_that_cannot_be_read_is_said_instead_of_a_preview(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    Sweep.objects.update(unreadable=["ab" * 32])
    html = page(client_as(Role.ADMIN))
    assert "Nothing can be freed now" in html
    assert "ab" * 6 in html
    assert "Free it" not in html


def damage(kind: str, row: Artifact | Checkpoint) -> Damage:
    now = timezone.now()
    concern = {"kind": kind, "pk": row.pk, "name": row.name}
    return Damage.objects.create(
        digest=digest(),
        kind="damaged",
        detail="<b>the disk</b> changed it",
        concerns=[concern],
        found_at=now,
        seen_at=now,
    )


def test_damage_stands_on_the_pages_that_it_concerns_and_goes_when_mended(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client, found = client_as(Role.VIEWER), damage("artifact", world.artifact)
    own = reverse("artifact-detail", args=[world.artifact.pk])
    other = reverse("checkpoint-detail", args=[world.variant.name])
    for address, there in ((reverse("storage"), True), (own, True), (other, False)):
        html = client.get(address).content.decode()
        assert (found.digest[:12] in html) is there, address
        assert "<b>the disk</b>" not in html
    Damage.objects.update(mended_at=timezone.now())
    assert found.digest[:12] not in client.get(own).content.decode()
    assert "Whole again" in page(client)


def test_a_damaged_base_is_said_on_its_page_and_on_what_needs_it(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client, found = client_as(Role.VIEWER), damage("checkpoint", world.base)
    for address in (
        reverse("checkpoint-detail", args=[world.base.name]),
        reverse("artifact-detail", args=[world.artifact.pk]),
    ):
        assert found.digest[:12] in client.get(address).content.decode()


def test_the_scrubbers_progress_and_its_troubles_are_shown(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    assert "No worker has begun yet" in page(client_as(Role.VIEWER))
    now = timezone.now()
    Scrub.objects.create(started_at=now, blobs=4, bytes=5_000, is_over=False, trouble="no answer", trouble_at=now)
    html = page(client_as(Role.VIEWER))
    assert "no answer" in html
    assert 'value="0.5000"' in html
    Scrub.objects.update(last_finished_at=now - timezone.timedelta(days=3))
    assert "do workers run?" in page(client_as(Role.VIEWER))


def test_a_store_in_a_bucket_is_told_as_one(
    world: SimpleNamespace, client_as: Callable[[Role], Client], settings: object, tmp_path: object
) -> None:
    settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE = "s3://bucket/prefix", str(tmp_path)  # type: ignore[attr-defined]
    assert "copies of s3://bucket/prefix" in page(client_as(Role.VIEWER))
