"""After the database was set back to an older state: one place to put right what no longer fits together.

Rows are older than what the store, workers and servers have seen. What a claim, a page or a server still holds from
the time that is gone must not be taken for something of the present: numbers that may have been given out are skipped,
fences are raised, and each environment gets an epoch that no server has seen.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from django.apps import apps
from django.db import connection
from django.db.models import F

from compression_worker.store import Store
from dashboard import transitions
from dashboard.lifecycle import StepState
from dashboard.models import Environment, Job, Recovery, Step
from dashboard.selectors.recovery import Place, database_mark, places, restored, steps_held
from dashboard.services.adoption import adopt, lost_in
from dashboard.services.attempts import other_states, step_apply, step_facts
from dashboard.services.endings import job_apply, job_facts
from dashboard.services.units import recorded, unit_of_work

LOCK = 7_301_003
"""The number of the advisory lock that only one recovery holds at a time."""
NUMBERS_SKIPPED = range(100_000, 10_000_000)
"""Ids of rows that are gone may stand on open pages and in running workers: new rows get none of them. By chance, so
that a second restore of one dump does not give out what the first did."""
FENCES_SKIPPED = range(1_000, 10_000)
"""Attempts that may have been claimed in the time that is gone; by chance, for the same reason."""
DETAIL = "the database was set back to an older state: the step goes back into the queue"


@dataclass(frozen=True)
class Findings:
    """What says that the database was set back, and what is asked for beyond that."""

    is_restored: bool
    places: list[Place]
    epoch: int

    @property
    def is_set_back(self) -> bool:
        return self.is_restored or any(place.ahead for place in self.places)

    def raised(self, place: Place) -> int:
        """The epoch that ``place`` is to have."""
        return max(place.next_epoch if self.is_set_back else place.environment.epoch, self.epoch)

    @property
    def is_due(self) -> bool:
        return self.is_set_back or any(self.raised(place) > place.environment.epoch for place in self.places)

    def lines(self) -> list[str]:
        """What was found, in the order in which a person asks."""
        return [self._verdict(), *(line for place in self.places for line in self._place_lines(place))]

    def _verdict(self) -> str:
        if self.is_restored:
            return "The database was restored, or a replica took over, since the last look at it."
        if self.is_set_back:
            return "The database was set back: a server saw a later deployment than it knows."
        return "Nothing says that the database was set back."

    def _place_lines(self, place: Place) -> list[str]:
        before, after = place.environment.epoch, self.raised(place)
        if after == before:
            return place.lines()
        follow = f"  epoch {before} becomes {after}: servers then answer from generation {place.environment.generation}"
        return [*place.lines(), follow]


def recover(*, store: Store, epoch: int = 0, act: bool) -> list[str]:
    """Put right what a restore left apart; returns the report. Without ``act`` it only says what it would do.

    Again and again it changes nothing more: what it does to numbers and epochs is tied to a restore that no recovery
    has seen yet, to what servers report, or to an ``epoch`` that is not reached. What lies whole in ``store`` and has
    no row is adopted whenever it is found.
    """
    lines = database_settle(epoch=epoch) if act else _findings(epoch).lines() + _steps_lines(_findings(epoch))
    lines += [adopt(found) if act else found.line() for found in lost_in(store)]
    return lines


def _findings(epoch: int) -> Findings:
    return Findings(restored(), places(), epoch)


@unit_of_work
def database_settle(*, epoch: int = 0) -> list[str]:
    """Numbers, fences, leases and epochs, all of them or none; the report."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
    list(Environment.objects.select_for_update(no_key=True).order_by("pk"))
    found = _findings(epoch)
    lines = found.lines() + _steps_lines(found)
    if found.is_due:
        with recorded(actor=None, reason="recovered after the database was set back"):
            _numbers_skip()
            _steps_return()
            for place in found.places:
                Environment.objects.filter(pk=place.environment.pk).update(epoch=found.raised(place))
    if found.is_due or not Recovery.objects.exists():
        Recovery.objects.create(mark=database_mark(), report=lines)
    return lines


def _steps_lines(found: Findings) -> list[str]:
    if not found.is_due:
        return []
    return [
        f"step '{step.name}' of job {step.job_id}: "
        + (
            f"its lease ran out at {step.lease_until:%Y-%m-%d %H:%M:%S}, it goes back into the queue"
            if lapsed
            else f"held by {step.owner} until {step.lease_until:%Y-%m-%d %H:%M:%S}, left to it"
        )
        for step, lapsed in steps_held()
    ]


def _steps_return() -> None:
    """Steps that nobody holds go back into the queue, uncounted: they are not at fault. Their next fence is new."""
    lapsed = {step.pk for step, is_lapsed in steps_held() if is_lapsed}
    held = set(Step.objects.filter(pk__in=lapsed).values_list("job_id", flat=True))
    for job in Job.objects.select_for_update(no_key=True).filter(pk__in=held).order_by("pk"):
        for step in job.steps.select_for_update(no_key=True).filter(pk__in=lapsed).order_by("index"):
            if job.is_terminal:  # the step before was the last that a cancel waited for
                break
            change = transitions.release(job_facts(job), step_facts(step), other_states(step), fence=step.attempt)
            step_apply(step, change, DETAIL, {})
            job_apply(job, change.job, change.effects)
    Step.objects.filter(state=StepState.WAITING).update(attempt=F("attempt") + secrets.choice(FENCES_SKIPPED))


def _numbers_skip() -> None:
    skipped = secrets.choice(NUMBERS_SKIPPED)
    with connection.cursor() as cursor:
        for model in apps.get_app_config("dashboard").get_models():
            table, column = model._meta.db_table, model._meta.pk.column if model._meta.pk else ""
            cursor.execute("SELECT pg_get_serial_sequence(%s, %s)", [table, column])
            sequence: str | None = cursor.fetchone()[0]
            if sequence:
                cursor.execute(f"SELECT setval(%s, last_value + %s) FROM {sequence}", [sequence, skipped])
