"""A finished step whose output the disk has changed is done again, before anything is computed from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_worker.contracts import StepOutput, StepSpec
from compression_worker.launcher import Outcome
from compression_worker.runner import DamagedInputs, Runner
from compression_worker.store import Store
from dashboard.lifecycle import JobState, StepState
from dashboard.models import Attempt, Job, Step
from dashboard.services.steps import Claim, step_claim, step_finish
from tests.dashboard.services.jobs_at_work import artifact_result, ordered, step
from tests.dashboard.world import digest

pytestmark = pytest.mark.django_db(transaction=True)
DAMAGED = Outcome(kind="damaged", inputs=("x",), message="no longer whole: x")


def claimed() -> Claim:
    claim = step_claim(worker="worker-1", queues=["cpu"])
    assert claim is not None
    return claim


def done(claim: Claim) -> None:
    output = digest(f"output of {claim.spec.key}")
    step_finish(claim=claim, outcome=Outcome(kind="done", output=output, data=artifact_result()))


def two_steps() -> Job:
    """A job whose plan and first step are done, the second needs the first."""
    steps = (step("done", name="one"), step("done", name="two", inputs={"x": "@0"}))
    job = ordered(*steps)
    step_finish(claim=claimed(), outcome=Outcome(kind="done", output=digest("plan"), steps=steps))
    done(claimed())
    return job


def test_the_damaged_output_is_made_again_and_the_job_succeeds() -> None:
    job = two_steps()
    second = claimed()
    assert second.name == "two"
    step_finish(claim=second, outcome=DAMAGED)
    one, two = job.steps.get(index=1), job.steps.get(index=2)
    assert (one.state, one.output, one.causes) == (StepState.WAITING, "", {"damaged": 1})
    assert (two.state, two.causes) == (StepState.WAITING, {})
    assert Attempt.objects.get(step=one).outcome == "lost"
    again = claimed()
    assert (again.name, again.attempt, again.cached) == ("one", 2, "")
    done(again)
    done(claimed())
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED


def test_two_who_find_the_same_damage_have_it_made_again_once() -> None:
    steps = (
        step("done", name="one"),
        step("done", name="two", inputs={"x": "@0"}),
        step("done", name="three", inputs={"x": "@0"}),
    )
    job = ordered(*steps)
    step_finish(claim=claimed(), outcome=Outcome(kind="done", output=digest("plan"), steps=steps))
    done(claimed())
    second, third = claimed(), claimed()
    for claim in (second, third):
        step_finish(claim=claim, outcome=DAMAGED)
    assert job.steps.get(index=1).causes == {"damaged": 1}
    for _ in range(3):
        done(claimed())
    job.refresh_from_db()
    assert job.state == JobState.SUCCEEDED


def test_a_disk_that_damages_it_three_times_ends_the_job() -> None:
    job = two_steps()
    for _ in range(2):
        step_finish(claim=claimed(), outcome=DAMAGED)
        done(claimed())
    step_finish(claim=claimed(), outcome=DAMAGED)
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.DEAD, "damaged")
    assert "lost its output to damage on the disk 3 times" in job.error


def test_what_no_step_of_the_job_made_cannot_be_made_again() -> None:
    job = two_steps()
    Step.objects.filter(job=job, index=2).update(inputs={"x": digest("a checkpoint")})
    step_finish(claim=claimed(), outcome=DAMAGED)
    job.refresh_from_db()
    assert (job.state, job.error_code) == (JobState.FAILED, "damaged_blob")
    assert "restore it from a backup" in job.error


def test_nothing_is_computed_from_what_does_not_verify(tmp_path: Path) -> None:
    store = Store(tmp_path)
    blob = store.write_bytes(b"codes")
    output = store.write_bytes(StepOutput(blobs={"codes": blob}).to_bytes())
    spec = StepSpec(kind="bitdelta.assemble", inputs={"layer": output})
    place = store.path(blob)
    place.chmod(0o644)
    place.write_bytes(b"c0des")
    with pytest.raises(DamagedInputs, match="layer") as caught:
        Runner(store=store).compute(spec, lambda message: None)
    assert caught.value.names == ["layer"]
    answer = Runner(store=store).answer(spec, "", lambda message: None)
    assert (answer["type"], answer["inputs"]) == ("damaged", ["layer"])
