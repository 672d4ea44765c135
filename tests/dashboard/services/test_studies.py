"""Studies: all compressions or none, each evaluation once and only when it is due, whoever looks and however often."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import PermissionDenied
from django.db import connection
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.catalog import METHODS
from dashboard.lifecycle import CancelRequest, JobKind, JobState, Refused, Role
from dashboard.models import Artifact, Checkpoint, Job, SampleSet, Study, Trial, User
from dashboard.selectors.trials import MOST, Way, bit_widths, ways_for, ways_of
from dashboard.services.demo_removal import demo_remove
from dashboard.services.jobs import job_retry
from dashboard.services.studies import studies_advance, study_create, study_resume, study_stop
from tests.dashboard.sketch import ALONE
from tests.dashboard.world import at_once, person
from tests.factories import make_artifact, make_checkpoint, make_sample_set, make_study, make_user

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "alone", ALONE)


@pytest.fixture
def base(db: None) -> Checkpoint:
    return make_checkpoint("base")


@pytest.fixture
def variant(base: Checkpoint) -> Checkpoint:
    return make_checkpoint("variant", base)


@pytest.fixture
def text(db: None) -> SampleSet:
    return make_sample_set()


def asked(variant: Checkpoint, text: SampleSet, **values: Any) -> Study:
    given: dict[str, Any] = {
        "actor": person(Role.ENGINEER),
        "ways": [Way("alone", 2), Way("alone", 4)],
        "calibration": text,
        "text_set": text,
    }
    return study_create(variant=variant, **(given | values))


def succeeded(trial: Trial) -> Artifact:
    """The trial's compression ended well, and its artifact is published."""
    now = timezone.now()
    Job.objects.filter(pk=trial.compression_id).update(state=JobState.SUCCEEDED, finished_at=now)
    return make_artifact(trial.study.variant, trial.compression, alone=True, method=trial.method)


def ended(job: Job, state: JobState) -> Job:
    Job.objects.filter(pk=job.pk).update(state=state, finished_at=timezone.now())
    job.refresh_from_db()
    return job


def test_methods_are_offered_at_the_widths_that_their_settings_allow(base: Checkpoint, variant: Checkpoint) -> None:
    assert bit_widths("alone") == (2, 4)
    assert bit_widths("deltadq") == (4, 8)
    assert ways_of("bitdelta") == [Way("bitdelta")]
    assert {way.method for way in ways_for(base)} == {name for name, one in METHODS.items() if not one.needs_base}
    assert {way.method for way in ways_for(variant)} == set(METHODS)


def test_one_request_queues_every_compression_with_its_own_settings(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text, config={"max_windows": 7}, priority=-10)
    jobs = [trial.compression for trial in study.trials.order_by("index")]
    assert [job.spec["config"] for job in jobs] == [{"bits": 2}, {"bits": 4}]
    assert [job.spec["calibration"] for job in jobs] == [text.pk, None], "what reads no text is given none"
    assert {(job.kind, job.state, job.priority, job.variant) for job in jobs} == {("compress", "queued", -10, base)}
    assert study.config["max_windows"] == 7
    assert study.config["window_tokens"] == 256, "defaults are written out"
    assert (study.created_by, study.trials.filter(evaluation=None).count()) == (person(Role.ENGINEER), 2)


def test_training_tokens_go_to_the_methods_that_ask_for_them(base: Checkpoint, text: SampleSet) -> None:
    ways = [Way("alone", 4), Way("gptq", 4), Way("int21", 2), Way("int21", 4)]
    study = asked(base, text, ways=ways, tokens=4096)
    found = [trial.compression.spec["config"].get("tokens") for trial in study.trials.order_by("index")]
    assert found == [None, None, 4096, 4096]
    own = asked(base, text, ways=ways).trials.get(method="int21", bits=2)
    assert own.compression.spec["config"]["tokens"] == Way("int21", 2).config().tokens == 262_144


def test_a_difference_and_a_whole_model_stand_side_by_side(variant: Checkpoint, text: SampleSet) -> None:
    study = asked(variant, text, ways=[Way("deltadq", 4), Way("alone", 4), Way("deltadq", 4)])
    first, second = study.trials.order_by("index")
    assert set(first.compression.spec["first"]["inputs"]) == {"base", "variant", "calibration"}
    assert set(second.compression.spec["first"]["inputs"]) == {"variant"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ways": []}, "at least one method"),
        ({"ways": [Way("alone", bits) for bits in range(MOST + 1)]}, "at most"),
        ({"ways": [Way("alone", 4), Way("bitdelta")]}, "BitDelta needs a base, and 'base' has none"),
        ({"calibration": None}, "Alone, 2 bits reads text"),
        ({"text_set": None}, "choose a text set"),
        ({"choice_set": "text"}, "is a set of the other kind"),
        ({"config": {"max_windows": 0}}, "max_windows is 0"),
        ({"queue": "nowhere"}, "no queue 'nowhere'"),
        ({"ways": [Way("gptq", 4), Way("int21", 2)], "tokens": 0}, "INT2.1, 2 bits: tokens is 0"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_queued(
    base: Checkpoint, text: SampleSet, values: dict[str, Any], words: str
) -> None:
    if values.get("choice_set") == "text":
        values = {"choice_set": text}
    with pytest.raises(Refused, match=words):
        asked(base, text, **values)
    assert not Study.objects.exists()
    assert not Job.objects.exists()


def test_what_does_not_fit_together_is_refused(
    base: Checkpoint, text: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dashboard.selectors import preflight

    each = preflight.compression_preflight(
        "alone", Way("alone", 4).config(), preflight.compression_inputs("alone", base, None), "cpu"
    ).estimate.needed_bytes
    monkeypatch.setattr(preflight, "free_bytes", lambda: int(1.2 * each))
    asked(base, text, ways=[Way("alone", 4)])
    with pytest.raises(Refused, match="Together they need"):
        asked(base, text)
    monkeypatch.setattr(preflight, "free_bytes", lambda: 1000)
    with pytest.raises(Refused, match=r"Alone, 2 bits: It needs .* too little"):
        asked(base, text)
    assert Study.objects.count() == 1


@pytest.mark.parametrize("role", [Role.VIEWER, Role.MANAGER, Role.OPS])
def test_other_roles_may_not_ask_for_a_study(base: Checkpoint, text: SampleSet, role: Role) -> None:
    with pytest.raises(PermissionDenied):
        asked(base, text, actor=person(role))


def test_an_evaluation_follows_each_compression_that_succeeds_once(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text, config={"max_windows": 7})
    first, second = study.trials.order_by("index")
    assert studies_advance() == 0
    artifact = succeeded(first)
    assert (studies_advance(), studies_advance()) == (1, 0)
    first.refresh_from_db()
    evaluation = first.evaluation
    assert evaluation is not None
    assert (evaluation.kind, evaluation.created_by) == (JobKind.EVALUATE, study.created_by)
    assert (evaluation.spec["artifact"], evaluation.spec["text_set"]) == (artifact.pk, text.pk)
    assert evaluation.spec["config"]["max_windows"] == 7
    ended(second.compression, JobState.FAILED)
    assert studies_advance() == 0


def test_two_who_look_at_the_same_time_ask_once(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text)
    for trial in study.trials.all():
        succeeded(trial)
    counts = at_once(*[studies_advance] * 4)
    assert sum(count for count in counts if isinstance(count, int)) == 2, counts
    assert Job.objects.filter(kind=JobKind.EVALUATE).count() == 2


def test_an_idle_worker_asks_for_what_is_due(base: Checkpoint, text: SampleSet, settings: Settings) -> None:
    from tests.dashboard.services.jobs_at_work import execution

    study = asked(base, text, ways=[Way("alone", 4)])
    succeeded(study.trials.get())
    present = execution()
    try:
        present.run_one()
    finally:
        present.close()
    assert study.trials.get().evaluation is not None


def test_what_refuses_an_evaluation_is_written_down_and_asked_again_by_a_person(
    base: Checkpoint, text: SampleSet
) -> None:
    study = asked(base, text, ways=[Way("alone", 4)])
    artifact = succeeded(study.trials.get())
    Artifact.objects.filter(pk=artifact.pk).update(state="retired")
    assert (studies_advance(), studies_advance()) == (0, 0)
    assert "no longer published" in study.trials.get().problem
    Artifact.objects.filter(pk=artifact.pk).update(state="published")
    assert studies_advance() == 0
    assert study_resume(actor=person(Role.ENGINEER), study=study) == 0
    assert studies_advance() == 1


def test_who_may_no_longer_queue_jobs_is_named(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text, ways=[Way("alone", 4)])
    succeeded(study.trials.get())
    User.objects.filter(pk=study.created_by_id).update(role=Role.VIEWER)
    assert studies_advance() == 0
    assert study.trials.get().problem == "engineer may no longer queue jobs"


def test_one_broken_trial_holds_up_no_other(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text)
    first, second = study.trials.order_by("index")
    ended(first.compression, JobState.SUCCEEDED)  # and its artifact is gone
    succeeded(second)
    assert studies_advance() == 1
    second.refresh_from_db()
    assert second.evaluation is not None


def test_a_retry_takes_the_place_of_what_it_repeats(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text, ways=[Way("alone", 4)])
    trial = study.trials.get()
    again = job_retry(actor=person(Role.ENGINEER), job=ended(trial.compression, JobState.FAILED))
    trial.refresh_from_db()
    assert trial.compression == again
    succeeded(trial)
    studies_advance()
    trial.refresh_from_db()
    assert trial.evaluation is not None
    second = job_retry(actor=person(Role.ENGINEER), job=ended(trial.evaluation, JobState.DEAD))
    trial.refresh_from_db()
    assert trial.evaluation == second
    done = ended(trial.compression, JobState.SUCCEEDED)
    job_retry(actor=person(Role.ENGINEER), job=done)
    trial.refresh_from_db()
    assert trial.compression == done, "what succeeded stays, whoever tries it again"


def test_a_stopped_study_asks_for_nothing_more_until_it_is_resumed(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text)
    first, second = study.trials.order_by("index")
    succeeded(first)
    assert study_stop(actor=person(Role.OPS), study=study, how=CancelRequest.STOP) == 1
    second.compression.refresh_from_db()
    assert second.compression.state == JobState.CANCELLED
    assert studies_advance() == 0
    assert study_resume(actor=person(Role.ENGINEER), study=study) == 1
    second.refresh_from_db()
    assert second.compression.state == JobState.QUEUED
    assert studies_advance() == 1
    with pytest.raises(Refused, match="nothing to do again"):
        study_resume(actor=person(Role.ENGINEER), study=study)


def test_stopping_and_resuming_need_their_roles(base: Checkpoint, text: SampleSet) -> None:
    study = asked(base, text)
    with pytest.raises(PermissionDenied):
        study_stop(actor=person(Role.VIEWER), study=study)
    with pytest.raises(PermissionDenied):
        study_resume(actor=person(Role.OPS), study=study)


def test_history_says_who_asked_who_stopped_and_why(base: Checkpoint, text: SampleSet) -> None:
    from dashboard.selectors.history import history

    study = asked(base, text, ways=[Way("alone", 4)])
    study_stop(actor=person(Role.OPS), study=study)
    stopped, made = history(kind="Study")
    assert (made.who, made.is_new, made.what) == ("engineer", True, "study of base")
    assert (stopped.who, stopped.why) == ("ops", f"stop #{study.pk} study of base")
    with connection.cursor() as cursor, pytest.raises(Exception, match="only added to"):
        cursor.execute("SET deltaworks.may_empty_history = 'no'; TRUNCATE dashboard_studyevent")


def test_a_study_goes_with_the_demo_and_keeps_the_sets_of_others(
    base: Checkpoint, settings: Settings, tmp_path: object
) -> None:
    settings.ARTIFACT_ROOT = str(tmp_path)
    Checkpoint.objects.filter(pk=base.pk).update(is_demo=True)
    ours, theirs = make_sample_set("ours", is_demo=True), make_sample_set("theirs", is_demo=True)
    make_study(base, [("alone", 4)], text_set=ours)
    kept = make_study(make_checkpoint("other"), [("alone", 4)], text_set=theirs, created_by=make_user(Role.ENGINEER))
    Job.objects.update(state=JobState.SUCCEEDED, finished_at=timezone.now())
    removed = demo_remove(actor=None)
    assert removed.counts["studies"] == 1
    assert list(Study.objects.all()) == [kept]
    assert list(SampleSet.objects.values_list("name", flat=True)) == ["theirs"]
