"""The command that makes the first administrator."""

from __future__ import annotations

from io import StringIO

import pytest
from django.core.management import CommandError, call_command

from dashboard.models import User

pytestmark = pytest.mark.django_db


def test_the_printed_password_signs_in_and_the_role_is_the_one_asked_for() -> None:
    out = StringIO()
    call_command("person", "ada", "admin", stdout=out)
    user = User.objects.get(username="ada")
    assert user.role == "admin"
    assert user.check_password(out.getvalue().split("signs in with: ")[1].strip())


def test_a_name_that_is_taken_is_refused() -> None:
    call_command("person", "ada", "admin", stdout=StringIO())
    with pytest.raises(CommandError, match="already exists"):
        call_command("person", "ada", "viewer", stdout=StringIO())
