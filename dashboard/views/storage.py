"""The store: room, damage, what could be freed, and asking for that."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_POST

from dashboard.forms.storage import SweepForm
from dashboard.permissions import rule
from dashboard.selectors import storage
from dashboard.services.storage_sweep import sweep_look, sweep_request
from dashboard.views.answers import SignedInRequest, attempt, found


@rule("page.view")
@require_GET
def storage_page(request: HttpRequest) -> HttpResponse:
    return _page(request, SweepForm())


def _page(request: HttpRequest, form: SweepForm, status: int = 200) -> HttpResponse:
    preview = storage.sweep_preview()
    context = {
        "room": storage.storage_room(),
        "preview": preview,
        "kinds": storage.kind_rows(preview),
        "largest": storage.largest(preview),
        "is_asked": storage.sweep_is_asked_for(),
        "present": storage.sweep_present(),
        "past": storage.sweeps_past(),
        "scrub": storage.scrub_progress(),
        "damages": storage.damages_open(),
        "mended": storage.damages_mended(),
        "form": form,
    }
    return render(request, "system/storage.html", context, status=status)


@rule("storage.sweep")
@require_POST
def look(request: SignedInRequest) -> HttpResponse:
    sweep_look(actor=request.user)
    messages.success(request, _("A worker looks through the store: look at this page again in a moment."))
    return redirect("storage")


@rule("storage.sweep")
@require_POST
def free(request: SignedInRequest, pk: int) -> HttpResponse:
    sweep = found(lambda: storage.sweep_get(pk))
    form = SweepForm(request.POST)
    status = 422
    if form.is_valid():
        reason = form.cleaned_data["reason"]
        asked, status = attempt(form, lambda: sweep_request(actor=request.user, sweep=sweep, reason=reason))
        if asked is not None:
            messages.success(request, _("A worker frees it now, part by part; this page says how much went."))
            return redirect("storage")
    return _page(request, form, status)


@rule("page.view")
@require_GET
def sweep_list(request: HttpRequest, pk: int) -> StreamingHttpResponse:
    """Every blob of a preview as plain text: exactly what would be freed."""
    sweep = found(lambda: storage.sweep_get(pk))
    response = StreamingHttpResponse(storage.sweep_lines(sweep), content_type="text/plain; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="clean-up-{sweep.pk}.txt"'
    return response
