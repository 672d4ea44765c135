"""``manage.py demo seed | remove | passwords``: put the demo in, take it out, or give its people other passwords."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.template.defaultfilters import filesizeformat

from dashboard.lifecycle import Refused
from dashboard.models import User
from dashboard.services.demo import demo_new_passwords, demo_seed
from dashboard.services.demo_removal import demo_remove, demo_rows

NAMES = {"certificates": "rollback certificates", "sample_sets": "sample sets"}


class Command(BaseCommand):
    help = "Put the demo in, take it out, or give its people other passwords."

    def add_arguments(self, parser: ArgumentParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        actions.add_parser("seed", help="make the demo's people, sets and environments, and queue its jobs")
        actions.add_parser("passwords", help="give the demo's people new passwords and print them")
        remove = actions.add_parser("remove", help="remove every row and file of the demo")
        remove.add_argument("--dry-run", action="store_true", help="only say what would be removed")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            getattr(self, options["action"])(options)
        except Refused as refusal:
            raise CommandError(str(refusal)) from None

    def seed(self, options: dict[str, Any]) -> None:
        passwords = demo_seed()
        if not passwords:
            self.stdout.write("The demo's people are there already; 'demo passwords' gives them new passwords.")
            return
        self._tell_passwords(passwords)
        self.stdout.write("The demo's jobs run now, one after another; the overview shows how far they are.")
        self.stdout.write("Remove the demo with: make demo-remove")

    def passwords(self, options: dict[str, Any]) -> None:
        passwords = demo_new_passwords()
        if not passwords:
            raise CommandError("there is no demo: 'demo seed' makes one")
        self._tell_passwords(passwords)

    def remove(self, options: dict[str, Any]) -> None:
        if options["dry_run"]:
            self._tell_counts("Would remove", demo_rows().counts())
            return
        removal = demo_remove(actor=None)
        self._tell_counts("Removed", removal.counts)
        if removal.kept_users:
            names = ", ".join(removal.kept_users)
            self.stdout.write(f"Kept without a way to sign in, because something that they did stays: {names}")
        self.stdout.write(f"Freed {filesizeformat(removal.bytes_freed)} in {removal.blobs} files. History stays.")

    def _tell_passwords(self, passwords: dict[str, str]) -> None:
        self.stdout.write("Sign-ins of the demo (generated, shown only now):")
        for user in User.objects.filter(username__in=passwords).order_by("pk"):
            self.stdout.write(f"  {user.get_role_display():<15} {user.username:<8} {passwords[user.username]}")

    def _tell_counts(self, what: str, counts: dict[str, int]) -> None:
        parts = [f"{count} {_name(name, count)}" for name, count in counts.items() if count]
        self.stdout.write(f"{what}: {', '.join(parts) or 'nothing'}.")


def _name(rows: str, count: int) -> str:
    plural = NAMES.get(rows, rows)
    return plural.removesuffix("s") if count == 1 else plural
