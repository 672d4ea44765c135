"""Studies in the browser: the form offers what fits, the page says how far each way is and what came of it."""

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
from django.utils import timezone

from compression_worker.catalog import METHODS
from dashboard.lifecycle import JobState, Role
from dashboard.models import Checkpoint, Job, Step, Study
from dashboard.selectors.studies import linears_bits
from tests.factories import make_artifact, make_study, measure_trial

ClientAs = Callable[[Role], Client]
HTMX = {"HTTP_HX_REQUEST": "true"}


def words(response: Any) -> str:
    return " ".join(unescape(response.content.decode()).split())


def sent(world: SimpleNamespace, **values: Any) -> dict[str, Any]:
    given = {
        "variant": world.variant.pk, "ways": ["gptq:4", "gptq:2", "bitdelta:"], "calibration": world.text.pk,
        "text_set": world.text.pk, "priority": "0",
    }  # fmt: skip
    return given | values


def latest() -> Study:
    return Study.objects.latest("pk")


def test_one_request_queues_the_study_and_leads_to_its_page(world: SimpleNamespace, client_as: ClientAs) -> None:
    response = client_as(Role.ENGINEER).post(reverse("study-new"), sent(world, max_windows="9"))
    study = latest()
    assert response.headers["Location"] == reverse("study-detail", args=[study.pk])
    trials = study.trials.order_by("index").values_list("method", "bits")
    assert list(trials) == [("bitdelta", None), ("gptq", 2), ("gptq", 4)], "in the order of the catalogue"
    assert study.config["max_windows"] == 9
    assert study.variant == world.variant


def test_training_tokens_are_for_the_methods_that_train_and_stand_on_the_page(
    world: SimpleNamespace, client_as: ClientAs
) -> None:
    client = client_as(Role.ENGINEER)
    ways = {"ways": ["gptq:2", "int21:2"], "training_tokens": "4096"}
    assert "others ignore it" in words(client.get(reverse("study-new")))
    few, own = (
        client.post(reverse("study-new"), sent(world, **ways | more, check="1")).context["forecast"].ways
        for more in ({}, {"training_tokens": ""})
    )
    assert [one.way.key for one in few] == ["gptq:2", "int21:2"]
    assert few[0].preflight.estimate == own[0].preflight.estimate
    assert few[1].preflight.estimate.needed_bytes < own[1].preflight.estimate.needed_bytes, "the teacher's answers"
    client.post(reverse("study-new"), sent(world, **ways))
    configs = [trial.compression.spec["config"] for trial in latest().trials.order_by("index")]
    assert [config.get("tokens") for config in configs] == [None, 4096]
    assert "<dt>Training tokens</dt><dd>4,096</dd>" in words(client.get(reverse("study-detail", args=[latest().pk])))
    client.post(reverse("study-new"), sent(world))
    assert "Training tokens" not in words(client.get(reverse("study-detail", args=[latest().pk])))


def test_a_base_model_is_offered_only_what_compresses_it(world: SimpleNamespace, client_as: ClientAs) -> None:
    client = client_as(Role.ENGINEER)
    page = client.get(f"{reverse('study-new')}?variant={world.base.pk}").content.decode()
    assert 'value="gptq:4"' in page
    assert 'value="bitdelta:"' not in page
    page = client.get(f"{reverse('study-new')}?variant={world.variant.pk}&ways=gptq:4").content.decode()
    assert 'value="gptq:4" checked' in page
    assert 'value="bitdelta:"' in page
    assert 'value="deltadq:2"' not in page, "a width that its settings refuse"


@pytest.mark.parametrize(
    ("values", "field", "said"),
    [
        ({"ways": []}, "ways", "Choose at least one way"),
        ({"ways": ["gptq:5"]}, "ways", "gptq:5"),
        ({"calibration": ""}, "calibration", "reads text"),
        ({"text_set": ""}, "text_set", "Choose a text set"),
        ({"variant": ""}, "variant", "required"),
        ({"max_windows": "1"}, "max_windows", "max_windows is 1"),
        ({"training_tokens": "0"}, "training_tokens", "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_stands_beside_its_field_and_what_was_typed_stays(
    world: SimpleNamespace, client_as: ClientAs, values: dict[str, Any], field: str, said: str
) -> None:
    before = Study.objects.count()
    response = client_as(Role.ENGINEER).post(reverse("study-new"), sent(world, choice_set=world.choice.pk if
                                             "text_set" not in values else "", **values))  # fmt: skip
    assert response.status_code == 422
    assert list(response.context["form"].errors) == [field]
    assert said in words(response)
    if field not in ("ways",):
        assert response.content.decode().count("checked") >= 3
    assert Study.objects.count() == before


def test_a_difference_of_a_base_model_is_refused_beside_the_methods(
    world: SimpleNamespace, client_as: ClientAs
) -> None:
    response = client_as(Role.ENGINEER).post(reverse("study-new"), sent(world, variant=world.base.pk))
    assert list(response.context["form"].errors) == ["ways"]
    assert "BitDelta needs a base, and 'smol-base' has none." in words(response)


def test_the_preview_says_what_each_way_will_come_to(world: SimpleNamespace, client_as: ClientAs) -> None:
    client, before = client_as(Role.ENGINEER), Study.objects.count()
    page = words(client.post(reverse("study-new"), sent(world, check="1"), **HTMX))
    assert page.startswith('<section id="preview"')
    for way in ("BitDelta", "GPTQ, 2 bits", "GPTQ, 4 bits", "each evaluation", "It fits"):
        assert way in page
    assert Study.objects.count() == before
    empty = words(client.post(reverse("study-new"), {"check": "1"}, **HTMX))
    assert "Choose a model and ways of compressing it" in empty


def test_the_page_tells_each_way_apart_in_bits_figures_time_and_memory(
    world: SimpleNamespace, client_as: ClientAs
) -> None:
    study = make_study(world.variant, [("gptq", 2), ("gptq", 4), ("deltadq", 4)], text_set=world.text)
    first, second, third = study.trials.order_by("index")
    for trial, perplexity, bits in ((first, 9.25, 2.28), (second, 4.75, 4.16)):
        measure_trial(trial, perplexity=perplexity, bits=bits)
        for index, seconds in enumerate((2.0, 3.5)):
            measured = {"seconds": seconds, "peak_memory_bytes": (index + 1) * 1e9}
            Step.objects.create(job=trial.compression, index=index, name="s", kind="k", state="done",
                                reused=trial == second and index == 0, data={"measured": measured})  # fmt: skip
    response = client_as(Role.VIEWER).get(reverse("study-detail", args=[study.pk]))
    page = words(response)
    for figure in ("2.28", "4.28", "4.16", "6.16", "9.25", "4.75", "5.5 s", "2.00 GB", "95.0", "0.020", "5.20×"):
        assert figure in page, figure
    assert "2 of 3 measured" in page
    assert "1 step was reused" in page
    pictures = response.context["pictures"]
    assert [name for name, _ in pictures] == ["linears", "file"]
    assert [row[2] for row in pictures[0][1].rows] == ["2.280", "4.160", "16.00"]
    assert page.count('hx-trigger="every 2s"') == 1
    assert Job.objects.get(pk=third.compression_id).state == JobState.QUEUED


def test_full_precision_is_the_row_that_all_are_compared_with(world: SimpleNamespace, client_as: ClientAs) -> None:
    response = client_as(Role.VIEWER).get(reverse("study-detail", args=[world.study.pk]))
    full = response.context["full"]
    assert full.bits == pytest.approx(8 * 5_200_000 / 2_600_000)
    assert [figure.value for figure in response.context["full_cells"]] == ["4.52", "0.000", "100.0", "41"]


def test_bits_of_a_difference_say_that_its_base_is_not_counted(world: SimpleNamespace, client_as: ClientAs) -> None:
    study = make_study(world.variant, [("gptq", 4), ("bitdelta", None)], text_set=world.text)
    for trial in study.trials.all():
        measure_trial(trial)
    page = words(client_as(Role.VIEWER).get(reverse("study-detail", args=[study.pk])))
    assert "BitDelta: only the difference is counted, and not the base that it needs beside it." in page
    assert "GPTQ: only" not in page


def test_bits_of_linears_come_from_the_ledger_where_a_method_does_not_tell(world: SimpleNamespace) -> None:
    linears = 4 * (4 * 128 * 128 + 3 * 128 * 384)
    assert linears_bits(world.artifact) == pytest.approx(8 * 300_000 / linears)
    told = make_artifact(world.variant, alone=True, figures={"linears": {"bits_per_weight": 3.5}})
    assert linears_bits(told) == 3.5
    Checkpoint.objects.filter(pk=world.variant.pk).update(manifest={"config": {}, "files": {}})
    world.artifact.variant.refresh_from_db()
    assert linears_bits(world.artifact) is None


def test_the_page_takes_as_many_queries_for_many_ways_as_for_one(world: SimpleNamespace, client_as: ClientAs) -> None:
    client = client_as(Role.VIEWER)

    def queries(bits: tuple[int, ...]) -> int:
        study = make_study(world.variant, [("gptq", one) for one in bits], text_set=world.text)
        for trial in study.trials.all():
            measure_trial(trial)
        address = reverse("study-detail", args=[study.pk])
        client.get(address)
        with CaptureQueriesContext(connection) as taken:
            client.get(address)
        return len(taken)

    assert queries((4,)) == queries((2, 3, 4, 8))


def test_a_poll_is_answered_with_nothing_new_until_something_moves(world: SimpleNamespace, client_as: ClientAs) -> None:
    study = make_study(world.variant, [("gptq", 4)], text_set=world.text)
    client, address = client_as(Role.VIEWER), reverse("study-detail", args=[study.pk])
    first = client.get(address, **HTMX)
    assert first.content.decode().strip().startswith('<div id="trials"')
    again = client.get(address, **HTMX, HTTP_IF_NONE_MATCH=first.headers["ETag"])
    assert again.status_code == 304
    measure_trial(study.trials.get())
    moved = client.get(address, **HTMX, HTTP_IF_NONE_MATCH=first.headers["ETag"])
    assert moved.status_code == 200
    assert "every 2s" not in moved.content.decode(), "nothing moves any more"


def test_a_study_is_stopped_and_made_to_go_on(world: SimpleNamespace, client_as: ClientAs) -> None:
    study = make_study(world.variant, [("gptq", 4), ("gptq", 2)], text_set=world.text)
    page = reverse("study-detail", args=[study.pk])
    assert "Stop the study" not in words(client_as(Role.VIEWER).get(page))
    assert client_as(Role.VIEWER).post(reverse("study-stop", args=[study.pk]), {"how": "stop"}).status_code == 403
    ops = client_as(Role.OPS)
    assert "Stop the study" in words(ops.get(page))
    told = words(ops.post(reverse("study-stop", args=[study.pk]), {"how": "kill"}, follow=True))
    assert "Stopped: 2 jobs end" in told
    assert "! stopped" in told.replace("</span> ", " ").replace('<span aria-hidden="true">', "")
    engineer = client_as(Role.ENGINEER)
    assert "Do again what did not succeed" in words(engineer.get(page))
    for job in Job.objects.filter(trial__study=study):
        job.spec = {"first": {"name": "plan", "kind": "gptq.plan", "inputs": {"variant": world.variant.digest}}}
        job.save()
    told = words(engineer.post(reverse("study-resume", args=[study.pk]), follow=True))
    assert "It goes on: 2 jobs are tried again" in told
    told = words(engineer.post(reverse("study-resume", args=[study.pk]), follow=True))
    assert "there is nothing to do again" in told
    bad = words(ops.post(reverse("study-stop", args=[study.pk]), {"how": "gently"}, follow=True))
    assert "a job is either stopped or killed" in bad


def test_what_could_not_be_evaluated_says_why(world: SimpleNamespace, client_as: ClientAs) -> None:
    study = make_study(world.variant, [("gptq", 4)], text_set=world.text)
    trial = study.trials.get()
    Job.objects.filter(pk=trial.compression_id).update(state=JobState.SUCCEEDED, finished_at=timezone.now())
    study.trials.update(problem="no room <for> it")
    page = client_as(Role.ENGINEER).get(reverse("study-detail", args=[study.pk])).content.decode()
    assert "no room &lt;for&gt; it" in page
    assert "needs you" in page
    assert "every 2s" not in page


def test_jobs_artifacts_and_models_lead_to_their_study(world: SimpleNamespace, client_as: ClientAs) -> None:
    trial = world.study.trials.get(index=0)
    address = reverse("study-detail", args=[world.study.pk])
    client = client_as(Role.VIEWER)
    for page in (
        reverse("job-detail", args=[trial.compression_id]),
        reverse("job-detail", args=[trial.evaluation_id]),
        reverse("artifact-detail", args=[trial.compression.artifact.pk]),
        reverse("checkpoint-detail", args=[world.variant.name]),
        reverse("study-list"),
    ):
        assert f'href="{address}"' in client.get(page).content.decode(), page


def test_every_method_is_in_the_table_of_ways(world: SimpleNamespace, client_as: ClientAs) -> None:
    page = words(client_as(Role.ENGINEER).get(f"{reverse('study-new')}?variant={world.variant.pk}"))
    assert [method.label for method in METHODS.values() if method.label not in page] == []
