"""Pages for what goes wrong: what happened, one next step, no traceback."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, HttpResponseServerError
from django.shortcuts import render
from django.template import loader
from django.utils.translation import gettext as _


def bad_request(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    return _page(
        request, 400, _("This request cannot be read"), _("Go back and try again, or start from the overview.")
    )


def forbidden(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    text = str(exception) if exception and str(exception) else _("Your role does not include this action.")
    return _page(request, 403, text, _("Ask an administrator for the role that it needs."))


def not_found(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
    return _page(
        request,
        404,
        _("There is nothing at this address"),
        _("It may have been removed. Search for it, or start from the overview."),
    )


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    return _page(
        request, 403, _("This form has expired"), _("Go back, load the page again, and send the form once more.")
    )


def server_error(request: HttpRequest) -> HttpResponse:
    """Without a request context: nothing here may need the database, which may be what is broken."""
    return HttpResponseServerError(loader.get_template("errors/500.html").render({}))


def _page(request: HttpRequest, status: int, what: str, step: str) -> HttpResponse:
    return render(request, "errors/error.html", {"status": status, "what": what, "step": step}, status=status)
