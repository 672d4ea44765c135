"""Units of work: repeated as a whole when the database asks for that, and recorded with who and why."""

from __future__ import annotations

import threading

import pytest
from django.db import OperationalError, connection

from dashboard.lifecycle import Role
from dashboard.models import User
from dashboard.services.units import persist, unit_of_work
from tests.dashboard.world import at_once, person

pytestmark = pytest.mark.django_db(transaction=True)


def test_two_who_lock_in_opposite_order_both_get_through() -> None:
    first, second = person(Role.VIEWER), person(Role.OPS)
    met = threading.Barrier(2)
    tries: list[str] = []

    def swap(name: str, order: tuple[User, User]) -> str:
        @unit_of_work
        def both() -> str:
            tries.append(name)
            for at, user in enumerate(order):
                User.objects.filter(pk=user.pk).update(first_name=name)
                if at == 0 and tries.count(name) == 1:
                    met.wait(30)
            return name

        return both()

    results = at_once(lambda: swap("a", (first, second)), lambda: swap("b", (second, first)))
    assert results == ["a", "b"]
    assert len(tries) == 3
    assert set(User.objects.values_list("first_name", flat=True)) in ({"a"}, {"b"})


def test_a_cut_connection_is_opened_again() -> None:
    person(Role.VIEWER)
    tries = []

    @unit_of_work
    def count() -> int:
        tries.append(1)
        if len(tries) == 1:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return User.objects.count()

    assert count() == 1
    assert len(tries) == 2


def test_patience_has_an_end() -> None:
    tries = []

    def away() -> None:
        tries.append(1)
        raise OperationalError("the database system is shutting down")

    with pytest.raises(OperationalError):
        persist(away, tries=3)
    assert len(tries) == 3


def test_an_error_of_our_own_is_not_repeated() -> None:
    tries = []

    @unit_of_work
    def broken() -> None:
        tries.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        broken()
    assert len(tries) == 1
