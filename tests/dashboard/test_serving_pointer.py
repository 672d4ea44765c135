"""The view that servers follow: what it shows of an environment, and that it can be taken back."""

from __future__ import annotations

import pytest
from django.core.management import call_command
from django.db import connection

from dashboard.models import Environment

COLUMNS = [
    "environment", "alias", "generation", "kind", "variant_digest", "base_digest", "artifact_digest", "digest",
    "epoch",
]  # fmt: skip


def rows() -> list[tuple[object, ...]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM serving_pointer ORDER BY environment")
        assert [column.name for column in cursor.description] == COLUMNS
        return cursor.fetchall()


@pytest.mark.django_db
def test_an_environment_without_a_deployment_shows_its_name_and_no_digest() -> None:
    Environment.objects.create(name="quiet", alias="support")
    assert rows() == [("quiet", "support", 0, None, None, None, None, None, 1)]


@pytest.mark.django_db(transaction=True)
def test_the_migration_is_reversible() -> None:
    call_command("migrate", "dashboard", "0001", verbosity=0)
    try:
        assert "serving_pointer" not in connection.introspection.table_names(include_views=True)
    finally:
        call_command("migrate", verbosity=0)
    assert "serving_pointer" in connection.introspection.table_names(include_views=True)
