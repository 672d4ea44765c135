"""The Japanese catalogue: complete, unbroken, compiled; and pages in Japanese have no English left in them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from django.test import Client
from django.urls import reverse
from django.utils import translation

from dashboard.lifecycle import Role
from dashboard.management.commands.messages import Catalog, _complete, catalogue_problems, collected, untranslated

PAGES = [
    "overview",
    "checkpoint-list",
    "checkpoint-import",
    "job-list",
    "job-new",
    "study-list",
    "study-new",
    "evaluation-list",
    "evaluation-new",
    "set-list",
    "set-upload",
    "approval-list",
    "policy",
    "environment-list",
    "history",
    "worker-list",
    "storage",
    "glossary",
    "user-list",
    "preferences",
]


def test_the_japanese_catalogue_is_complete_and_compiled() -> None:
    assert catalogue_problems() == []


def test_messages_of_python_templates_and_worker_tables_are_collected() -> None:
    found = collected()
    assert "Roll %(name)s back to full precision" in found  # a template, with a placeholder
    assert ("%(n)s sample", "%(n)s samples") in found  # a plural
    assert "not enough evidence" in found  # Python
    assert "Distillation steps" in found  # a label of a method's settings


def test_a_missing_translation_is_named() -> None:
    catalog = Catalog(locale="ja")
    catalog.add("told", string="あり")
    catalog.add("untold")
    catalog.add(("one", "many"), string=("",))
    assert untranslated(catalog) == ["untold", "('one', 'many')"]
    assert _complete(("いち",))


class Words(HTMLParser):
    """The visible words of a page, without code, data and what is marked as another language."""

    SKIPPED = frozenset({"script", "style", "code", "pre", "title", "option", "time"})

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, bool]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        foreign = given.get("lang", "ja") != "ja" or "digest" in (given.get("class") or "")
        if tag not in ("input", "meta", "link", "br", "hr"):
            self.stack.append((tag, tag in self.SKIPPED or foreign))

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not any(skipped for _tag, skipped in self.stack):
            self.words.append(data)


ENGLISH = re.compile(
    r"\b(the|and|of|is|are|no|not|with|from|this|that|new|job|jobs|state|name|show|nothing)\b", re.IGNORECASE
)


@pytest.mark.django_db
def test_pages_in_japanese_have_no_english_sentence_left(client: Client) -> None:
    from tests.factories import make_user

    client.force_login(make_user(Role.ADMIN, username="kanri", language="ja"))
    for page in PAGES:
        response = client.get(reverse(page))
        if response.status_code == 403:
            continue
        parser = Words()
        parser.feed(response.content.decode())
        left = [words.strip() for words in parser.words if ENGLISH.search(words)]
        assert left == [], page


@pytest.mark.django_db
def test_pages_with_a_world_in_japanese_render_for_every_role() -> None:
    from tests.dashboard.views.pages import addresses
    from tests.factories import make_user, make_world

    world: SimpleNamespace = make_world()
    for role in Role:
        client = Client()
        client.force_login(make_user(role, language="ja"))
        for name, address in addresses(world).items():
            response = client.get(address)
            assert response.status_code in (200, 403), name
            if response.status_code == 200 and "html" in response.headers["Content-Type"]:
                assert 'lang="ja"' in response.content.decode(), name


def test_the_language_of_a_message_follows_the_reader() -> None:
    from dashboard.verdicts import VerdictKind

    with translation.override("ja"):
        assert str(VerdictKind.UNCLEAR.label) == "証拠不足"
    with translation.override("en"):
        assert str(VerdictKind.UNCLEAR.label) == "not enough evidence"
