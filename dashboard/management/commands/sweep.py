"""``manage.py sweep``: look through the store, say what could be freed, and free it when a reason is given."""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from compression_worker.contracts import CompressionError
from compression_worker.store import StoreAway, open_store
from dashboard.formats import byte_words, whole
from dashboard.lifecycle import Refused
from dashboard.models import Sweep
from dashboard.selectors.storage import kind_rows
from dashboard.services.storage_sweep import sweep_request, sweep_survey, sweep_under_way, sweep_work


class Command(BaseCommand):
    help = "Say what of the store nothing needs any more, and with --reason free it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        how = parser.add_mutually_exclusive_group(required=True)
        how.add_argument("--dry-run", action="store_true", help="only say it; nothing is freed")
        how.add_argument("--reason", default="", help="free it; the reason is kept in the history")
        parser.add_argument("--patience", type=float, default=3600.0, help="seconds to go on for (%(default)s)")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            self._sweep(options)
        except (Refused, StoreAway, CompressionError) as error:
            raise CommandError(str(error)) from None

    def _sweep(self, options: dict[str, Any]) -> None:
        store = open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE)
        if sweep_under_way() is None:
            preview = sweep_survey(store=store)
            self._tell(preview)
            if options["dry_run"]:
                return
            sweep_request(actor=None, sweep=preview, reason=options["reason"])
        elif options["dry_run"]:
            raise CommandError("a clean-up is under way: wait until it is done")
        give_up = time.monotonic() + options["patience"]
        while not sweep_work(store=store, seconds=20.0):
            if time.monotonic() > give_up:
                raise CommandError("not done yet: a worker goes on with it, or run this again")
            time.sleep(1.0)
        done = Sweep.objects.filter(state="done")[0]
        self.stdout.write(
            f"freed {whole(done.freed_blobs)} blobs, {byte_words(done.freed_bytes)}; kept {whole(done.kept_blobs)}"
        )

    def _tell(self, preview: Sweep) -> None:
        self.stdout.write(f"in the store: {whole(preview.store_blobs)} blobs, {byte_words(preview.store_bytes)}")
        if preview.unreadable:
            named = ", ".join(preview.unreadable)
            raise CommandError(f"damaged or missing, so that nobody knows what is needed: {named}; mend these first")
        for row in kind_rows(preview):
            self.stdout.write(f"  {row.kind.label}: {whole(row.blobs)} blobs, {byte_words(row.bytes)}")
        files, size = preview.temporary_files, preview.temporary_bytes
        self.stdout.write(f"  temporary files: {whole(files)}, {byte_words(size)}")
        self.stdout.write(f"to free: {whole(preview.blobs)} blobs, {byte_words(preview.bytes + size)}")
