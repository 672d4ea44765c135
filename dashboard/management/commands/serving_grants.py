"""``manage.py serving_grants``: exactly the rights that a serving process needs, for its own database role."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connection, transaction
from psycopg import sql

STATEMENTS = (
    "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {role}",
    "REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM {role}",
    "GRANT USAGE ON SCHEMA public TO {role}",
    "GRANT SELECT ON serving_pointer TO {role}",
    "GRANT SELECT, INSERT, UPDATE ON dashboard_serverreport TO {role}",
)


class Command(BaseCommand):
    help = "Give a database role what a serving process needs: read the pointer, write its own reports, nothing else."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--role", default="deltaworks_server", help="the role; it has to exist (%(default)s)")

    def handle(self, *args: Any, **options: Any) -> None:
        role = options["role"]
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [role])
            found = cursor.fetchone()
            if found is None:
                raise CommandError(f"there is no database role '{role}': make it first, with CREATE ROLE … LOGIN")
            if found[0]:
                raise CommandError(f"'{role}' is a superuser: grants would not limit it; name another role")
            for statement in STATEMENTS:
                composed = sql.SQL(statement).format(role=sql.Identifier(role))
                cursor.execute(composed.as_string(connection.connection))
        self.stdout.write(f"{role}: reads serving_pointer, writes dashboard_serverreport")
