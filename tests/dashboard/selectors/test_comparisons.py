"""Artifacts side by side: only figures of the same samples, full precision beside them, no query per artifact."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from dashboard.models import Artifact, Checkpoint, SampleSet
from dashboard.selectors.comparisons import Comparison, comparisons
from dashboard.selectors.registry import artifact_rows
from tests.factories import make_artifact, make_checkpoint, make_evaluation, make_sample_set, summary, value

pytestmark = pytest.mark.django_db


@pytest.fixture
def variant() -> Checkpoint:
    return make_checkpoint("tuned", make_checkpoint("base"))


@pytest.fixture
def text() -> SampleSet:
    return make_sample_set()


def results(**changes: Any) -> dict[str, Any]:
    """A summary whose compressed figures are ``changes``; None takes a metric out."""
    made = summary()
    for metric in made["metrics"]:
        if changes.get(metric["name"]) is not None:
            metric["values"]["compressed"] = value(changes[metric["name"]], 0.01)
    made["metrics"] = [one for one in made["metrics"] if changes.get(one["name"], 0) is not None]
    return made


def measured(variant: Checkpoint, name: str, text: SampleSet, **changes: Any) -> Artifact:
    artifact = make_artifact(variant, name=f"tuned-{name}")
    make_evaluation(artifact, text_set=text, results=results(**changes))
    return artifact


def found(variant: Checkpoint) -> dict[str, Comparison]:
    return {one.name: one for one in comparisons(artifact_rows(variant))}


def test_fidelity_task_score_and_perplexity_have_a_comparison_each(variant: Checkpoint, text: SampleSet) -> None:
    artifact = measured(variant, "a", text, kl_divergence=0.05)
    made = found(variant)
    assert list(made) == ["kl_divergence", "choice_accuracy", "perplexity"]
    full, point = made["kl_divergence"].points
    assert (full.href, full.value, full.size_bytes) == ("", 0.0, artifact.source_bytes)
    assert (point.label, point.family, point.value) == ("a", "BitDelta", 0.05)
    assert (point.low, point.high) == (pytest.approx(0.04), pytest.approx(0.06))
    assert point.href == reverse("artifact-detail", args=[artifact.pk])
    assert made["choice_accuracy"].quality.higher_is_better
    assert made["choice_accuracy"].quality.is_share
    assert not made["kl_divergence"].quality.higher_is_better


def test_what_was_not_measured_has_no_comparison(variant: Checkpoint, text: SampleSet) -> None:
    measured(variant, "a", text, kl_divergence=None, choice_accuracy=None)
    assert list(found(variant)) == ["perplexity"]
    assert comparisons([]) == []


def test_figures_of_other_samples_are_left_out_and_counted(variant: Checkpoint, text: SampleSet) -> None:
    measured(variant, "old", make_sample_set("other"))
    measured(variant, "new", text)
    made = found(variant)["perplexity"]
    assert [point.label for point in made.points] == ["full precision", "new"]
    assert made.left_out == 1
    assert made.note.startswith("1 artifact was measured on other samples")
    fewer = results()
    fewer["metrics"][0]["samples"] = 7
    make_evaluation(make_artifact(variant, name="tuned-fewer"), text_set=text, results=fewer)
    assert found(variant)["perplexity"].left_out == 2


def test_an_older_evaluation_on_the_same_samples_is_taken(variant: Checkpoint, text: SampleSet) -> None:
    first = measured(variant, "first", text, perplexity=5.5)
    make_evaluation(first, text_set=make_sample_set("other"), results=results(perplexity=9.9))
    measured(variant, "second", text, perplexity=4.7)
    values = {point.label: point.value for point in found(variant)["perplexity"].points}
    assert values == {"full precision": 4.52, "first": 5.5, "second": 4.7}


def test_an_evaluation_of_one_kind_does_not_hide_the_other(variant: Checkpoint, text: SampleSet) -> None:
    artifact = measured(variant, "a", text, choice_accuracy=None)
    quiz = make_sample_set("quiz", "choice")
    only = results(perplexity=None, kl_divergence=None, top1_agreement=None)
    make_evaluation(artifact, choice_set=quiz, results=only)
    assert set(found(variant)) == {"kl_divergence", "choice_accuracy", "perplexity"}


def test_withdrawn_artifacts_are_no_choice(variant: Checkpoint, text: SampleSet) -> None:
    measured(variant, "kept", text)
    artifact = measured(variant, "gone", text)
    Artifact.objects.filter(pk=artifact.pk).update(state="retired")
    assert [point.label for point in found(variant)["perplexity"].points] == ["full precision", "kept"]


def test_a_figure_without_an_interval_is_a_point_without_whiskers(variant: Checkpoint, text: SampleSet) -> None:
    bare = results()
    bare["metrics"][0]["values"]["compressed"] = {"value": 4.9, "low": None, "high": None}
    make_evaluation(make_artifact(variant, name="tuned-bare"), text_set=text, results=bare)
    point = found(variant)["perplexity"].points[1]
    assert (point.low, point.high) == (4.9, 4.9)


def test_it_takes_as_many_queries_for_many_artifacts_as_for_one(variant: Checkpoint, text: SampleSet) -> None:
    measured(variant, "a", text)
    with CaptureQueriesContext(connection) as few:
        comparisons(artifact_rows(variant))
    for number in range(5):
        measured(variant, f"b{number}", text)
    with CaptureQueriesContext(connection) as many:
        comparisons(artifact_rows(variant))
    assert len(many) == len(few) == 3
