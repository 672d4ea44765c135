"""Claims, leases and fences: who computes a step, who may write it, and what an ended attempt makes of its job."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from django.db import connection
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.launcher import Outcome
from dashboard.lifecycle import JobState, StepState
from dashboard.models import Artifact, Attempt, Job, LogLine, Step
from dashboard.services.logs import LOG_LINES_PER_JOB, log_append
from dashboard.services.reconciling import reconcile
from dashboard.services.steps import (
    Claim,
    LeaseLost,
    Progress,
    step_claim,
    step_finish,
    step_heartbeat,
    step_release,
    step_watch,
)
from tests.dashboard.services.jobs_at_work import artifact_result, ordered, step
from tests.dashboard.world import at_once, digest

pytestmark = pytest.mark.django_db(transaction=True)


def claimed(worker: str = "worker-1") -> Claim:
    claim = step_claim(worker=worker, queues=["cpu"])
    assert claim is not None
    return claim


def done(claim: Claim, **values: object) -> None:
    given = {"kind": "done", "output": digest(f"output of {claim.spec.key}")}
    step_finish(claim=claim, outcome=Outcome(**(given | values)))  # type: ignore[arg-type]


def planned(*steps: dict[str, object], **values: int) -> Job:
    """A job whose plan is done: its steps wait."""
    job = ordered(*steps, **values)  # type: ignore[arg-type]
    plan = claimed()
    assert plan.job_id == job.pk
    done(plan, steps=tuple(steps))
    job.refresh_from_db()
    return job


def lapse(claim: Claim) -> None:
    """The lease of ``claim`` ran out a second ago."""
    Step.objects.filter(pk=claim.step_id).update(lease_until=timezone.now() - timedelta(seconds=1))


def test_a_claim_takes_the_first_step_and_the_job_runs() -> None:
    job = ordered(step("done"))
    claim = claimed()
    job.refresh_from_db()
    assert (claim.job_id, claim.attempt, job.state) == (job.pk, 1, JobState.RUNNING)
    assert job.started_at is not None
    row = Step.objects.get(pk=claim.step_id)
    assert (row.state, row.owner, row.key) == (StepState.RUNNING, "worker-1", claim.spec.key)
    assert Attempt.objects.get(step=row).outcome == "running"


def test_a_claimed_step_is_not_claimed_again() -> None:
    ordered(step("done"))
    claimed()
    assert step_claim(worker="worker-2", queues=["cpu"]) is None


def test_a_worker_of_another_queue_finds_nothing() -> None:
    ordered(step("done"))
    assert step_claim(worker="worker-1", queues=["gpu"]) is None


def test_higher_priority_comes_first_then_the_older_job() -> None:
    ordered(title="older")
    ordered(title="newer")
    ordered(title="urgent", priority=5)
    titles = [Job.objects.get(pk=claimed().job_id).title for _ in range(3)]
    assert titles == ["urgent", "older", "newer"]


def test_a_step_waits_until_its_inputs_are_done() -> None:
    planned(step("done", name="first"), step("done", name="second", inputs={"before": "@0"}))
    first = claimed()
    assert first.name == "first"
    assert step_claim(worker="worker-2", queues=["cpu"]) is None
    done(first, output=digest("of the first"))
    second = claimed()
    assert second.name == "second"
    assert second.spec.inputs == {"before": digest("of the first")}


def test_steps_that_need_nothing_of_each_other_run_on_several_workers() -> None:
    planned(step("done", name="one"), step("done", name="two"))
    assert {claimed("a").name, claimed("b").name} == {"one", "two"}


def test_references_of_a_plan_are_stored_as_real_indices() -> None:
    job = planned(step("done", name="one"), step("done", name="two", inputs={"x": "@0", "y": digest("blob")}))
    assert list(job.steps.values_list("index", flat=True)) == [0, 1, 2]
    assert job.steps.get(name="two").inputs == {"x": "@1", "y": digest("blob")}


def test_the_last_step_publishes_and_the_job_succeeds_in_one_go() -> None:
    job = planned(step("done"))
    done(claimed(), data=artifact_result())
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert job.finished_at is not None
    assert Artifact.objects.get(job=job).digest == digest("an artifact")


def test_a_result_against_another_base_fails_the_job_and_publishes_nothing() -> None:
    job = planned(step("done"))
    done(claimed(), data=artifact_result() | {"base_fingerprint": digest("another")})
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.FAILED, "refused_result")
    assert "another base" in job.error
    assert not Artifact.objects.exists()


def test_a_ledger_that_does_not_add_up_is_not_published() -> None:
    job = planned(step("done"))
    done(claimed(), data=artifact_result() | {"artifact_bytes": 99})
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "adds up to 100 bytes" in job.error


def test_a_result_that_lacks_a_field_fails_the_job_with_a_message() -> None:
    job = planned(step("done"))
    done(claimed(), data={"artifact": digest("x")})
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.FAILED, "bad_result")


def test_a_step_that_says_no_fails_the_job_and_cancels_the_rest() -> None:
    job = planned(step("fail", name="one"), step("done", name="two"), step("done", name="three"))
    one, two = claimed("a"), claimed("b")
    step_finish(claim=one, outcome=Outcome(kind="failed", code="shape_mismatch", message="layers.3 differs"))
    job.refresh_from_db()
    assert (job.state, job.error_code, job.error) == (JobState.FAILED, "shape_mismatch", "layers.3 differs")
    assert dict(job.steps.values_list("name", "state")) == {
        "plan": "done",
        "one": "failed",
        "two": "cancelled",
        "three": "cancelled",
    }
    with pytest.raises(LeaseLost):
        step_heartbeat(claim=two, progress=Progress())
    with pytest.raises(LeaseLost):
        done(two)
    assert Attempt.objects.get(step_id=two.step_id).outcome == "cancelled"


def test_a_step_that_broke_is_tried_again_after_a_pause(settings: Settings) -> None:
    settings.RETRY_SECONDS = 60
    job = ordered(step("done"))
    claim = claimed()
    step_finish(claim=claim, outcome=Outcome(kind="errored", message="boom", detail="Traceback"))
    row = Step.objects.get(pk=claim.step_id)
    assert (row.state, row.causes) == (StepState.WAITING, {"errored": 1})
    assert row.not_before is not None
    assert row.not_before > timezone.now() + timedelta(seconds=50)
    assert step_claim(worker="worker-1", queues=["cpu"]) is None
    Step.objects.filter(pk=row.pk).update(not_before=timezone.now())
    assert claimed().attempt == 2
    job.refresh_from_db()
    assert job.state == JobState.RUNNING
    assert "Traceback" in Attempt.objects.get(step=row, number=1).detail


def test_causes_are_counted_apart_and_the_third_of_one_is_the_end() -> None:
    job = ordered(step("done"))
    for kind in ("errored", "killed", "errored", "killed"):
        step_finish(claim=claimed(), outcome=Outcome(kind=kind, message="boom", signal=9))  # type: ignore[arg-type]
        job.refresh_from_db()
        assert job.state == JobState.RUNNING
    step_finish(claim=claimed(), outcome=Outcome(kind="killed", message="out of memory", signal=9))
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.DEAD, "killed")
    assert "step 'plan' was killed by signal 9 (SIGKILL) 3 times" in job.error
    assert job.steps.get().state == StepState.DEAD
    assert step_claim(worker="worker-1", queues=["cpu"]) is None


def test_no_room_blocks_the_job_without_counting_and_it_goes_on_when_there_is_room(
    settings: Settings,
) -> None:
    job = ordered(step("done"))
    claim = claimed()
    step_finish(claim=claim, outcome=Outcome(kind="blocked", code="disk", message="no space left"))
    job.refresh_from_db()
    assert (job.state, job.blocked_reason) == (JobState.BLOCKED, "disk")
    assert Step.objects.get(pk=claim.step_id).causes == {}
    assert step_claim(worker="worker-1", queues=["cpu"]) is None
    settings.RESUME_FREE_BYTES = 1 << 60
    reconcile()
    job.refresh_from_db()
    assert job.state == JobState.BLOCKED
    settings.RESUME_FREE_BYTES = 1
    reconcile()
    job.refresh_from_db()
    assert (job.state, job.blocked_reason) == (JobState.QUEUED, "")
    assert claimed().attempt == 2


def test_an_old_claim_changes_nothing() -> None:
    ordered(step("done"))
    old = claimed("old")
    lapse(old)
    new = claimed("new")
    assert (old.step_id, new.attempt) == (new.step_id, 2)
    before = Step.objects.filter(pk=new.step_id).values().get()
    with pytest.raises(LeaseLost):
        step_heartbeat(claim=old, progress=Progress(done=9, total=9))
    with pytest.raises(LeaseLost):
        step_watch(claim=old)
    with pytest.raises(LeaseLost):
        step_release(claim=old, detail="stopped")
    for kind in ("done", "failed", "errored", "killed", "blocked", "cancelled"):
        with pytest.raises(LeaseLost):
            step_finish(claim=old, outcome=Outcome(kind=kind, output=digest("stale")))
    assert Step.objects.filter(pk=new.step_id).values().get() == before
    assert step_watch(claim=new) == ""


def test_a_worker_that_claims_again_does_not_write_under_its_old_number() -> None:
    ordered(step("done"))
    old = claimed("one and the same")
    lapse(old)
    new = claimed("one and the same")
    with pytest.raises(LeaseLost):
        done(old)
    assert (step_watch(claim=new), Step.objects.get(pk=new.step_id).attempt) == ("", 2)


def test_a_worker_whose_clock_is_wrong_neither_gains_nor_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    for hours in (-1, 1):
        wrong = timezone.now() + timedelta(hours=hours)
        ordered(step("done"))
        with monkeypatch.context() as patched:
            patched.setattr(timezone, "now", lambda wrong=wrong: wrong)
            claim = claimed(f"worker {hours}")
            seconds_left = [lease_left(claim)]
            step_heartbeat(claim=claim, progress=Progress())
            seconds_left.append(lease_left(claim))
        assert all(50 < left <= 60 for left in seconds_left)


def lease_left(claim: Claim) -> float:
    """Seconds until the lease of ``claim`` runs out, by the database's clock."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM dashboard_step WHERE id = %s",
            [claim.step_id],
        )
        return float(cursor.fetchone()[0])


def test_a_lapsed_lease_that_nobody_took_can_still_be_renewed() -> None:
    ordered(step("done"))
    claim = claimed()
    lapse(claim)
    assert step_heartbeat(claim=claim, progress=Progress(done=3, total=30, unit="tensors")) == ""
    assert step_claim(worker="worker-2", queues=["cpu"]) is None
    row = Step.objects.get(pk=claim.step_id)
    assert (row.progress_done, row.progress_total, row.progress_unit) == (3, 30, "tensors")


def test_a_lost_worker_is_replaced_and_finished_steps_are_not_redone() -> None:
    job = planned(step("done", name="one"), step("done", name="two", inputs={"x": "@0"}))
    done(claimed("gone"))
    lost = claimed("gone")
    lapse(lost)
    taken = claimed("other")
    assert (taken.name, taken.attempt) == ("two", 2)
    done(taken, data=artifact_result())
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert list(job.steps.order_by("index").values_list("attempt", flat=True)) == [1, 1, 2]
    assert list(Attempt.objects.filter(step_id=taken.step_id).values_list("outcome", flat=True)) == ["lost", "done"]


def test_a_step_whose_workers_are_lost_three_times_is_dead() -> None:
    job = ordered(step("done"))
    for _ in range(3):
        lapse(claimed())
        reconcile()
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.DEAD, "lost")
    assert "lost with its worker 3 times" in job.error
    assert LogLine.objects.filter(job=job, level="warning").exists()


def test_the_lease_is_kept_by_the_clock_of_the_database(settings: Settings) -> None:
    settings.LEASE_SECONDS = 60
    ordered(step("done"))
    claim = claimed()
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT extract(epoch FROM lease_until - clock_timestamp()) FROM dashboard_step WHERE id = %s",
            [claim.step_id],
        )
        assert 50 < float(cursor.fetchone()[0]) <= 60


def test_finishing_again_after_a_lost_answer_is_harmless() -> None:
    job = planned(step("done"))
    claim = claimed()
    for _ in range(2):
        done(claim, data=artifact_result())
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED
    assert Artifact.objects.filter(job=job).count() == 1


def test_a_released_step_is_taken_again_without_counting() -> None:
    ordered(step("done"))
    claim = claimed()
    step_release(claim=claim, detail="the worker was stopped")
    row = Step.objects.get(pk=claim.step_id)
    assert (row.state, row.causes, row.attempt) == (StepState.WAITING, {}, 1)
    assert claimed().attempt == 2


def test_a_done_step_with_the_same_key_is_offered_for_reuse() -> None:
    planned(step("done", name="one"))
    first = claimed()
    assert first.cached == ""
    done(first, data=artifact_result(), output=digest("known"))
    planned(step("done", name="one"))
    second = claimed()
    assert (second.spec.key == first.spec.key, second.cached) == (True, digest("known"))


def test_what_postgres_cannot_store_is_left_out_of_the_data() -> None:
    job = planned(step("done"))
    strange = {"text": "a\0b", "list": [float("nan"), 1.5], "figures": {"inf": float("inf")}}
    done(claimed(), data=artifact_result() | strange, measured={"seconds": 1.0})
    data = job.steps.get(index=1).data
    assert (data["text"], data["list"], data["figures"]) == ("ab", [None, 1.5], {"inf": None})
    assert data["measured"] == {"seconds": 1.0}


def test_a_log_is_kept_up_to_a_limit_that_it_names() -> None:
    job = ordered()
    lines = [(timezone.now(), "info", f"line {number}\0") for number in range(LOG_LINES_PER_JOB + 5)]
    log_append(job_id=job.pk, step_id=None, lines=lines[:10])
    log_append(job_id=job.pk, step_id=None, lines=lines[10:])
    log_append(job_id=job.pk, step_id=None, lines=lines[:3])
    assert LogLine.objects.filter(job=job).count() == LOG_LINES_PER_JOB
    assert LogLine.objects.filter(job=job).first().text == "line 0"  # type: ignore[union-attr]
    assert "full" in LogLine.objects.filter(job=job).last().text  # type: ignore[union-attr]


def test_two_workers_never_claim_one_step() -> None:
    for _ in range(6):
        ordered()
    results = at_once(*[lambda name=name: claimed_all(name) for name in "abcd"])
    claims = [claim for result in results for claim in result]  # type: ignore[attr-defined]
    assert len(claims) == 6
    assert len({claim.step_id for claim in claims}) == 6
    assert set(Step.objects.values_list("attempt", flat=True)) == {1}


def claimed_all(name: str) -> list[Claim]:
    claims = []
    while claim := step_claim(worker=name, queues=["cpu"]):
        claims.append(claim)
    return claims


def test_many_workers_share_one_job_without_a_lost_or_doubled_step(tmp_path: Path) -> None:
    job = planned(*[step("done", name=f"layer {at}") for at in range(12)])

    def work(name: str) -> int:
        count = 0
        while claim := step_claim(worker=name, queues=["cpu"]):
            done(claim, data=artifact_result())
            count += 1
        return count

    counts = at_once(*[lambda name=name: work(name) for name in "abcd"])
    job.refresh_from_db()
    assert sum(counts) == 12  # type: ignore[arg-type]
    assert job.state == JobState.SUCCEEDED
    assert Artifact.objects.filter(job=job).count() == 1
    assert set(job.steps.values_list("attempt", "state")) == {(1, "done")}


def test_a_hundred_wakes_for_one_job_claim_each_step_once() -> None:
    job = ordered()
    claims = [claim for _ in range(100) if (claim := step_claim(worker="worker-1", queues=["cpu"]))]
    assert len(claims) == 1
    assert job.steps.get().attempt == 1
