"""Every page that can be read, with the address it has in a test's world, and a parser that finds inline code."""

from __future__ import annotations

from html.parser import HTMLParser
from types import SimpleNamespace

from django.urls import reverse


def addresses(world: SimpleNamespace) -> dict[str, str]:
    """Route name -> address, for each route that answers to GET after a sign-in."""
    routes: dict[str, list[object]] = {
        "overview": [],
        "search": [],
        "checkpoint-list": [],
        "checkpoint-import": [],
        "checkpoint-detail": [world.variant.name],
        "checkpoint-differences": [world.variant.name],
        "escrow-release": [world.variant.name],
        "artifact-detail": [world.artifact.pk],
        "approval-new": [world.artifact.pk],
        "job-list": [],
        "job-new": [],
        "job-create": ["bitdelta"],
        "job-detail": [world.job.pk],
        "job-log": [world.job.pk],
        "job-log-download": [world.job.pk],
        "study-list": [],
        "study-new": [],
        "study-detail": [world.study.pk],
        "evaluation-list": [],
        "evaluation-new": [],
        "evaluation-detail": [world.evaluation.pk],
        "set-list": [],
        "set-upload": [],
        "set-detail": [world.text.name, 1],
        "approval-list": [],
        "approval-detail": [world.pending.pk],
        "policy": [],
        "environment-list": [],
        "environment-detail": [world.production.name],
        "history": [],
        "worker-list": [],
        "storage": [],
        "sweep-list": [world.sweep.pk],
        "glossary": [],
        "user-list": [],
        "preferences": [],
    }
    return {name: reverse(name, args=args) for name, args in routes.items()}


class InlineCode(HTMLParser):
    """Collects what a strict content security policy would refuse: style and on* attributes, inline script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _value in attrs]
        self.found += [f"<{tag} {name}>" for name in names if name == "style" or name.startswith(("on", "hx-on"))]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.found.append(f"<{tag}>")


def inline_code(html: str) -> list[str]:
    parser = InlineCode()
    parser.feed(html)
    return parser.found
