"""The pages about keeping full precision: both costs, a preview of what is given up, and the buttons that roles see."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from dashboard.formats import byte_words
from dashboard.lifecycle import JobKind, Role
from dashboard.models import Checkpoint, Job
from tests.factories import make_checkpoint, make_escrow

pytestmark = pytest.mark.django_db


def page(client: Client, variant: Checkpoint) -> str:
    return client.get(reverse("checkpoint-detail", args=[variant.name])).content.decode()


def test_the_variant_page_and_the_release_page_show_both_costs(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    viewer = client_as(Role.VIEWER)
    for html in (
        page(viewer, world.variant),
        viewer.get(reverse("environment-detail", args=[world.production.name])).content.decode(),
    ):
        section = html.split('id="full-precision"', 1)[1]
        assert byte_words(world.escrow.source_bytes) in section
        assert byte_words(world.escrow.escrow_bytes) in section
        assert "6.50" in section
    assert 'id="full-precision"' not in page(viewer, world.base)


def test_an_escrow_is_asked_for_by_a_button(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    variant = make_checkpoint("fresh", world.base)
    address = reverse("escrow-create", args=[variant.name])
    assert address not in page(client_as(Role.VIEWER), variant)
    client = client_as(Role.ENGINEER)
    assert address in page(client, variant)
    answer = client.post(address)
    job = Job.objects.get(kind=JobKind.ESCROW, variant=variant)
    assert answer.headers["Location"] == reverse("job-detail", args=[job.pk])
    assert client.get(answer.headers["Location"]).status_code == 200
    assert address not in page(client, variant), "not while one is under way"


def test_giving_up_shows_what_goes_and_needs_a_reason(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    variant = make_checkpoint("fresh", world.base)
    escrow, client = make_escrow(variant), client_as(Role.OPS)
    address = reverse("escrow-release", args=[variant.name])
    assert address in page(client, variant)
    html = client.get(address).content.decode()
    assert "model.safetensors" in html
    assert byte_words(5_200_000) in html
    assert client.post(address, {"reason": ""}).status_code == 422
    assert client.post(address, {"reason": "room"}).status_code == 302
    escrow.refresh_from_db()
    assert escrow.is_released
    after = page(client, variant)
    assert address not in after
    assert reverse("escrow-restore", args=[variant.name]) in after
    assert "given up" in after


def test_weights_that_are_deployed_have_no_button_and_say_why(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.OPS)
    address = reverse("escrow-release", args=[world.variant.name])
    html = page(client, world.variant)
    assert address not in html
    assert "its weights stay" in html
    refused = client.post(address, {"reason": "room"})
    assert refused.status_code == 422
    assert "stands on" in refused.content.decode()


def test_a_restore_is_asked_for_by_a_button(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    variant = make_checkpoint("fresh", world.base)
    make_escrow(variant, released_at=timezone.now())
    client = client_as(Role.OPS)
    answer = client.post(reverse("escrow-restore", args=[variant.name]))
    job = Job.objects.get(kind=JobKind.RESTORE, variant=variant)
    assert answer.headers["Location"] == reverse("job-detail", args=[job.pk])
    assert client.get(answer.headers["Location"]).status_code == 200
    again = client.post(reverse("escrow-restore", args=[variant.name]), follow=True)
    assert "is under way" in again.content.decode()


def test_a_variant_without_an_escrow_has_nothing_to_give_up(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    variant = make_checkpoint("fresh", world.base)
    assert client_as(Role.OPS).get(reverse("escrow-release", args=[variant.name])).status_code == 404
