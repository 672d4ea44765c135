"""Fixtures of the page tests: a world of rows, and a client for each role."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from django.test import Client

    from dashboard.lifecycle import Role

# Models are imported inside the fixtures: this file is read before Django is set up.


@pytest.fixture
def world(db: None) -> SimpleNamespace:
    from tests.factories import make_world

    return make_world()


@pytest.fixture
def client_as(db: None) -> Callable[[Role], Client]:
    """A client signed in with a role; its user is ``client.user``."""

    from django.test import Client

    from tests.factories import make_user

    def sign_in(role: Role) -> Client:
        client = Client()
        client.user = make_user(role)  # type: ignore[attr-defined]
        client.force_login(client.user)  # type: ignore[attr-defined]
        return client

    return sign_in
