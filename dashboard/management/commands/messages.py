"""``manage.py messages``: collect every translatable string, update the Japanese catalogue, compile it.

Babel does the work, so that no gettext tools are needed. What is collected: calls in Python, tags in templates, and the
words of the worker's tables (methods, settings) that pages show. ``--check`` changes nothing and says what is missing.
"""

from __future__ import annotations

import io
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from babel.messages.catalog import Catalog
from babel.messages.extract import extract
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.utils.translation.template import templatize

from compression_worker.catalog import METHODS
from compression_worker.evaluation.config import EvaluationConfig
from dashboard.selectors.outcomes import config_label

KEYWORDS: dict[str, tuple[int, ...] | None] = {
    "_": None,
    "gettext": None,
    "gettext_lazy": None,
    "ngettext": (1, 2),
    "ngettext_lazy": (1, 2),
}
LOCALE = "ja"
FOLDER = Path(settings.LOCALE_PATHS[0]) / LOCALE / "LC_MESSAGES"
PO, MO = FOLDER / "django.po", FOLDER / "django.mo"
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""A fixed date in the header: equal messages give equal files."""

WORDS_OF_A_SETTING = ("help", "group", "empty")
"""What a setting's metadata says to people, beside its label."""

Message = str | tuple[str, ...]


class Command(BaseCommand):
    help = "Collect translatable strings, update dashboard/locale/ja and compile it."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--check", action="store_true", help="change nothing; fail where something is missing")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["check"]:
            problems = catalogue_problems()
            if problems:
                raise CommandError("\n".join(problems))
            return
        catalog = updated()
        PO.parent.mkdir(parents=True, exist_ok=True)
        PO.write_bytes(po_bytes(catalog))
        MO.write_bytes(mo_bytes(catalog))
        missing = untranslated(catalog)
        self.stdout.write(f"{len(catalog)} messages, {len(missing)} without a translation")


def collected() -> set[Message]:
    """Every message of the source: a string, or a pair of singular and plural."""
    root = settings.ROOT
    found: set[Message] = set(_words_of_the_worker())
    for path in sorted((root / "dashboard").rglob("*.py")):
        found |= set(_extracted(path.read_bytes()))
    for path in sorted((root / "templates").rglob("*.html")):
        python = templatize(path.read_text(), origin=str(path))
        # Babel's tokenizer takes a template's indentation for Python's.
        found |= set(_extracted("\n".join(line.lstrip() for line in python.splitlines()).encode()))
    return found


def _extracted(source: bytes) -> Iterator[Message]:
    for _line, message, _comments, _context in extract("python", io.BytesIO(source), keywords=KEYWORDS):
        yield message


def _words_of_the_worker() -> Iterator[str]:
    """What pages show of tables that know no gettext: the cards of methods, labels and helps of settings."""
    for method in METHODS.values():
        yield from method.words
        yield from _words_of_config(method.config_class())
    yield from _words_of_config(EvaluationConfig)


def _words_of_config(config: type[Any]) -> Iterator[str]:
    for one in fields(config):
        yield config_label(one)
        yield from (one.metadata[key] for key in WORDS_OF_A_SETTING if one.metadata.get(key))


def updated() -> Catalog:
    """The catalogue on disk brought up to date with the source; translations that exist are kept."""
    catalog = Catalog(
        locale=LOCALE, project="Deltaworks", fuzzy=False, creation_date=EPOCH, revision_date=EPOCH, charset="utf-8"
    )
    present = read_po(io.BytesIO(PO.read_bytes()), locale=LOCALE) if PO.exists() else None
    for message in sorted(collected(), key=str):
        known = present.get(message) if present is not None else None
        entry = catalog.add(message, string=known.string if known else None)
        if not _has_placeholders(message):
            entry.flags.discard("python-format")
    return catalog


def _has_placeholders(message: Message) -> bool:
    """Babel takes a percentage (``95 % high``) for a placeholder; ours all have names."""
    return "%(" in str(message)


def po_bytes(catalog: Catalog) -> bytes:
    buffer = io.BytesIO()
    write_po(buffer, catalog, sort_output=True, no_location=True, width=110)
    return buffer.getvalue()


def mo_bytes(catalog: Catalog) -> bytes:
    buffer = io.BytesIO()
    write_mo(buffer, catalog)
    return buffer.getvalue()


def untranslated(catalog: Catalog) -> list[str]:
    """Messages with no translation, or with a fuzzy one."""
    return [str(message.id) for message in catalog if message.id and (message.fuzzy or not _complete(message.string))]


def _complete(string: Any) -> bool:
    return all(string) if isinstance(string, tuple | list) else bool(string)


def catalogue_problems() -> list[str]:
    """What is wrong with the committed catalogue: missing or unused messages, empty or broken ones, a stale .mo."""
    present = read_po(io.BytesIO(PO.read_bytes()), locale=LOCALE)
    there, wanted = {message.id for message in present if message.id}, collected()
    problems = [f"not in the catalogue: {message!r}" for message in sorted(wanted - there, key=str)]
    problems += [f"no longer in the source: {message!r}" for message in sorted(there - wanted, key=str)]
    problems += [f"no translation: {message}" for message in untranslated(present)]
    broken = [(one, errors) for one, errors in present.check() if _has_placeholders(one.id)]
    problems += [f"{error}: {one.id!r}" for one, errors in broken for error in errors]
    if not problems and MO.read_bytes() != mo_bytes(updated()):
        problems.append("django.mo is older than django.po: run manage.py messages")
    return problems
