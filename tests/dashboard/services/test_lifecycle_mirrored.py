"""The same game on Postgres: after every event the rows that the services wrote are what the model says.

Time moves by shifting the leases and pauses in the rows, never by waiting. ``DELTAWORKS_MODEL_STEPS`` plays longer:
a fiftieth of what it asks of the model alone, since each step here is a few transactions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from typing import ClassVar, TypeVar

import pytest
from django.conf import settings as present
from django.db import connection
from django.utils import timezone
from pytest_django.fixtures import Settings

from compression_worker.contracts import PlannedStep
from compression_worker.launcher import Outcome
from dashboard import transitions
from dashboard.lifecycle import AttemptOutcome, JobKind, Refused, Role
from dashboard.models import Job, Step
from dashboard.services import attempts
from dashboard.services.attempts import step_facts
from dashboard.services.endings import job_facts
from dashboard.services.jobs import job_cancel
from dashboard.services.ordering import job_order
from dashboard.services.reconciling import reconcile
from dashboard.services.steps import (
    Claim,
    LeaseLost,
    Progress,
    step_claim,
    step_finish,
    step_heartbeat,
    step_release,
)
from dashboard.transitions import Ending
from tests.dashboard.lifecycle_machine import LifecycleMachine, play, steps_asked
from tests.dashboard.lifecycle_model import LEASE, PAUSE, UNIT, ModelJob, ModelStep, Plan, Token, World
from tests.dashboard.services.jobs_at_work import artifact_result
from tests.dashboard.world import digest, pair, person

pytestmark = pytest.mark.django_db(transaction=True)

STEPS = 1_000
SHARE = 50
COARSE_SECONDS = 480.0
"""What times are compared in: no lease and no pause of the game comes within 40 s of half a part."""


T = TypeVar("T")


class Difference(AssertionError):
    """The services did something else than the model."""


class MirroredWorld(World):
    """The model, with the services doing the same beside it."""

    def __init__(self) -> None:
        super().__init__()
        with connection.cursor() as cursor:
            cursor.execute("TRUNCATE dashboard_job, dashboard_step, dashboard_attempt CASCADE")
        self.rows: list[int] = []
        self.claims: dict[Token, Claim] = {}
        self.engineer, self.variant, self.good = person(Role.ENGINEER), pair()[1], artifact_result()

    def submit(self, plan: Plan) -> int:
        number = super().submit(plan)
        job = job_order(
            actor=self.engineer,
            kind=JobKind.COMPRESS,
            title=f"job {number}",
            spec={"config": {}},
            first=PlannedStep(name="plan", kind="model.plan", seed=number),
            variant=self.variant,
            method="bitdelta",
            priority=plan.priority,
        )
        self.rows.append(job.pk)
        self._compare("submit")
        return number

    def advance(self, units: int) -> None:
        super().advance(units)
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE dashboard_step SET lease_until = lease_until - %(by)s, not_before = not_before - %(by)s",
                {"by": UNIT * units},
            )

    def claim(self) -> Token | None:
        token = super().claim()
        claim = step_claim(worker="worker", queues=["cpu"])
        seen = claim and Token(
            self.rows.index(claim.job_id),
            Step.objects.values_list("index", flat=True).get(pk=claim.step_id),
            claim.attempt,
        )
        if seen != token:
            raise Difference(f"the services claimed {seen}, the model {token}")
        if token is not None and claim is not None:
            self.claims[token] = claim
        self._compare("claim")
        return token

    def heartbeat(self, token: Token) -> bool:
        return self._both("heartbeat", super().heartbeat(token), self._row_heartbeat(token))

    def _row_heartbeat(self, token: Token) -> bool:
        try:
            step_heartbeat(claim=self.claims[token], progress=Progress(done=1, total=2, unit="x"))
        except LeaseLost:
            return False
        return True

    def finish(self, token: Token, ending: Ending) -> str:
        before = self._row(token).snapshot()
        expected = super().finish(token, ending)
        seen = "written"
        try:
            step_finish(claim=self.claims[token], outcome=self._outcome(token, ending))
        except LeaseLost:
            seen = "refused"
        if seen == "written" and self._row(token).snapshot() == before:
            seen = "repeated"
        return self._both(f"finish {ending.outcome}", expected, seen)

    def _outcome(self, token: Token, ending: Ending) -> Outcome:
        job = self.jobs[token.job]
        done = ending.outcome == AttemptOutcome.DONE
        planned = job.plan.needs if done and token.step == 0 else ()
        return Outcome(
            kind=ending.outcome.value,
            code=ending.code,
            output=digest(f"{token}") if done else "",
            data=(self.good if job.plan.good else {"artifact": digest("x")}) if done else {},
            steps=tuple(
                PlannedStep(
                    name=f"step {at}",
                    kind="model.step",
                    seed=token.job,
                    inputs={f"input {need}": f"@{need}" for need in needs},
                ).to_json()
                for at, needs in enumerate(planned)
            ),
            message="as the game says",
        )

    def release(self, token: Token) -> bool:
        expected, seen = super().release(token), True
        try:
            step_release(claim=self.claims[token], detail="asked to end")
        except LeaseLost:
            seen = False
        return self._both("release", expected, seen)

    def cancel(self, number: int, how: str) -> bool:
        expected, seen = super().cancel(number, how), True
        try:
            job_cancel(actor=self.engineer, job=Job.objects.get(pk=self.rows[number]), how=how)
        except Refused:
            seen = False
        return self._both("cancel", expected, seen)

    def reconcile(self, *, has_room: bool) -> None:
        super().reconcile(has_room=has_room)
        present.RESUME_FREE_BYTES = 1 if has_room else 1 << 60
        assert reconcile()
        self._compare("reconcile")

    def _both(self, event: str, expected: T, seen: T) -> T:
        if expected != seen:
            raise Difference(f"{event}: the services answered {seen!r}, the model {expected!r}")
        self._compare(event)
        return expected

    def _row(self, token: Token) -> ModelJob:
        return self._read([token.job])[token.job]

    def _compare(self, event: str) -> None:
        for number, seen in self._read(range(len(self.jobs))).items():
            job = self.jobs[number]
            if _shape(seen, timezone.now()) != _shape(job, self.now):
                raise Difference(
                    f"after {event}, job {number}:\nrows  {seen.snapshot()}\nmodel {job.snapshot()} at {self.now}"
                )

    def _read(self, numbers: Iterable[int]) -> dict[int, ModelJob]:
        """The rows of these jobs, in the model's shape."""
        keys = {self.rows[number]: number for number in numbers}
        jobs = Job.objects.filter(pk__in=keys)
        found = {job.pk: ModelJob(self.jobs[keys[job.pk]].plan, facts=job_facts(job), steps=[]) for job in jobs}
        for step in Step.objects.filter(job_id__in=keys).order_by("job_id", "index").prefetch_related("attempts"):
            attempts = {one.number: AttemptOutcome(one.outcome) for one in step.attempts.all()}
            found[step.job_id].steps.append(ModelStep(facts=step_facts(step), attempts=attempts))
        return {keys[key]: job for key, job in found.items()}


def _shape(job: ModelJob, now: datetime) -> tuple[object, ...]:
    """What of a job must be equal. Times in coarse parts from now, since a row's second is not the model's."""

    def parts(moment: datetime | None) -> int | None:
        return None if moment is None else round((moment - now).total_seconds() / COARSE_SECONDS)

    return job.facts, *(
        (
            step.facts.state,
            step.facts.attempt,
            dict(step.facts.causes),
            parts(step.facts.lease_until),
            parts(step.facts.not_before),
            sorted(step.attempts.items()),
        )
        for step in job.steps
    )


class MirroredMachine(LifecycleMachine):
    make_world: ClassVar[type[World]] = MirroredWorld


@pytest.fixture
def _long_times(settings: Settings) -> None:
    settings.LEASE_SECONDS, settings.RETRY_SECONDS = int(LEASE.total_seconds()), int(PAUSE.total_seconds())
    settings.RESUME_FREE_BYTES = 1


@pytest.mark.usefixtures("_long_times")
def test_the_rows_are_what_the_model_says() -> None:
    asked, started = max(STEPS, steps_asked(0) // SHARE), time.monotonic()
    ran = play(MirroredMachine, steps=asked, length=50, first_seed=41, shrink=False)
    print(f"{ran} steps in {time.monotonic() - started:.0f} s: {dict(MirroredMachine.played)}")
    assert ran >= asked


@pytest.mark.usefixtures("_long_times")
def test_a_bug_in_the_services_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model decides rightly, and the services do not do what it says."""
    monkeypatch.setattr(attempts, "transitions", _Forgetful())
    with pytest.raises(Difference):
        play(MirroredMachine, steps=2_000, length=50, first_seed=41, shrink=False)


class _Forgetful:
    """``transitions`` as a service might misuse it: a worker that was lost is not counted."""

    STALLED = transitions.STALLED

    @staticmethod
    def lapse(job: transitions.JobFacts, step: transitions.StepFacts, others: set[object], **when: object) -> object:
        return transitions.release(job, step, others, fence=step.attempt)  # type: ignore[arg-type]
