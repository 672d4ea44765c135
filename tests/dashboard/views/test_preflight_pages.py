"""The pages around a job's fate: what it will come to, why it waits, why it failed and what to change."""

from __future__ import annotations

from collections.abc import Callable
from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from compression_worker.store import Store
from dashboard.lifecycle import JobKind, JobState, Role, StepState
from dashboard.models import Attempt, Job, Step, Worker
from dashboard.services.jobs import compression_create
from dashboard.services.ordering import steps_insert
from tests.dashboard.views.test_forms import JOB
from tests.factories import make_worker

HTMX = {"HX-Request": "true"}
ClientAs = Callable[[Role], Client]


def words(response: Any) -> str:
    return " ".join(unescape(response.content.decode()).split())


@pytest.fixture
def address() -> str:
    return reverse("job-create", args=["bitdelta"])


def small_worker(memory: int = 470_000_000) -> None:
    Worker.objects.update(memory_bytes=memory)


def test_the_form_shows_what_the_chosen_variant_would_come_to(
    world: SimpleNamespace, client_as: ClientAs, address: str
) -> None:
    page = words(client_as(Role.ENGINEER).get(f"{address}?variant={world.variant.pk}&distill_steps=0"))
    assert "It fits" in page
    assert "needs" in page
    assert "not measured here yet" in page
    assert 'id="data-forecast"' in page  # the ledger's table


def test_without_a_variant_it_says_what_to_choose(world: SimpleNamespace, client_as: ClientAs, address: str) -> None:
    assert "Choose what to work on" in words(client_as(Role.ENGINEER).get(address))


def test_check_shows_and_queues_nothing(world: SimpleNamespace, client_as: ClientAs, address: str) -> None:
    before = Job.objects.count()
    values = {**JOB, "variant": world.variant.pk, "check": "1"}
    response = client_as(Role.ENGINEER).post(address, values)
    assert response.status_code == 200
    assert "It fits" in words(response)
    assert 'name="seed" value="7"' in words(response)
    assert Job.objects.count() == before


def test_htmx_gets_the_preview_alone_and_also_of_a_form_that_is_not_whole(
    world: SimpleNamespace, client_as: ClientAs, address: str
) -> None:
    client = client_as(Role.ENGINEER)
    values = {**JOB, "variant": world.variant.pk, "check": "1"}
    html = client.post(address, values, headers=HTMX).content.decode()
    assert html.lstrip().startswith('<section id="preview"')
    assert "<form" not in html
    broken = client.post(address, values | {"batch_size": "none"}, headers=HTMX)
    assert broken.status_code == 200
    assert "Choose what to work on" in words(broken)


def test_a_job_that_cannot_fit_is_said_to_before_and_refused_on_the_form(
    world: SimpleNamespace, client_as: ClientAs, address: str
) -> None:
    client, values = client_as(Role.ENGINEER), {**JOB, "variant": world.variant.pk, "distill_steps": 20}
    values |= {"calibration_set": world.text.pk}
    small_worker(580_000_000)
    shown = client.post(address, values | {"check": "1"})
    assert "It does not fit" in words(shown)
    link = next(href for _remedy, href in shown.context["remedies"])
    assert "distill_steps=0" in link or "batch_size=" in link
    assert f"variant={world.variant.pk}" in link
    refused = client.post(address, values)
    assert refused.status_code == 422
    assert "too little" in words(refused)
    again = client.get(link)
    assert "It fits" in words(again)


def test_a_full_disk_leads_to_the_storage_page(
    world: SimpleNamespace, client_as: ClientAs, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1_000)
    page = words(client_as(Role.ENGINEER).get(f"{address}?variant={world.variant.pk}&distill_steps=0"))
    assert "on the storage page" in page
    assert f'<a href="{reverse("storage")}">Storage</a>' in page


def test_a_queue_is_asked_for_where_there_are_two(world: SimpleNamespace, client_as: ClientAs, address: str) -> None:
    client = client_as(Role.ENGINEER)
    assert 'name="queue"' not in words(client.get(address))
    worker = make_worker("gpu-1")
    Worker.objects.filter(pk=worker.pk).update(queues="gpu,cpu")
    assert 'name="queue"' in words(client.get(address))
    client.post(address, {**JOB, "variant": world.variant.pk, "queue": "gpu"})
    assert Job.objects.latest("pk").queue == "gpu"


def test_a_copy_of_a_job_without_distillation_is_judged_as_such(
    world: SimpleNamespace, client_as: ClientAs, address: str
) -> None:
    job = waiting_job(world, distill_steps=0)
    response = client_as(Role.ENGINEER).get(f"{address}?from={job.pk}")
    assert [need.load.kind for need in response.context["preflight"].needs if "distill" in need.load.kind] == []


def test_priorities_are_words(world: SimpleNamespace, client_as: ClientAs, address: str) -> None:
    client = client_as(Role.ENGINEER)
    assert '<option value="10">urgent</option>' in words(client.get(address))
    client.post(address, {**JOB, "variant": world.variant.pk, "priority": -10})
    job = Job.objects.latest("pk")
    assert job.priority == -10
    assert "priority: when idle" in words(client.get(reverse("job-detail", args=[job.pk])))
    Job.objects.filter(pk=job.pk).update(priority=5)
    assert "priority: normal (+5)" in words(client.get(reverse("job-detail", args=[job.pk])))


def test_the_evaluation_form_shows_what_it_will_come_to(world: SimpleNamespace, client_as: ClientAs) -> None:
    client, address = client_as(Role.ENGINEER), reverse("evaluation-new")
    response = client.get(f"{address}?target=a{world.artifact.pk}&text_set={world.text.pk}")
    assert "It fits" in words(response)
    assert "at its peak: target" in words(response)
    values = response.context["form"].initial
    assert values["target"] == f"a{world.artifact.pk}"


def waiting_job(world: SimpleNamespace, **values: Any) -> Job:
    return compression_create(
        actor=world.engineer,
        method="bitdelta",
        variant=world.variant,
        config={"distill_steps": 50, "batch_size": 4, "sequence_length": 64} | values,
        calibration=world.text,
    )


def test_a_queued_job_says_why_it_waits_on_its_page_in_the_list_and_on_the_overview(
    world: SimpleNamespace, client_as: ClientAs
) -> None:
    job = waiting_job(world)
    Worker.objects.all().delete()
    client, reason = client_as(Role.ENGINEER), "no living worker serves the queue cpu"
    for place in (reverse("job-detail", args=[job.pk]), reverse("job-list"), reverse("overview")):
        assert reason in words(client.get(place)), place
        assert reason in words(client.get(place, headers=HTMX)), place


def broken(job: Job, kind: str, outcome: str, detail: str, *, state: JobState = JobState.DEAD, code: str = "") -> None:
    """The job ended at a step of ``kind``, after three attempts of one cause."""
    now = timezone.now()
    step = Step.objects.create(
        job=job, index=40, name="steps 1 to 25", kind=kind, group="distill", attempt=3,
        state=StepState.FAILED if state == JobState.FAILED else StepState.DEAD,
        causes={} if state == JobState.FAILED else {outcome: 3},
    )  # fmt: skip
    ended = "killed" if outcome == "stalled" else outcome
    for number in (1, 2, 3):
        Attempt.objects.create(
            step=step, number=number, worker="w", outcome=ended, detail=detail, started_at=now, finished_at=now
        )
    message = detail.splitlines()[0]
    Job.objects.filter(pk=job.pk).update(state=state, error_code=code or outcome, error=message, finished_at=now)


def test_a_job_out_of_memory_opens_a_form_with_less_of_it_marked(world: SimpleNamespace, client_as: ClientAs) -> None:
    client = client_as(Role.ENGINEER)
    job = waiting_job(world, batch_size=64)
    detail = "the step needs more memory than it may take\nTraceback (most recent call last):\nMemoryError"
    broken(job, "bitdelta.distill", "errored", detail)
    page = words(client.get(reverse("job-detail", args=[job.pk])))
    assert "Out of memory." in page
    assert "in step 41, steps 1 to 25" in page
    assert "<code>MemoryError</code>" in page
    assert "Errored: 3 of 3" in page
    assert "(predicted)" in page
    href = f"{reverse('job-create', args=['bitdelta'])}?from={job.pk}&batch_size="
    assert href in page
    changed = page.partition(href)[2].partition('"')[0]
    form = client.get(href + changed)
    assert f'name="batch_size" value="{changed}"' in words(form)
    assert 'id="changed-batch_size"' in words(form)
    assert "<del>64</del>" in words(form)
    assert form.context["marks"] == {"batch_size": "64"}
    assert form.context["preflight"].fits


def test_a_diverged_job_opens_a_form_with_a_lower_learning_rate(world: SimpleNamespace, client_as: ClientAs) -> None:
    client = client_as(Role.ENGINEER)
    job = waiting_job(world, learning_rate=3e-4)
    said = "the loss of distillation step 12 is not finite: lower learning_rate"
    broken(job, "bitdelta.distill", "failed", said, state=JobState.FAILED, code="diverged")
    page = words(client.get(reverse("job-detail", args=[job.pk])))
    assert "Distillation diverged." in page
    assert f"?from={job.pk}&learning_rate=0.0001" in page


@pytest.mark.parametrize(
    ("outcome", "detail", "words_of_it"),
    [
        ("killed", "the computing process was ended by signal 9 (Killed)", ["Killed from outside.", "signal SIGKILL"]),
        ("lost", "the lease of worker-1 ran out", ["The worker was lost.", "Lost: 3 of 3"]),
        ("errored", "ValueError: x\nTraceback\nValueError: x", ["An error in the code."]),
        ("stalled", "no progress for 15 min", ["No progress."]),
    ],
)
def test_other_ends_have_their_card_and_a_way_on(
    world: SimpleNamespace, client_as: ClientAs, outcome: str, detail: str, words_of_it: list[str]
) -> None:
    job = waiting_job(world)
    broken(job, "bitdelta.layer", outcome, detail)
    page = words(client_as(Role.ENGINEER).get(reverse("job-detail", args=[job.pk])))
    assert [one for one in words_of_it if one not in page] == []
    assert f'id="way-on" href="{reverse("job-create", args=["bitdelta"])}?from={job.pk}' in page


def test_a_cancelled_and_a_blocked_job_have_a_way_on(world: SimpleNamespace, client_as: ClientAs) -> None:
    client = client_as(Role.ENGINEER)
    cancelled, blocked = waiting_job(world), waiting_job(world)
    Job.objects.filter(pk=cancelled.pk).update(state=JobState.CANCELLED, finished_at=timezone.now())
    Job.objects.filter(pk=blocked.pk).update(state=JobState.BLOCKED, blocked_reason="disk")
    assert 'id="way-on"' in words(client.get(reverse("job-detail", args=[cancelled.pk])))
    page = words(client.get(reverse("job-detail", args=[blocked.pk])))
    assert "The disk is full." in page
    assert f'id="way-on" href="{reverse("storage")}"' in page


def test_a_failed_import_begins_again_with_what_it_said(world: SimpleNamespace, client_as: ClientAs) -> None:
    client = client_as(Role.ENGINEER)
    spec = {"root": "imports", "folder": "a-model", "name": "new-name", "licence": "MIT", "base": None, "first": {}}
    world.failed.kind, world.failed.spec = JobKind.IMPORT, spec
    world.failed.save()
    page = words(client.get(reverse("job-detail", args=[world.failed.pk])))
    href = f"{reverse('checkpoint-import')}?from={world.failed.pk}"
    assert href in page
    assert 'value="new-name"' in words(client.get(href))


def test_an_evaluation_is_copied_with_its_sets(world: SimpleNamespace, client_as: ClientAs) -> None:
    client = client_as(Role.ENGINEER)
    address = reverse("evaluation-new")
    values = {"target": f"a{world.artifact.pk}", "text_set": world.text.pk, "window_tokens": 128, "max_windows": 10,
              "max_choices": 10, "max_new_tokens": 4, "bootstrap_resamples": 200, "seed": 0}  # fmt: skip
    client.post(address, values)
    job = Job.objects.latest("pk")
    assert job.kind == JobKind.EVALUATE
    form = client.get(f"{address}?from={job.pk}&window_tokens=64")
    assert form.context["marks"] == {"window_tokens": "128"}
    client.post(f"{address}?from={job.pk}", values | {"window_tokens": 64})
    assert Job.objects.latest("pk").cloned_from_id == job.pk


@pytest.mark.parametrize("number", ["x", "²", "9" * 30, "-1"])
def test_a_copy_of_nothing_is_an_empty_form(
    world: SimpleNamespace, client_as: ClientAs, address: str, number: str
) -> None:
    response = client_as(Role.ENGINEER).get(address, {"from": number, "batch_size": "many", "variant": "none"})
    assert response.status_code == 200
    assert response.context["original"] is None


def test_the_job_page_shows_predicted_beside_measured(world: SimpleNamespace, client_as: ClientAs) -> None:
    job = waiting_job(world)
    steps_insert(job=job, planned=[])
    page = words(client_as(Role.VIEWER).get(reverse("job-detail", args=[job.pk])))
    assert "Predicted and measured" in page
    assert "Memory at its peak" in page


def test_the_workers_page_says_what_each_has(world: SimpleNamespace, client_as: ClientAs) -> None:
    Worker.objects.update(
        memory_bytes=16_000_000_000, gpu_name="H100", gpu_memory_bytes=80_000_000_000, trouble="its disk is gone"
    )
    page = words(client_as(Role.VIEWER).get(reverse("worker-list")))
    assert [one for one in ("16.0 GB", "H100", "80.0 GB", "quarantined", "its disk is gone") if one not in page] == []
