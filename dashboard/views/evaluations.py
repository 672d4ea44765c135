"""Evaluations and the sample sets that they are measured on."""

from __future__ import annotations

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_http_methods

from dashboard.forms.config import as_data, change_marks
from dashboard.forms.evaluations import EvaluationForm, SampleSetForm, evaluation_initial
from dashboard.lifecycle import JobKind
from dashboard.models import Evaluation, SampleSet
from dashboard.permissions import rule
from dashboard.selectors import evaluations
from dashboard.services.evaluations import evaluation_create, sample_set_create
from dashboard.views.answers import SignedInRequest, attempt, found, wants_region
from dashboard.views.previews import original_job, preview


@rule("page.view")
@require_GET
def evaluation_list(request: HttpRequest) -> HttpResponse:
    rules = evaluations.policy_rules()
    rows = [(one, evaluations.metric_rows(one.results, rules)) for one in evaluations.evaluation_list()]
    return render(request, "evaluations/list.html", {"rows": rows})


@rule("page.view")
@require_GET
def evaluation_detail(request: HttpRequest, pk: int) -> HttpResponse:
    evaluation = found(lambda: evaluations.evaluation_get(pk))
    results = evaluation.results
    context = {
        "evaluation": evaluation,
        "results": results,
        "targets": results.get("targets", []),
        "rows": evaluations.metric_rows(results, evaluations.policy_rules()),
        "flips": results.get("flips") or {},
        "generations": results.get("generations", []),
    }
    return render(request, "evaluations/detail.html", context)


@rule("job.create")
@require_http_methods(["GET", "POST"])
def evaluation_new(request: SignedInRequest) -> HttpResponse:
    """A POST with ``check`` only shows what the measurement would come to; any other one queues it."""
    original = original_job(request, JobKind.EVALUATE)
    before = evaluation_initial(original) if original else {}
    given = {name: value for name, value in request.GET.items() if name != "from"}
    form = EvaluationForm(request.POST or None, initial=before | given)
    status = 200
    if request.method == "POST" and "check" not in request.POST:
        status = 422
        if form.is_valid():
            variant, artifact = form.cleaned_data["target"]
            job, status = attempt(
                form,
                lambda: evaluation_create(
                    actor=request.user,
                    variant=variant,
                    artifact=artifact,
                    text_set=form.cleaned_data["text_set"],
                    choice_set=form.cleaned_data["choice_set"],
                    config=form.config_values,
                    cloned_from=original,
                    queue=form.queue,
                ),
            )
            if job is not None:
                return redirect("job-detail", job.pk)
    marks = change_marks(form, before)
    context = {
        "form": form,
        "original": original,
        "marks": marks,
        "sections": form.sections(marks),
        **preview(request, form, EvaluationForm(as_data(form))),
    }
    region = "#preview" if wants_region(request) and "check" in request.POST else ""
    return render(request, f"evaluations/new.html{region}", context, status=status)


@rule("page.view")
@require_GET
def sample_set_list(request: HttpRequest) -> HttpResponse:
    return render(request, "evaluations/sets.html", {"sets": evaluations.sample_set_list()})


@rule("page.view")
@require_GET
def sample_set_detail(request: HttpRequest, name: str, version: int) -> HttpResponse:
    sample_set = found(lambda: SampleSet.objects.select_related("created_by").get(name=name, version=version))
    context = {
        "set": sample_set,
        "versions": SampleSet.objects.filter(name=name).order_by("-version"),
        "used": Evaluation.objects.filter(text_set=sample_set) | Evaluation.objects.filter(choice_set=sample_set),
    }
    return render(request, "evaluations/set.html", context)


@rule("set.upload")
@require_http_methods(["GET", "POST"])
def sample_set_upload(request: SignedInRequest) -> HttpResponse:
    form = SampleSetForm(request.POST or None, request.FILES or None)
    status = 200
    if request.method == "POST":
        status = 422
        if form.is_valid():
            made, status = attempt(form, lambda: _upload(request, form))
            if made is not None:
                words = _("%(set)s is stored, with %(count)s samples.") % {"set": made, "count": made.samples}
                messages.success(request, words)
                return redirect("set-detail", made.name, made.version)
    return render(request, "evaluations/upload.html", {"form": form}, status=status)


def _upload(request: SignedInRequest, form: SampleSetForm) -> SampleSet:
    values = form.cleaned_data
    return sample_set_create(
        actor=request.user,
        name=values["name"],
        kind=values["kind"],
        data=values["file"].read(),
        origin=values["origin"],
    )
