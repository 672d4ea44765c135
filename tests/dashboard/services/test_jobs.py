"""Jobs as people see them: asked for, stopped, killed and tried again, with real children where one runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pghistory.models
import pytest
from django.core.exceptions import PermissionDenied
from django.db import connection

from dashboard.execution import Execution
from dashboard.lifecycle import CancelRequest, JobKind, JobState, Refused, Role
from dashboard.models import Attempt, Job, User
from dashboard.services.jobs import compression_create, job_cancel, job_reprioritise, job_retry
from dashboard.services.steps import LeaseLost, step_claim, step_watch
from tests.dashboard.services.jobs_at_work import ordered, step
from tests.dashboard.world import checkpoint, digest, pair, person

pytestmark = pytest.mark.django_db(transaction=True)


def ask(**values: Any) -> Job:
    given: dict[str, Any] = {
        "actor": person(Role.ENGINEER),
        "method": "bitdelta",
        "variant": pair()[1],
        "config": {"distill_steps": 10},
    }
    return compression_create(**(given | values))


def in_background(worker: Execution) -> threading.Thread:
    """``worker`` computes all there is, on a thread and a connection of its own."""

    def run() -> None:
        try:
            worker.run_all()
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.05)


def state_of(job: Job) -> str:
    job.refresh_from_db()
    return job.state


def test_a_compression_is_queued_with_its_whole_configuration_and_one_plan_step() -> None:
    job = ask(seed=7, priority=3)
    assert (job.state, job.kind, job.method, job.priority) == (JobState.QUEUED, JobKind.COMPRESS, "bitdelta", 3)
    first = job.steps.get()
    assert (first.kind, first.seed, first.name) == ("bitdelta.plan", 7, "plan")
    base, variant = pair()
    assert first.inputs == {"base": base.digest, "variant": variant.digest}
    assert first.params["config"]["distill_steps"] == 10
    assert "learning_rate" in first.params["config"]


def test_an_unknown_method_or_setting_is_refused_with_its_name() -> None:
    with pytest.raises(Refused, match="no method 'magic'"):
        ask(method="magic")
    with pytest.raises(Refused, match="no_such_setting"):
        ask(config={"no_such_setting": 1})
    with pytest.raises(Refused):
        ask(config={"distill_steps": -1})
    assert not Job.objects.exists()


def test_a_base_model_has_no_difference_to_compress() -> None:
    with pytest.raises(Refused, match="no base model"):
        ask(variant=pair()[0])


@pytest.mark.parametrize("role", [Role.VIEWER, Role.MANAGER, Role.OPS])
def test_other_roles_may_not_queue_a_compression(role: Role) -> None:
    with pytest.raises(PermissionDenied):
        ask(actor=person(role))


def test_a_role_taken_away_since_the_page_was_shown_counts() -> None:
    engineer = person(Role.ENGINEER)
    User.objects.filter(pk=engineer.pk).update(role=Role.VIEWER)
    with pytest.raises(PermissionDenied):
        ask(actor=engineer)


def test_a_person_who_was_switched_off_may_do_nothing() -> None:
    engineer = person(Role.ENGINEER)
    User.objects.filter(pk=engineer.pk).update(is_active=False)
    with pytest.raises(PermissionDenied):
        ask(actor=engineer)


def test_history_says_who_asked_for_a_job_and_why() -> None:
    job = ask()
    events = pghistory.models.Events.objects.tracks(job)
    context = events.get().pgh_context
    assert context == {"user": job.created_by_id, "reason": "bitdelta variant"}


def test_a_queued_job_is_cancelled_at_once_and_never_starts() -> None:
    job = ordered(step("done"))
    job_cancel(actor=person(Role.OPS), job=job, how=CancelRequest.STOP)
    assert state_of(job) == JobState.CANCELLED
    assert set(job.steps.values_list("state", flat=True)) == {"cancelled"}
    assert step_claim(worker="worker-1", queues=["cpu"]) is None


def test_a_finished_job_cannot_be_cancelled() -> None:
    job = ordered()
    job_cancel(actor=person(Role.OPS), job=job, how="kill")
    with pytest.raises(Refused, match="ended already"):
        job_cancel(actor=person(Role.OPS), job=job, how="kill")


def test_a_viewer_cannot_cancel() -> None:
    job = ordered()
    with pytest.raises(PermissionDenied):
        job_cancel(actor=person(Role.VIEWER), job=job, how="kill")


def test_an_unknown_way_to_cancel_is_refused() -> None:
    with pytest.raises(Refused):
        job_cancel(actor=person(Role.OPS), job=ordered(), how="gently")


def test_a_real_child_computes_a_whole_job(worker: Execution) -> None:
    job = ordered(step("done", name="one"), step("chatter", name="two", lines=3, inputs={"x": "@0"}))
    assert worker.run_all() == 3
    assert state_of(job) == JobState.SUCCEEDED
    assert [line.text for line in job.log_lines.all()] == ["line 0", "line 1", "line 2"]
    assert set(Attempt.objects.values_list("outcome", flat=True)) == {"done"}
    assert job.artifact.variant == job.variant


def test_stop_lets_the_running_step_end_and_keeps_it(worker: Execution) -> None:
    job = ordered(step("sleep", name="one", seconds=2), step("done", name="two", inputs={"x": "@0"}))
    thread = in_background(worker)
    until(lambda: job.steps.filter(name="one", state="running", progress_done=1).exists())
    job_cancel(actor=person(Role.ENGINEER), job=job, how="stop")
    assert state_of(job) == JobState.RUNNING
    thread.join(30)
    assert state_of(job) == JobState.CANCELLED
    assert dict(job.steps.values_list("name", "state")) == {"plan": "done", "one": "done", "two": "cancelled"}


def test_kill_ends_the_child_within_seconds_and_a_stop_can_be_raised_to_it(worker: Execution) -> None:
    job = ordered(step("sleep", name="one", seconds=600))
    thread = in_background(worker)
    until(lambda: job.steps.filter(name="one", state="running").exists())
    job_cancel(actor=person(Role.ENGINEER), job=job, how="stop")
    started = time.monotonic()
    job_cancel(actor=person(Role.ENGINEER), job=job, how="kill")
    until(lambda: state_of(job) == JobState.CANCELLED)
    assert time.monotonic() - started < 5
    thread.join(30)
    assert job.steps.get(name="one").state == "cancelled"
    assert Attempt.objects.get(step__name="one").outcome == "cancelled"


def test_a_kill_is_not_lowered_to_a_stop() -> None:
    job = ordered(step("done"))
    assert step_claim(worker="worker-1", queues=["cpu"]) is not None
    for how in ("kill", "stop"):
        job_cancel(actor=person(Role.OPS), job=job, how=how)
    job.refresh_from_db()
    assert job.cancel_requested == "kill"


def test_a_cancelled_job_whose_worker_is_gone_ends_with_its_lease() -> None:
    from dashboard.services.reconciling import reconcile
    from tests.dashboard.services.test_steps import lapse

    job = ordered(step("done"))
    claim = step_claim(worker="gone", queues=["cpu"])
    assert claim is not None
    job_cancel(actor=person(Role.OPS), job=job, how="stop")
    assert step_watch(claim=claim) == "stop"
    lapse(claim)
    reconcile()
    assert state_of(job) == JobState.CANCELLED
    with pytest.raises(LeaseLost):
        step_watch(claim=claim)


def test_a_step_that_kills_its_child_is_started_exactly_three_times(worker: Execution, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    job = ordered(step("die", name="poison"), starts=starts)
    worker.run_all()
    assert state_of(job) == JobState.DEAD
    assert "step 'poison' was killed by signal 9 (SIGKILL) 3 times" in job.error
    lines = [line.split() for line in starts.read_text().splitlines() if line.endswith("poison")]
    assert len(lines) == 3
    assert len({pid for pid, _ in lines}) == 3


def test_a_step_that_breaks_is_dead_after_three_attempts_and_says_why(worker: Execution) -> None:
    job = ordered(step("error", name="broken"))
    worker.run_all()
    assert (state_of(job), job.error_code) == (JobState.DEAD, "errored")
    assert "ZeroDivisionError" in job.error
    assert list(Attempt.objects.filter(step__name="broken").values_list("outcome", flat=True)) == ["errored"] * 3


def test_a_step_that_says_no_is_not_repeated(worker: Execution, tmp_path: Path) -> None:
    job = ordered(step("fail", name="refusing"), starts=tmp_path / "starts")
    worker.run_all()
    assert (state_of(job), job.error_code) == (JobState.FAILED, "shape_mismatch")
    assert (tmp_path / "starts").read_text().count("refusing") == 1


def test_a_retry_is_a_clone_that_reuses_what_is_known(worker: Execution, tmp_path: Path) -> None:
    job = ordered(step("done", name="one"), step("fail", name="two"), starts=tmp_path / "starts")
    worker.run_all()
    again = job_retry(actor=person(Role.ENGINEER), job=job)
    assert (again.cloned_from, again.spec, again.state) == (job, job.spec, JobState.QUEUED)
    worker.run_all()
    assert state_of(again) == JobState.FAILED
    # The plan and the first step were known: the child answered from the cache. The one that said no was tried again.
    assert dict(again.steps.values_list("name", "reused")) == {"plan": True, "one": True, "two": False}


def test_a_running_job_cannot_be_retried() -> None:
    with pytest.raises(Refused, match="not ended yet"):
        job_retry(actor=person(Role.ENGINEER), job=ordered())


def test_a_job_can_be_moved_forward() -> None:
    ordered(title="first")
    late = ordered(title="late")
    job_reprioritise(actor=person(Role.ENGINEER), job=late, priority=9)
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    assert claim.job_id == late.pk


def test_a_seed_that_no_column_holds_is_refused() -> None:
    with pytest.raises(Refused, match="seed"):
        ask(seed=2**63)
    with pytest.raises(Refused, match="priority"):
        ask(priority=40_000)


def test_a_choice_set_is_no_calibration_text() -> None:
    from dashboard.models import SampleSet

    questions = SampleSet.objects.create(name="q", kind="choice", digest=digest("q"), samples=1, size_bytes=1)
    with pytest.raises(Refused, match="not a text set"):
        ask(calibration=questions)


def test_the_variant_of_another_base_is_taken_with_that_base() -> None:
    other = checkpoint("other-base")
    variant = checkpoint("other-variant", other)
    assert ask(variant=variant).steps.get().inputs["base"] == other.digest
