"""Tending the store from a worker: look through it, free what was asked for, hash it all again and again.

A turn is short and never in the way: it runs in a thread of its own beside the process that watches a child, one turn
at a time among all workers, and whatever goes wrong in it (the store or the database is away) waits for the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.db.models import DateTimeField, ExpressionWrapper, Func, Q, Value
from django.db.models.expressions import Combinable
from django.utils import timezone

from compression_worker.store import NoRoom, Store, open_store
from dashboard.lifecycle import SweepState
from dashboard.models import Scrub, Sweep
from dashboard.services.storage_scrub import scrub_state, scrub_turn
from dashboard.services.storage_sweep import sweep_survey, sweep_under_way, sweep_work
from dashboard.services.units import unit_of_work

log = logging.getLogger(__name__)

TURN_SECONDS = 20.0
PAUSE_SECONDS = 30.0
TURN_LEASE = timedelta(minutes=10)
"""A worker that dies in its turn keeps the others waiting no longer than this."""
TROUBLE = (OSError, NoRoom, DatabaseError, InterfaceError)


@dataclass
class _Tending:
    """Of this process: when it last looked, and the thread of its turn."""

    looked: float = float("-inf")
    thread: threading.Thread | None = None
    guard: threading.Lock = field(default_factory=threading.Lock)


_TENDING = _Tending()


def storage_tend() -> bool:
    """Start a turn beside the caller, when none is under way here and the last look was long enough ago."""
    wanted = float(settings.STORAGE_TEND_SECONDS)
    if not wanted or not _TENDING.guard.acquire(blocking=False):
        return False
    try:
        busy = _TENDING.thread is not None and _TENDING.thread.is_alive()
        if busy or time.monotonic() - _TENDING.looked < wanted:
            return False
        _TENDING.looked = time.monotonic()
        _TENDING.thread = threading.Thread(target=_turn_alone, name="storage", daemon=True)
        _TENDING.thread.start()
        return True
    finally:
        _TENDING.guard.release()


def _turn_alone() -> None:
    """A turn with a connection of its own, closed again."""
    try:
        storage_turn()
    except Exception:  # a thread has nobody above it: the next turn tries again
        log.exception("the store could not be tended")
    finally:
        connection.close()


def storage_turn(*, now: datetime | None = None) -> bool:
    """One turn, if it is this worker's: False when another one has it or the last one was just now."""
    try:
        if not _turn_take():
            return False
        trouble = ""
        try:
            store = open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE)
            is_idle = _work(store, now or timezone.now())
        except TROUBLE as error:
            log.warning("the store was not tended to the end: %s", error)
            trouble, is_idle = str(error), True
        _turn_end(timedelta(seconds=PAUSE_SECONDS) if is_idle else timedelta(), trouble)
    except (DatabaseError, InterfaceError) as error:
        log.warning("the database is away: %s", error)
        connection.close()
        return False
    return True


def _work(store: Store, now: datetime) -> bool:
    """What is most wanted first; True when nobody waits for more."""
    if _survey_due(now):
        sweep_survey(store=store)
    is_idle = sweep_work(store=store, seconds=TURN_SECONDS)
    scrub_turn(store=store, now=now, seconds=TURN_SECONDS)
    return is_idle


def _survey_due(now: datetime) -> bool:
    if Sweep.objects.filter(state=SweepState.LOOKING).exists():
        return True
    if sweep_under_way() is not None:
        return False
    last = Sweep.objects.filter(looked_at__isnull=False).first()
    every = timedelta(minutes=settings.SURVEY_MINUTES)
    # After a clean-up what can be freed is another matter, too.
    return last is None or last.state == SweepState.DONE or now - (last.looked_at or now) >= every


@unit_of_work
def _turn_take() -> bool:
    """By the database's clock, so that no two workers have a turn at the same time."""
    scrub_state()
    free = Scrub.objects.filter(Q(turn_until=None) | Q(turn_until__lt=Func(function="clock_timestamp")), pk=1)
    return bool(free.update(turn_until=_from_now(TURN_LEASE)))


@unit_of_work
def _turn_end(pause: timedelta, trouble: str) -> None:
    at = timezone.now() if trouble else None
    Scrub.objects.filter(pk=1).update(turn_until=_from_now(pause), trouble=trouble[:2000], trouble_at=at)


def _from_now(span: timedelta) -> Combinable:
    now = Func(function="clock_timestamp", output_field=DateTimeField())
    return ExpressionWrapper(now + Value(span), output_field=DateTimeField())
