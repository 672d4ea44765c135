"""People: preferences of their own, roles that only an administrator gives."""

from __future__ import annotations

import pytest
from django.core.exceptions import PermissionDenied

from dashboard.lifecycle import Refused, Role
from dashboard.services.accounts import preferences_update, user_change_role, user_create
from tests.dashboard.world import person

pytestmark = pytest.mark.django_db


def test_everybody_chooses_language_and_theme() -> None:
    changed = preferences_update(actor=person(Role.VIEWER), language="ja", theme="dark")
    assert (changed.language, changed.theme) == ("ja", "dark")


def test_an_unknown_language_or_theme_is_refused() -> None:
    with pytest.raises(Refused, match="no language"):
        preferences_update(actor=person(Role.VIEWER), language="tlh", theme="dark")
    with pytest.raises(Refused, match="no theme"):
        preferences_update(actor=person(Role.VIEWER), language="", theme="pink")


def test_an_administrator_adds_a_person() -> None:
    added = user_create(actor=person(Role.ADMIN), username="kim", password="correct horse battery", role=Role.ENGINEER)
    assert added.check_password("correct horse battery")
    assert added.role == Role.ENGINEER


@pytest.mark.parametrize(
    ("username", "password", "role"),
    [("kim", "short", "viewer"), ("", "correct horse battery", "viewer"), ("kim", "correct horse battery", "root")],
)
def test_a_person_that_cannot_be_is_refused(username: str, password: str, role: str) -> None:
    with pytest.raises(Refused):
        user_create(actor=None, username=username, password=password, role=role)


def test_a_name_is_given_once() -> None:
    person(Role.VIEWER, "kim")
    with pytest.raises(Refused):
        user_create(actor=None, username="kim", password="correct horse battery", role="viewer")


def test_roles_are_given_by_administrators_to_others() -> None:
    kim = person(Role.VIEWER, "kim")
    admin = person(Role.ADMIN)
    assert user_change_role(actor=admin, user=kim, role="manager", reason="promoted").role == Role.MANAGER
    with pytest.raises(Refused, match="their own role"):
        user_change_role(actor=admin, user=admin, role="ops", reason="me too")
    with pytest.raises(PermissionDenied):
        user_change_role(actor=kim, user=admin, role="viewer", reason="revenge")
