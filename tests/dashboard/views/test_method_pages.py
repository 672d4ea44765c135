"""Choosing a method: its card in plain words, its own settings, what stays when another is chosen."""

from __future__ import annotations

from collections.abc import Callable
from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from compression_worker.catalog import METHODS
from dashboard.lifecycle import Role
from dashboard.models import Job
from tests.dashboard.sketch import ALONE, SKETCH
from tests.dashboard.views.test_forms import JOB
from tests.factories import make_artifact

ClientAs = Callable[[Role], Client]
SENT = {"bits": "2", "exact": "on", "group_size": "64", "seed": "0", "priority": "0"}


@pytest.fixture
def sketch(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a second method's form."""
    monkeypatch.setitem(METHODS, "sketch", SKETCH)
    return reverse("job-create", args=["sketch"])


def words(response: Any) -> str:
    return " ".join(unescape(response.content.decode()).split())


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_says_what_it_does_when_to_use_it_and_what_it_costs(
    world: SimpleNamespace, client_as: ClientAs, name: str
) -> None:
    method = METHODS[name]
    assert len(method.words) == 3
    client = client_as(Role.ENGINEER)
    for page in (words(client.get(reverse("job-new"))), words(client.get(reverse("job-create", args=[name])))):
        assert [said for said in (method.label, *method.words) if said not in page] == []


def test_every_method_of_the_catalogue_has_a_card(world: SimpleNamespace, client_as: ClientAs, sketch: str) -> None:
    client = client_as(Role.ENGINEER)
    page = client.get(f"{reverse('job-new')}?variant={world.variant.pk}").content.decode()
    assert f'href="{sketch}?variant={world.variant.pk}"' in page
    assert "Draws &lt;b&gt;nothing" in page
    make_artifact(world.variant, name="small", artifact_bytes=500_000)
    page = words(client.get(reverse("job-new")))
    assert page.count("measured here") == 1
    assert "5.20×" in page
    assert "10.4×" in page


def test_cards_stand_by_what_methods_compress(
    world: SimpleNamespace, client_as: ClientAs, sketch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "alone", ALONE)
    page = words(client_as(Role.ENGINEER).get(reverse("job-new")))
    parts = page.split("<h2>")
    difference = next(part for part in parts if part.startswith("The difference between a variant and its base"))
    whole = next(part for part in parts if part.startswith("A whole model by itself"))
    assert "Set up Sketch" in difference
    assert "Set up Alone" in whole
    assert "needs the base model" in difference
    assert "needs the base model" not in whole


def test_a_base_model_is_offered_only_what_compresses_it(
    world: SimpleNamespace, client_as: ClientAs, sketch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "alone", ALONE)
    client = client_as(Role.ENGINEER)
    page = words(client.get(f"{reverse('job-new')}?variant={world.base.pk}"))
    assert "What fits smol-base." in page
    assert "Set up Alone" in page
    assert "Set up Sketch" not in page
    form = client.get(f"{reverse('job-create', args=['alone'])}?variant={world.base.pk}")
    cards = [card.name for family in form.context["families"] for card in family.cards]
    assert "alone" in cards
    assert not any(METHODS[name].needs_base for name in cards)
    other = client.get(f"{reverse('job-create', args=['alone'])}?variant={world.variant.pk}")
    assert {card.name for family in other.context["families"] for card in family.cards} == set(METHODS)
    assert 'hx-target="#methods"' in other.content.decode()


def test_a_form_lists_the_models_that_its_method_can_compress(
    world: SimpleNamespace, client_as: ClientAs, sketch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "alone", ALONE)
    client = client_as(Role.ENGINEER)
    listed = {
        name: set(client.get(reverse("job-create", args=[name])).context["form"].fields["variant"].queryset)
        for name in ("alone", "sketch")
    }
    assert listed == {"alone": {world.base, world.variant}, "sketch": {world.variant}}
    response = client.post(sketch, SENT | {"variant": world.base.pk})
    assert list(response.context["form"].errors) == ["variant"]
    client.post(
        reverse("job-create", args=["alone"]), {"bits": "4", "seed": "0", "priority": "0", "variant": world.base.pk}
    )
    job = Job.objects.latest("pk")
    assert (job.method, job.variant, set(job.spec["first"]["inputs"])) == ("alone", world.base, {"variant"})


def test_cards_take_one_query_however_many_methods_there_are(
    world: SimpleNamespace, client_as: ClientAs, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, address = client_as(Role.ENGINEER), reverse("job-create", args=["bitdelta"])
    client.get(address)
    with CaptureQueriesContext(connection) as few:
        client.get(address)
    for number in range(4):
        monkeypatch.setitem(METHODS, f"sketch-{number}", SKETCH)
    with CaptureQueriesContext(connection) as many:
        client.get(address)
    assert len(many) == len(few)


def test_a_chosen_card_shows_that_methods_own_settings(
    world: SimpleNamespace, client_as: ClientAs, sketch: str
) -> None:
    client = client_as(Role.ENGINEER)
    page = client.get(sketch).content.decode()
    assert 'id="method-sketch" href="/jobs/new/sketch/' in page
    assert page.count('aria-current="true"') == 1
    assert 'name="group_size"' in page
    assert "distill_steps" not in page
    assert '<details id="more-settings" class="settings">' in page
    other = client.get(reverse("job-create", args=["bitdelta"])).content.decode()
    assert 'name="exact"' not in other


def test_the_way_to_another_method_keeps_what_both_ask(
    world: SimpleNamespace, client_as: ClientAs, sketch: str
) -> None:
    client = client_as(Role.ENGINEER)
    shown = client.post(
        reverse("job-create", args=["bitdelta"]), {**JOB, "variant": world.variant.pk, "check": "1"}
    ).content.decode()
    href = f"{sketch}?variant={world.variant.pk}&seed=7&priority=0"
    assert f'href="{href}"' in unescape(shown)
    form = client.get(href).context["form"]
    assert str(form["variant"].value()) == str(world.variant.pk)
    assert form["seed"].value() == "7"
    assert form["bits"].value() == 4


def test_a_refused_job_keeps_what_was_typed_and_opens_the_fold(
    world: SimpleNamespace, client_as: ClientAs, sketch: str
) -> None:
    values = SENT | {"variant": world.variant.pk, "ratio": "12.5", "group_size": "12", "seed": "3"}
    before = Job.objects.count()
    response = client_as(Role.ENGINEER).post(sketch, values)
    page = response.content.decode()
    assert response.status_code == 422
    assert 'name="ratio" value="12.5"' in page
    assert 'name="group_size" value="12"' in page
    assert 'id="id_group_size_error"' in page
    assert '<details id="more-settings" class="settings" open>' in page
    assert Job.objects.count() == before


def test_settings_that_read_text_ask_for_it_beside_the_text(
    world: SimpleNamespace, client_as: ClientAs, sketch: str
) -> None:
    client = client_as(Role.ENGINEER)
    values = SENT | {"variant": world.variant.pk, "way": "far"}
    assert list(client.post(sketch, values).context["form"].errors) == ["calibration_set"]
    shown = client.post(sketch, values | {"calibration_set": world.text.pk, "check": "1"})
    assert shown.context["form"].errors == {}
    assert shown.context["preflight"] is not None


def test_fields_are_described_by_their_help_and_their_error(
    world: SimpleNamespace, client_as: ClientAs, sketch: str
) -> None:
    page = client_as(Role.ENGINEER).post(sketch, SENT | {"variant": world.variant.pk, "group_size": "12"})
    field = page.content.decode().partition('name="group_size"')[2].partition(">")[0]
    assert 'aria-invalid="true"' in field
    assert "id_group_size_helptext" in field
    assert "id_group_size_error" in field


def test_models_without_a_prediction_are_not_called_missing(world: SimpleNamespace, client_as: ClientAs) -> None:
    """Four layers of which the first and last two are protected leave DeltaLLM nothing to share by its own settings."""
    shown = words(client_as(Role.ENGINEER).get(reverse("job-create", args=["deltallm"])))
    assert "no size can be predicted for the models that are registered" in shown
    assert "No model is registered yet" not in shown
