"""Pages of artifacts that stand alone say what is true of them: no base, no delta, nobody's variant where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from html import unescape
from types import SimpleNamespace

import pytest
from django.test import Client
from django.urls import reverse

from compression_worker.catalog import METHODS
from dashboard.forms.config import as_data
from dashboard.lifecycle import ApprovalState, Role
from dashboard.models import Job
from tests.factories import (
    deploy,
    make_approval,
    make_artifact,
    make_environment,
    make_evaluation,
    standalone_figures,
    summary,
)

ClientAs = Callable[[Role], Client]


@pytest.fixture
def alone(world: SimpleNamespace) -> SimpleNamespace:
    """An artifact of the base model, measured, asked for and deployed."""
    artifact = make_artifact(world.base, alone=True, method="gptq", name="quartered", figures=standalone_figures())
    results = summary() | {"targets": ["variant", "compressed"]}
    evaluation = make_evaluation(artifact, text_set=world.text, choice_set=world.choice, results=results)
    approval = make_approval(evaluation, ApprovalState.APPROVED)
    environment = make_environment("staging")
    deploy(environment, world.base, approval)
    return SimpleNamespace(**locals())


def page(client: Client, route: str, *key: object) -> str:
    return " ".join(unescape(client.get(reverse(route, args=key)).content.decode()).split())


def test_its_page_names_what_it_was_made_from_once(
    world: SimpleNamespace, client_as: ClientAs, alone: SimpleNamespace
) -> None:
    shown = page(client_as(Role.ENGINEER), "artifact-detail", alone.artifact.pk)
    crumbs = shown.partition('<p class="crumbs">')[2].partition("</p>")[0]
    assert crumbs.count(world.base.name) == 2, "one link: its address and its name"
    provenance = shown.partition("Provenance")[2].partition("</dl>")[0]
    assert "Made from" in provenance
    assert "it holds the whole model" in provenance
    assert ">Variant<" not in provenance
    table = shown.partition("Quality")[2].partition("</thead>")[0]
    assert ">uncompressed<" in table
    assert ">variant<" not in table


def test_its_pictures_are_there(world: SimpleNamespace, client_as: ClientAs, alone: SimpleNamespace) -> None:
    shown = page(client_as(Role.VIEWER), "artifact-detail", alone.artifact.pk)
    for title in (
        "Relative proxy loss between",
        "Relative error between",
        "Training: the loss goes from",
        "Training holds 60.0 MB at once, 2.00× less than LoRA on 16-bit weights",
    ):
        assert title in shown
    other = page(client_as(Role.VIEWER), "artifact-detail", world.artifact.pk)
    assert "proxy loss" not in other
    assert "Training holds" not in other


@pytest.mark.parametrize("method", METHODS)
def test_a_form_has_every_setting_of_its_method_beside_its_own_fields(
    world: SimpleNamespace, client_as: ClientAs, method: str
) -> None:
    """A setting named like one of the form's own fields would take its place."""
    own = {"variant", "calibration_set", "seed", "priority", "queue"}
    assert own.isdisjoint(one.name for one in fields(METHODS[method].config_class()))
    chosen = world.variant if METHODS[method].needs_base else world.base
    address = f"{reverse('job-create', args=[method])}?variant={chosen.pk}"
    shown = client_as(Role.ENGINEER).get(f"{address}&calibration_set={world.text.pk}")
    assert shown.status_code == 200
    assert shown.context["preflight"] is not None
    assert f'value="{world.text.pk}" selected' in shown.content.decode()


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if not one.needs_base])
def test_a_base_model_is_queued_by_the_form_as_it_opens(
    world: SimpleNamespace, client_as: ClientAs, method: str
) -> None:
    client, address = client_as(Role.ENGINEER), reverse("job-create", args=[method])
    form = client.get(f"{address}?variant={world.base.pk}&calibration_set={world.text.pk}").context["form"]
    sent = client.post(address, as_data(form))
    job = Job.objects.latest("pk")
    assert sent.headers["Location"] == reverse("job-detail", args=[job.pk])
    assert (job.method, job.variant, job.spec["calibration"]) == (method, world.base, world.text.pk)
    again = client.get(f"{address}?from={job.pk}").context["form"]
    assert again["calibration_set"].value() == world.text.pk


def test_the_memo_speaks_of_no_delta(world: SimpleNamespace, client_as: ClientAs, alone: SimpleNamespace) -> None:
    shown = page(client_as(Role.MANAGER), "approval-detail", alone.approval.pk)
    assert "would be answered by the GPTQ form of it, which stands alone" in shown
    assert "delta" not in shown.lower().partition("what it saves")[0].partition("what changes")[2]
    assert "Uncompressed model" in shown.partition("What it holds to")[2]
    assert "Base model" not in shown.partition("What it holds to")[2]
    other = page(client_as(Role.MANAGER), "approval-detail", world.pending.pk)
    assert "plus a BitDelta delta" in other
    assert "Base model" in other.partition("What it holds to")[2]


def test_a_base_model_has_its_artifacts_comparisons_and_places(
    world: SimpleNamespace, client_as: ClientAs, alone: SimpleNamespace
) -> None:
    client = client_as(Role.ENGINEER)
    shown = page(client, "checkpoint-detail", world.base.name)
    assert f'href="{reverse("artifact-detail", args=[alone.artifact.pk])}"' in shown
    assert "Quality against bytes" in shown
    assert f"{reverse('job-new')}?variant={world.base.pk}" in shown
    assert "Keeping full precision" not in shown, "a base has no escrow"
    release = page(client, "environment-detail", "staging")
    assert "smol-base @ gptq" in release


def test_the_evaluation_of_a_base_model_calls_nobody_a_variant(
    world: SimpleNamespace, client_as: ClientAs, alone: SimpleNamespace
) -> None:
    shown = page(client_as(Role.VIEWER), "evaluation-detail", alone.evaluation.pk)
    main = shown.partition("<main")[2]
    assert ">variant<" not in main
    assert main.count(">uncompressed<") >= 3, "the table, the flips, the answers"
