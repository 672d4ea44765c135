"""History: every recorded change, with who, when and why."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET

from dashboard.forms.accounts import HistoryFilterForm
from dashboard.permissions import rule
from dashboard.selectors import history


@rule("page.view")
@require_GET
def history_page(request: HttpRequest) -> HttpResponse:
    form = HistoryFilterForm(request.GET)
    form.fields["kind"].choices = [("", _("all")), *history.KINDS.items()]  # type: ignore[attr-defined]
    form.is_valid()
    kind, key, user = (form.cleaned_data.get(name) or "" for name in ("kind", "key", "user"))
    rows = history.history(
        kind=kind, key=key, user=user, before=form.cleaned_data.get("before"), limit=history.PAGE + 1
    )
    page = rows[: history.PAGE]
    context = {
        "form": form,
        "changes": page,
        "next": page[-1].at.strftime("%Y-%m-%dT%H:%M:%S.%f%z") if len(rows) > history.PAGE else "",
        "is_filtered": bool(kind or key or user),
    }
    return render(request, "history.html", context)
