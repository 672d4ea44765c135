"""A service's refusal as a person sees it, and the language that pages speak."""

from __future__ import annotations

import pytest
from django.contrib.auth.decorators import login_not_required
from django.contrib.messages import get_messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.test import Client
from django.urls import path
from django.utils.translation import gettext as _

from dashboard.lifecycle import Conflict, Refused, Role
from dashboard.urls import urlpatterns as pages
from tests.dashboard.world import person

pytestmark = [pytest.mark.django_db, pytest.mark.urls(__name__)]

HERE = "http://testserver/jobs/7/?tab=log"


@login_not_required
def refusing(request: HttpRequest) -> HttpResponse:
    raise Refused("the job has ended already")


@login_not_required
def conflicting(request: HttpRequest) -> HttpResponse:
    raise Conflict("production has moved on")


@login_not_required
def forbidding(request: HttpRequest) -> HttpResponse:
    raise PermissionDenied("Your role does not include this action.")


@login_not_required
def speaking(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"{request.LANGUAGE_CODE} {_('Running')}")  # type: ignore[attr-defined]


urlpatterns = [
    path("test/refuse/", refusing),
    path("test/conflict/", conflicting),
    path("test/forbid/", forbidding),
    path("test/speak/", speaking),
    *pages,
]
handler403 = "dashboard.views.errors.forbidden"


def test_a_refused_form_leads_back_to_its_page_with_the_reason(client: Client) -> None:
    answer = client.post("/test/refuse/", headers={"referer": HERE})
    assert (answer.status_code, answer["Location"]) == (303, "/jobs/7/?tab=log")
    assert [str(message) for message in get_messages(answer.wsgi_request)] == ["the job has ended already"]


@pytest.mark.parametrize(
    "referrer",
    ["", "http://evil.example/jobs/7/", "//evil.example/", "javascript:alert(1)", "http://testserver.evil.example/"],
)
def test_a_refusal_never_leads_to_another_host(client: Client, referrer: str) -> None:
    answer = client.post("/test/refuse/", headers={"referer": referrer})
    assert answer.status_code == 409
    assert "the job has ended already" in answer.text
    assert "evil" not in answer.text


def test_a_path_that_looks_like_a_host_stays_a_path(client: Client) -> None:
    answer = client.post("/test/refuse/", headers={"referer": "http://testserver//evil.example/"})
    assert answer["Location"] == "/evil.example/"


def test_a_refused_page_is_no_loop(client: Client) -> None:
    assert client.get("/test/refuse/", headers={"referer": "http://testserver/test/refuse/"}).status_code == 409


def test_htmx_gets_the_page_that_says_why(client: Client) -> None:
    answer = client.post("/test/refuse/", headers={"referer": HERE, "hx-request": "true"})
    assert answer.status_code == 409


def test_a_conflict_is_a_409_with_a_way_to_look_again(client: Client) -> None:
    answer = client.post("/test/conflict/", headers={"referer": HERE})
    assert answer.status_code == 409
    assert "production has moved on" in answer.text
    assert 'href="/jobs/7/?tab=log"' in answer.text


def test_a_missing_permission_stays_a_403(client: Client) -> None:
    assert client.post("/test/forbid/", headers={"referer": HERE}).status_code == 403


def test_an_error_of_ours_is_not_hidden(client: Client) -> None:
    from dashboard.middleware import OperationErrorMiddleware

    middleware = OperationErrorMiddleware(lambda request: HttpResponse())
    assert middleware.process_exception(HttpRequest(), ValueError("a bug")) is None


def test_the_language_of_the_person_comes_first(client: Client) -> None:
    viewer = person(Role.VIEWER)
    viewer.language = "ja"
    viewer.save()
    client.force_login(viewer)
    answer = client.get("/test/speak/", headers={"accept-language": "en"})
    assert answer.text.startswith("ja ")
    assert answer["Content-Language"] == "ja"


def test_before_a_sign_in_the_cookie_decides_then_the_browser(client: Client) -> None:
    assert client.get("/test/speak/", headers={"accept-language": "ja,en;q=0.5"}).text.startswith("ja ")
    client.cookies["django_language"] = "en"
    assert client.get("/test/speak/", headers={"accept-language": "ja"}).text.startswith("en ")


def test_an_unknown_language_falls_back(client: Client) -> None:
    client.cookies["django_language"] = "tlh"
    assert client.get("/test/speak/", headers={"accept-language": "tlh"}).text.startswith("en ")
