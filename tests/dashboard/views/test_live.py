"""Live regions: htmx gets the region alone, 304 while nothing changed, and polling stops when nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from dashboard.lifecycle import JobState, Role
from tests.factories import make_job, make_log

HTMX = {"HX-Request": "true"}


@pytest.mark.parametrize(
    ("route", "key", "region"),
    [
        ("job-detail", "running", "progress"),
        ("job-log", "running", "lines"),
        ("job-list", "", "rows"),
        ("overview", "", "now"),
        ("environment-detail", "production", "release"),
        ("environment-list", "", "environments"),
        ("approval-detail", "pending", "wayback"),
    ],
)
def test_htmx_gets_the_region_alone_and_304_when_nothing_changed(
    world: SimpleNamespace, client_as: Callable[[Role], Client], route: str, key: str, region: str
) -> None:
    client = client_as(Role.ENGINEER)
    row = getattr(world, key, None)
    address = reverse(route, args=[] if row is None else [row.name if key == "production" else row.pk])
    first = client.get(address, headers=HTMX)
    html = first.content.decode()
    assert html.lstrip().startswith(f'<div id="{region}"')
    assert "<html" not in html
    assert "HX-Request" in first.headers["Vary"]
    for _ in range(3):  # each 10 s the elapsed time is news: two requests may lie on two sides of that
        again = client.get(address, headers={**HTMX, "If-None-Match": first.headers["ETag"]})
        if again.status_code == 304:
            break
        first = again
    assert again.status_code == 304
    assert again.content == b""


def test_the_release_region_brings_the_top_bar_and_the_history_along(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    html = client_as(Role.OPS).get(reverse("environment-detail", args=["production"]), headers=HTMX).content.decode()
    assert 'id="serving" class="serving" hx-swap-oob="true"' in html
    assert '<div id="deployments" hx-swap-oob="true">' in html
    assert "<form" not in html  # what somebody is typing stays


def test_a_new_log_line_changes_the_job_page(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.VIEWER)
    address = reverse("job-detail", args=[world.running.pk])
    etag = client.get(address, headers=HTMX).headers["ETag"]
    make_log(world.running, 1)
    response = client.get(address, headers={**HTMX, "If-None-Match": etag})
    assert response.status_code == 200
    assert response.headers["ETag"] != etag


def test_readers_of_two_languages_never_share_an_etag(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.VIEWER)
    address = reverse("job-list")
    english = client.get(address, headers=HTMX).headers["ETag"]
    assert client.get(address, headers={**HTMX, "Accept-Language": "ja"}).headers["ETag"] != english


def test_a_page_polls_only_while_something_moves(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.VIEWER)
    assert b"every 2s" in client.get(reverse("job-detail", args=[world.running.pk])).content
    assert b"every 2s" not in client.get(reverse("job-detail", args=[world.job.pk])).content
    assert b"every 2s" not in client.get(reverse("job-list") + "?state=finished").content


def test_an_unchanged_poll_reads_little_and_renders_nothing(
    world: SimpleNamespace, client_as: Callable[[Role], Client]
) -> None:
    client = client_as(Role.VIEWER)
    address = reverse("job-detail", args=[world.running.pk])
    etag = client.get(address, headers=HTMX).headers["ETag"]
    with CaptureQueriesContext(connection) as queries:
        response = client.get(address, headers={**HTMX, "If-None-Match": etag})
    if response.status_code == 304:  # the clock of the page ticks every ten seconds
        assert len(queries) <= 6


def test_the_whole_page_comes_without_javascript(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    html = client_as(Role.VIEWER).get(reverse("job-detail", args=[world.running.pk])).content.decode()
    assert "<html" in html
    assert "layer 2 / 4" in " ".join(html.split())
    assert "elapsed" in html


def test_the_job_list_pages_by_keyset(db: None, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.ENGINEER)
    made = [make_job(created_by=client.user, state=JobState.QUEUED) for _ in range(35)]  # type: ignore[attr-defined]
    first = client.get(reverse("job-list"))
    assert len(first.context["jobs"]) == 30
    second = client.get(f"{reverse('job-list')}?before={first.context['next']}")
    assert [job.pk for job in second.context["jobs"]] == [job.pk for job in made[4::-1]]


def test_the_job_list_filters_and_ignores_nonsense(world: SimpleNamespace, client_as: Callable[[Role], Client]) -> None:
    client = client_as(Role.VIEWER)

    def found(query: str) -> set[int]:
        return {job.pk for job in client.get(f"{reverse('job-list')}?{query}").context["jobs"]}

    assert found("state=failed") == {world.failed.pk}
    assert found("q=support") == {world.job.pk}
    assert found(f"q=%23{world.failed.pk}") == {world.failed.pk}
    assert world.running.pk in found("state=no-such-state&before=x")
    assert found("kind=rehearse") == {world.certificate.job_id}
