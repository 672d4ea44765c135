"""What a job would come to, beside its form: bytes, memory, time, and whether it fits."""

from __future__ import annotations

from typing import Protocol
from urllib.parse import urlencode

from django import forms
from django.http import HttpRequest

from dashboard.forms.config import as_data
from dashboard.lifecycle import JobKind
from dashboard.models import Job
from dashboard.pictures import ledger_picture
from dashboard.selectors.preflight import Preflight, Remedy


class Forecasting(Protocol):
    """A form that can say what its job would need."""

    def preflight(self) -> Preflight | None: ...


def original_job(request: HttpRequest, kind: JobKind) -> Job | None:
    """The job that the form begins as a copy of."""
    number = request.GET.get("from", "")
    well_formed = number.isascii() and number.isdecimal() and len(number) < 18
    return Job.objects.select_related("variant").filter(pk=int(number), kind=kind).first() if well_formed else None


def preview(request: HttpRequest, form: forms.Form, as_it_stands: Forecasting) -> dict[str, object]:
    """``as_it_stands``: the same form, bound to what it shows."""
    found = as_it_stands.preflight()
    if found is None:
        return {"preflight": None}
    estimate = found.estimate
    return {
        "preflight": found,
        "ledger": ledger_picture(estimate.parts, estimate.source_bytes) if estimate.source_bytes else None,
        "remedies": [(remedy, _link(request, form, remedy)) for remedy in found.remedies],
    }


def _link(request: HttpRequest, form: forms.Form, remedy: Remedy) -> str:
    """The same form with the change filled in; nothing for a change that no form can make."""
    if not remedy.changes:
        return ""
    original = {"from": request.GET["from"]} if "from" in request.GET else {}
    return f"{request.path}?{urlencode(original | as_data(form) | remedy.changes)}"
