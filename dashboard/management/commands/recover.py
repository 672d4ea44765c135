"""``manage.py recover``: what to do after the database was restored from an older backup."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from compression_worker.store import open_store
from dashboard.services.recovery import recover


class Command(BaseCommand):
    help = (
        "After a restore from an older backup: say what servers, steps and the store know that the rows do not, and "
        "with --yes put it right. Harmless at any time, and again and again."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--yes", action="store_true", help="do it; without it nothing is changed")
        parser.add_argument(
            "--epoch",
            type=int,
            default=0,
            help="raise every environment to at least this epoch: for servers that do not follow and do not report why",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if not 0 <= options["epoch"] < 2**62:
            raise CommandError("an epoch is a whole number from 1 on: look at what the servers report")
        store = open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE)
        try:
            lines = recover(store=store, epoch=options["epoch"], act=options["yes"])
        except OSError as error:
            raise CommandError(f"the store cannot be read: {error}; put that right and run this again") from error
        for line in lines:
            self.stdout.write(line)
        if not options["yes"]:
            self.stdout.write("Nothing was changed. To do it: manage.py recover --yes")
