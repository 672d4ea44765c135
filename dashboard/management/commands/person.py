"""``manage.py person NAME ROLE``: somebody who may sign in, with a generated password: the first administrator."""

from __future__ import annotations

import secrets
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from dashboard.lifecycle import Refused, Role
from dashboard.services.accounts import user_create


class Command(BaseCommand):
    help = "Make somebody who may sign in and print their password, once. An administrator then makes the others."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name")
        parser.add_argument("role", choices=Role.values)

    def handle(self, *args: Any, **options: Any) -> None:
        password = secrets.token_urlsafe(12)
        try:
            user = user_create(actor=None, username=options["name"], password=password, role=options["role"])
        except Refused as refusal:
            raise CommandError(str(refusal)) from None
        self.stdout.write(f"{user.username} ({user.get_role_display()}) signs in with: {password}")
