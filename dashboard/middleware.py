"""What happens around every page: its language, and the answer when a service said no."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import render
from django.utils import translation
from django.utils.http import url_has_allowed_host_and_scheme

from dashboard.lifecycle import Conflict, Refused

GetResponse = Callable[[HttpRequest], HttpResponseBase]
SEE_OTHER = 303
CONFLICT = 409


class LanguageMiddleware:
    """The language of the person, or of the cookie before a sign-in, or of the browser."""

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        language = _language(request)
        with translation.override(language):
            request.LANGUAGE_CODE = language
            response = self.get_response(request)
        response.headers.setdefault("Content-Language", language)
        return response


def _language(request: HttpRequest) -> str:
    chosen = getattr(request.user, "language", "")
    if chosen in dict(settings.LANGUAGES):
        return str(chosen)
    return translation.get_language_from_request(request)


class OperationErrorMiddleware:
    """A service's refusal becomes an answer: a message on the page that one came from, or a page that says why.

    A refused form leads back to its page (303) with the reason; a conflict, a request by htmx and a request from
    nowhere get 409. PermissionDenied stays Django's 403.
    """

    def __init__(self, get_response: GetResponse) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponseBase:
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponseBase | None:
        if not isinstance(exception, Refused):
            return None
        back = _page_before(request)
        if isinstance(exception, Conflict) or getattr(request, "htmx", False) or not back:
            return render(request, "errors/refused.html", _context(exception, back), status=CONFLICT)
        messages.error(request, str(exception))
        return HttpResponse(status=SEE_OTHER, headers={"Location": back})


def _context(refusal: Refused, back: str) -> dict[str, object]:
    return {"message": str(refusal), "is_conflict": isinstance(refusal, Conflict), "back": back}


def _page_before(request: HttpRequest) -> str:
    """Path and query of the referring page, if it is one of ours; never another host's, never a loop of GETs."""
    referrer = request.headers.get("Referer", "")
    if request.method in ("GET", "HEAD") or not url_has_allowed_host_and_scheme(
        referrer, allowed_hosts={request.get_host()}, require_https=request.is_secure()
    ):
        return ""
    parts = urlsplit(referrer)
    path = "/" + parts.path.lstrip("/")
    return f"{path}?{parts.query}" if parts.query else path
