"""Studies: the list, the form, the page that follows one, and the verbs that stop it or make it go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse, QueryDict
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.utils.translation import ngettext
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from dashboard.forms.studies import StudyForm
from dashboard.lifecycle import Refused
from dashboard.models import Study
from dashboard.permissions import rule
from dashboard.pictures import BitsPoint, Picture, bits_picture
from dashboard.selectors import evaluations, studies
from dashboard.services.studies import study_create, study_resume, study_stop
from dashboard.views.answers import SignedInRequest, attempt, found, live, wants_region


@rule("page.view")
@require_GET
def study_list(request: HttpRequest) -> HttpResponse:
    return render(request, "studies/list.html", {"studies": studies.study_list()})


@rule("job.create")
@require_http_methods(["GET", "POST"])
def study_new(request: SignedInRequest) -> HttpResponse:
    """A POST with ``check`` only shows what the study would come to; any other one queues it."""
    form = StudyForm(request.POST or None, initial=_given(request.GET))
    status = 200
    if request.method == "POST" and "check" not in request.POST:
        status = 422
        if form.is_valid():
            study, status = attempt(form, lambda: _create(request, form))
            if study is not None:
                return redirect("study-detail", study.pk)
    bound = form if form.is_bound else StudyForm(_as_data(form))
    context = {"form": form, "parts": form.parts(), "families": form.families(), "forecast": bound.forecast()}
    region = "#preview" if wants_region(request) and "check" in request.POST else ""
    return render(request, f"studies/new.html{region}", context, status=status)


def _given(query: QueryDict) -> dict[str, Any]:
    """What an address fills in: one value each, and any number of ways."""
    return {name: query[name] for name in query if name != "ways"} | {"ways": query.getlist("ways")}


def _as_data(form: StudyForm) -> dict[str, Any]:
    values = {name: form[name].value() for name in form.fields}
    return {name: value for name, value in values.items() if value not in (None, False, "")}


def _create(request: SignedInRequest, form: StudyForm) -> Study:
    values = form.cleaned_data
    return study_create(
        actor=request.user,
        variant=values["variant"],
        ways=values["ways"],
        calibration=values["calibration"],
        text_set=values["text_set"],
        choice_set=values["choice_set"],
        config=form.config_values,
        tokens=values["training_tokens"],
        priority=values["priority"],
        queue=form.queue,
    )


@rule("page.view")
@require_GET
def study_detail(request: HttpRequest, pk: int) -> HttpResponse:
    study = found(lambda: studies.study_get(pk))

    def context() -> dict[str, object]:
        rows = studies.study_rows(study, evaluations.policy_rules())
        full = studies.full_precision_of(study, rows)
        return {
            "study": study,
            "rows": rows,
            "full": full,
            "tokens": studies.training_tokens(rows),
            "full_cells": studies.full_row(rows),
            "columns": studies.columns(rows),
            "pictures": _pictures(rows, full),
            "measured": sum(row.evaluation is not None for row in rows),
            "is_moving": (study.stopped_at is None and any(row.is_moving for row in rows)) or studies.is_busy(rows),
            "is_busy": studies.is_busy(rows),
            "is_broken": any(row.is_broken for row in rows),
        }

    return live(request, "studies/detail.html", "trials", context, studies.study_version(study))


def _pictures(rows: list[studies.TrialRow], full: studies.FullPrecision) -> list[tuple[str, Picture | None]]:
    """Bits of the linears, as papers compare methods; and of the whole file, as disks do."""
    value = full.figures.get("perplexity")
    reference = _reference(full.bits, value) if value else None
    note = studies.base_note(rows)
    axes = (("linears", _("bits per weight of the linears")), ("file", _("bits per weight of the whole file")))
    made = [
        (name, bits_picture(studies.points(rows, whole_file=name == "file"), reference, axis, note=note))
        for name, axis in axes
    ]
    return [(name, picture) for name, picture in made if picture is not None]


def _reference(bits: float, value: Mapping[str, Any]) -> BitsPoint:
    label = _("full precision")
    return BitsPoint(label, label, bits, value["value"], value.get("low"), value.get("high"))


@rule("job.cancel")
@require_POST
def study_stop_page(request: SignedInRequest, pk: int) -> HttpResponse:
    study = found(lambda: studies.study_get(pk))
    try:
        count = study_stop(actor=request.user, study=study, how=request.POST.get("how", ""))
    except Refused as error:
        messages.error(request, str(error))
    else:
        words = ngettext(
            "Stopped: %(n)d job ends, and nothing more is asked for.",
            "Stopped: %(n)d jobs end, and nothing more is asked for.",
            count,
        )
        messages.success(request, words % {"n": count})
    return redirect("study-detail", pk)


@rule("job.create")
@require_POST
def study_resume_page(request: SignedInRequest, pk: int) -> HttpResponse:
    study = found(lambda: studies.study_get(pk))
    try:
        count = study_resume(actor=request.user, study=study)
    except Refused as error:
        messages.error(request, str(error))
    else:
        words = ngettext(
            "It goes on: %(n)d job is tried again; finished steps are reused.",
            "It goes on: %(n)d jobs are tried again; finished steps are reused.",
            count,
        )
        messages.success(request, words % {"n": count})
    return redirect("study-detail", pk)
