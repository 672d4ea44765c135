"""How views answer: a page or, for htmx, one region of it; 304 when nothing changed; refusals beside the form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from django import forms
from django.conf import settings
from django.core.exceptions import ObjectDoesNotExist
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotModified
from django.shortcuts import render
from django.utils.cache import patch_vary_headers
from django.utils.translation import get_language

from dashboard.lifecycle import Conflict, Refused
from dashboard.models import User

Found = TypeVar("Found")


class SignedInRequest(HttpRequest):
    """A request that the sign-in middleware let through, with what htmx says of itself."""

    user: User
    htmx: Any


def wants_region(request: HttpRequest) -> bool:
    htmx = getattr(request, "htmx", None)
    return htmx is not None and bool(htmx) and not htmx.boosted


def etag_for(request: HttpRequest, *parts: object) -> str:
    """Changes with what a region shows: its data, the reader, the reader's language, the code."""
    user = request.user
    facts = (settings.SECRET_KEY[:8], get_language(), user.pk, getattr(user, "role", ""), *parts)
    return f'"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"'


def live(
    request: HttpRequest,
    template: str,
    region: str,
    context: Callable[[], Mapping[str, Any]],
    version: tuple[object, ...],
) -> HttpResponse:
    """The whole page, or for htmx its ``region`` alone; nothing is read or rendered when ``version`` is known."""
    response: HttpResponse
    if not wants_region(request):
        response = render(request, template, dict(context()))
    else:
        etag = etag_for(request, region, *version)
        if request.headers.get("If-None-Match") == etag:
            response = HttpResponseNotModified()
        else:
            response = render(request, f"{template}#{region}", dict(context()))
        response["ETag"] = etag
    response["Cache-Control"] = "private, no-cache"
    patch_vary_headers(response, ["HX-Request"])
    return response


def found(get: Callable[[], Found]) -> Found:
    """What ``get`` finds, or 404."""
    try:
        return get()
    except ObjectDoesNotExist as error:
        raise Http404(str(error)) from None


def attempt(form: forms.Form, act: Callable[[], Found]) -> tuple[Found | None, int]:
    """Let a service act on a valid form. What it refuses stands in the form, and what was typed stays."""
    try:
        return act(), 200
    except Conflict as error:
        form.add_error(None, str(error))
        return None, 409
    except Refused as error:
        form.add_error(None, str(error))
        return None, 422
