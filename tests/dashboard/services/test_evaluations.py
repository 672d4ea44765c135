"""Sample sets as immutable versions, and evaluations from the request to the published result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import PermissionDenied
from pytest_django.fixtures import Settings

from compression_worker.launcher import Outcome
from compression_worker.store import Store
from dashboard.lifecycle import Conflict, JobState, Refused, Role
from dashboard.models import Evaluation, Job, SampleSet
from dashboard.services.evaluations import evaluation_create, sample_set_create
from dashboard.services.registry import artifact_retire
from dashboard.services.steps import step_claim, step_finish
from tests.dashboard.world import RESULTS, artifact, at_once, checkpoint, digest, pair, person

pytestmark = pytest.mark.django_db(transaction=True)

QUESTIONS = b'{"question": "1 + 1?", "choices": ["2", "3"], "answer": 0}\n'


@pytest.fixture(autouse=True)
def _store(settings: Settings, tmp_path: Path) -> None:
    settings.ARTIFACT_ROOT = str(tmp_path / "store")


def upload(data: bytes = b"some text\n", **values: Any) -> SampleSet:
    given: dict[str, Any] = {"actor": person(Role.ENGINEER), "name": "news", "kind": "text", "data": data}
    return sample_set_create(**(given | values))


def test_an_upload_is_stored_by_digest_as_version_one(tmp_path: Path) -> None:
    samples = upload(origin="news.txt")
    assert (samples.version, samples.samples, samples.origin) == (1, 1, "news.txt")
    assert Store(tmp_path / "store").read_bytes(samples.digest) == b'{"text":"some text\\n"}\n'
    assert samples.size_bytes == 23


def test_a_changed_file_is_a_new_version_and_the_old_one_stays() -> None:
    first, second = upload(), upload(b"other text\n")
    assert (first.version, second.version) == (1, 2)
    assert first.digest != second.digest


def test_the_same_file_again_is_refused_with_the_version_it_is() -> None:
    upload()
    with pytest.raises(Refused, match="version 1"):
        upload()


def test_a_bad_line_is_named() -> None:
    with pytest.raises(Refused, match="line 2"):
        upload(QUESTIONS + b'{"question": "?"}\n', kind="choice")
    assert not SampleSet.objects.exists()


def test_a_name_keeps_its_kind() -> None:
    upload()
    with pytest.raises(Refused, match="another kind"):
        upload(QUESTIONS, kind="choice")


@pytest.mark.parametrize("name", ["", "../up", "a b"])
def test_a_set_needs_a_name_that_is_a_slug(name: str) -> None:
    with pytest.raises(Refused):
        upload(name=name)


def test_a_viewer_may_not_upload() -> None:
    with pytest.raises(PermissionDenied):
        upload(actor=person(Role.VIEWER))


def test_only_a_bundled_set_comes_without_a_person() -> None:
    with pytest.raises(Refused):
        upload(actor=None)
    assert upload(actor=None, bundled=True).created_by is None


def test_two_uploads_at_once_never_share_a_version() -> None:
    results = at_once(lambda: upload(b"one\n"), lambda: upload(b"two\n"), lambda: upload(b"three\n"))
    made = [result.version for result in results if isinstance(result, SampleSet)]
    assert len(set(made)) == len(made) >= 1
    assert all(isinstance(result, SampleSet | Conflict) for result in results)


def test_an_evaluation_names_its_inputs_by_digest() -> None:
    made, text, questions = artifact(), upload(), upload(QUESTIONS, name="quiz", kind="choice")
    job = evaluation_create(
        actor=person(Role.ENGINEER),
        variant=made.variant,
        artifact=made,
        text_set=text,
        choice_set=questions,
        config={"max_windows": 5},
    )
    base, variant = pair()
    first = job.steps.get()
    assert first.inputs == {
        "base": base.digest,
        "variant": variant.digest,
        "artifact": made.digest,
        "text": text.digest,
        "choice": questions.digest,
    }
    assert first.params["config"]["max_windows"] == 5
    assert "window_tokens" in first.params["config"]


def finish_with(data: dict[str, Any]) -> None:
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    step_finish(claim=claim, outcome=Outcome(kind="done", output=digest("summary"), data=data))


def measured(**values: Any) -> Job:
    given: dict[str, Any] = {"actor": person(Role.ENGINEER), "variant": pair()[1]}
    return evaluation_create(**({"text_set": upload()} if "text_set" not in values else {}), **(given | values))


def test_the_summary_is_published_under_the_digest_of_its_output() -> None:
    made = artifact()
    job = measured(artifact=made)
    finish_with(RESULTS)
    published = Evaluation.objects.get(job=job)
    assert (published.artifact, published.digest, published.results) == (made, digest("summary"), RESULTS)
    assert published.text_set is not None


def test_a_summary_without_a_metric_fails_the_job() -> None:
    job = measured()
    finish_with(RESULTS | {"metrics": []})
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert not Evaluation.objects.exists()


def test_a_base_model_can_be_measured_alone() -> None:
    job = measured(variant=checkpoint("alone"))
    assert set(job.steps.get().inputs) == {"variant", "text"}


def test_what_cannot_be_measured_is_refused() -> None:
    made, text = artifact(), upload()
    questions = upload(QUESTIONS, name="quiz", kind="choice")
    with pytest.raises(Refused, match="choose a text set"):
        measured(text_set=None, choice_set=None)
    with pytest.raises(Refused, match="not a text set"):
        measured(text_set=questions)
    with pytest.raises(Refused, match="not a multiple-choice set"):
        measured(text_set=None, choice_set=text)
    with pytest.raises(Refused, match="made from another model"):
        measured(variant=checkpoint("other"), artifact=made, text_set=text)
    with pytest.raises(Refused):
        measured(text_set=text, config={"max_windows": 0})
    artifact_retire(actor=person(Role.ENGINEER), artifact=made, reason="old")
    with pytest.raises(Refused, match="no longer published"):
        measured(artifact=made, text_set=text)
