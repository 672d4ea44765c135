"""What holds for every page: its rule, who may see it, no inline code, the top bar, no queries that grow."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import URLPattern, get_resolver, resolve, reverse

from dashboard.lifecycle import ApprovalState, Role
from dashboard.permissions import PUBLIC, RULES, allows
from tests.dashboard.views.pages import addresses, inline_code
from tests.factories import make_approval, make_artifact, make_checkpoint, make_evaluation, make_job

PUBLIC_ROUTES = {"sign-in", "language", "livez", "readyz"}


def routes() -> list[URLPattern]:
    return [pattern for pattern in get_resolver().url_patterns if isinstance(pattern, URLPattern)]


def test_every_route_names_its_rule() -> None:
    assert len(routes()) > 40
    for pattern in routes():
        assert getattr(pattern.callback, "rule", None) in {*RULES, PUBLIC}, pattern.name


def test_only_the_named_routes_are_public() -> None:
    assert {pattern.name for pattern in routes() if pattern.callback.rule == PUBLIC} == PUBLIC_ROUTES


def test_the_list_of_pages_has_every_route_that_answers_to_get(world: SimpleNamespace, client: Client) -> None:
    client.force_login(world.engineer)
    listed = set(addresses(world))
    for pattern in routes():
        if pattern.name in PUBLIC_ROUTES or pattern.name in listed:
            continue
        example = {"pk": 1, "name": "x", "version": 1, "method": "bitdelta"}
        kwargs = {name: example[name] for name in pattern.pattern.converters}
        response = client.get(reverse(pattern.name, kwargs=kwargs))
        assert response.status_code in (403, 405), pattern.name


@pytest.mark.parametrize("role", list(Role))
def test_pages_answer_as_the_rules_say(world: SimpleNamespace, client_as: Callable[[Role], Client], role: Role) -> None:
    client = client_as(role)
    for name, address in addresses(world).items():
        response = client.get(address)
        expected = 200 if allows(role, resolve(address).func.rule) else 403  # type: ignore[attr-defined]
        assert response.status_code == expected, name


def test_anonymous_people_are_sent_to_the_sign_in(world: SimpleNamespace, client: Client) -> None:
    for name, address in addresses(world).items():
        response = client.get(address)
        assert response.status_code == 302, name
        assert response.headers["Location"].startswith(reverse("sign-in")), name


def test_no_page_has_inline_code(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    engineer, ops, admin = (client_as(role) for role in (Role.ENGINEER, Role.OPS, Role.ADMIN))
    for address in addresses(world).values():
        for client in (engineer, ops, admin):
            response = client.get(address)
            if "html" in response.headers["Content-Type"]:
                assert inline_code(response.content.decode()) == [], address
    assert inline_code(Client().get(reverse("sign-in")).content.decode()) == []


def test_user_text_is_escaped_everywhere(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.ENGINEER)
    for route, key, marker in (
        ("evaluation-detail", [world.evaluation.pk], "sat &lt;i&gt;down"),
        ("job-log", [world.job.pk], "line 0 &lt;b&gt;"),
        ("set-detail", [world.text.name, 1], "Once &lt;b&gt;upon"),
    ):
        assert marker in client.get(reverse(route, args=key)).content.decode()


def test_the_top_bar_says_what_production_serves(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    html = client_as(Role.VIEWER).get(reverse("glossary")).content.decode()
    assert "generation 2" in html
    assert "support-ja @ bitdelta" in html
    assert "1/1 server confirms" in html
    assert reverse("environment-detail", args=["production"]) in html


@pytest.mark.parametrize(
    "route", ["job-list", "approval-list", "evaluation-list", "checkpoint-list", "overview", "history"]
)
def test_lists_ask_the_same_number_of_queries_however_long_they_are(
    world: SimpleNamespace, client_as: Callable[[Role], Client], route: str
) -> None:
    client = client_as(Role.ENGINEER)

    def add(number: int) -> None:
        make_job(created_by=world.engineer)
        made = make_artifact(make_checkpoint(f"variant-{number}", world.base))
        make_approval(make_evaluation(made), ApprovalState.APPROVED)

    client.get(reverse(route))
    add(0)
    with CaptureQueriesContext(connection) as few:
        client.get(reverse(route))
    for number in range(1, 6):
        add(number)
    with CaptureQueriesContext(connection) as many:
        client.get(reverse(route))
    assert len(many) == len(few), [query["sql"][:200] for query in many.captured_queries]


def test_an_unknown_address_is_a_page_with_a_next_step(client_as: Callable[[Role], Client]) -> None:
    response = client_as(Role.VIEWER).get("/nothing-here/")
    assert response.status_code == 404
    assert b"There is nothing at this address" in response.content


def test_a_refused_page_says_whom_to_ask(client_as: Callable[[Role], Client]) -> None:
    response = client_as(Role.VIEWER).get(reverse("user-list"))
    assert response.status_code == 403
    assert b"Ask an administrator" in response.content


def test_a_broken_page_shows_no_traceback(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    from dashboard.selectors import storage

    def broken() -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr(storage, "storage_room", broken)
    client = Client(raise_request_exception=False)
    client.force_login(world.engineer)
    response = client.get(reverse("storage"))
    assert response.status_code == 500
    assert b"Something broke on our side" in response.content
    assert b"secret" not in response.content


def test_health_answers_without_a_sign_in(db: None, client: Client) -> None:
    assert client.get(reverse("livez")).status_code == 200
    assert client.get(reverse("readyz")).json() == {"database": "ok", "migrations_waiting": 0}


def test_pages_carry_the_strict_policy(client_as: Callable[[Role], Client]) -> None:
    policy = client_as(Role.VIEWER).get(reverse("overview")).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
