"""A unit of work: one transaction, tried again when the database asked for that, recorded with who and why."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import pghistory
from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError, connection, transaction
from django.utils.translation import gettext as _

from compression_worker import faults
from compression_worker.faults import failpoint
from dashboard.lifecycle import Refused
from dashboard.models import User
from dashboard.permissions import allows

P = ParamSpec("P")
T = TypeVar("T")

TRIES = 5
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 5.0


def unit_of_work(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` in a transaction, and the whole of it again after a deadlock or a lost connection.

    Inside somebody else's transaction it only joins: what is aborted there can only be repeated as a whole.
    """

    @wraps(function)
    def in_transaction(*args: P.args, **kwargs: P.kwargs) -> T:
        with transaction.atomic():
            return function(*args, **kwargs)

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        if connection.in_atomic_block:
            return in_transaction(*args, **kwargs)
        return persist(lambda: in_transaction(*args, **kwargs))

    return guarded


def persist(function: Callable[[], T], *, tries: int = TRIES, patience: float = 30.0) -> T:
    """Call ``function`` until the database answers: at most ``tries`` times and for ``patience`` seconds."""
    give_up = time.monotonic() + patience
    for attempt in range(1, tries + 1):
        try:
            return function()
        except (OperationalError, InterfaceError):
            if attempt == tries or time.monotonic() > give_up:
                raise
            forget_broken_connection()
            # Jitter, so that two who met in a deadlock do not meet again.
            time.sleep(min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable: the last try returns or raises")


def forget_broken_connection() -> None:
    """Close a connection that no longer works, so that the next query opens a new one."""
    if not connection.in_atomic_block and not connection.is_usable():
        connection.close()


@contextmanager
def recorded(*, actor: User | None, reason: str) -> Iterator[None]:
    """Everything written inside appears in History with who and why."""
    who = {} if actor is None else {"user": actor.pk}
    with pghistory.context(reason=reason, **who):
        yield
        failpoint("audit.insert")


def cut_connection() -> None:
    """Lose the connection to the database as a broken cable would: the fault ``drop_db``."""
    if connection.connection is not None:
        faults.cut_socket(connection.connection.fileno())


def authorise(actor: User, action: str) -> User:
    """``actor`` as the database knows them now, locked until the transaction ends; refuses who may not do ``action``.

    The role is read again here and not taken from the request: it may have been taken away since the page was shown.
    """
    present = User.objects.select_for_update(no_key=True).filter(pk=actor.pk, is_active=True).first()
    if present is None or not allows(present.role, action):
        raise PermissionDenied(_("Your role does not include this action."))
    return present


def required(text: str, message: str) -> str:
    """``text`` without its surrounding spaces; refused with ``message`` when nothing is left."""
    stripped = text.strip()
    if not stripped:
        raise Refused(message)
    return stripped
