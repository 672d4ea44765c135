"""Jobs: the list, the cards of methods, the form of one method, the live page of a job, its log, its verbs."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlencode

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from compression_worker.catalog import METHODS
from dashboard.forms.config import as_data, change_marks
from dashboard.forms.jobs import JobFilterForm, MethodForm, clone_initial, shared_values
from dashboard.lifecycle import CancelRequest, JobKind, JobState, Refused
from dashboard.models import Job, Priority
from dashboard.permissions import rule
from dashboard.pictures import (
    Measure,
    candidates_picture,
    coding_picture,
    curve_picture,
    heatmap_picture,
    heldout_picture,
    ledger_picture,
    memory_picture,
    ranks_picture,
    sharing_picture,
    timeline_picture,
    training_picture,
)
from dashboard.selectors import jobs, outcomes, promises, registry, sharing, sizes, studies, trainings, waiting
from dashboard.services.jobs import compression_create, job_cancel, job_reprioritise, job_retry
from dashboard.views.answers import SignedInRequest, attempt, found, live, wants_region
from dashboard.views.previews import original_job, preview


@rule("page.view")
@require_GET
def job_list(request: HttpRequest) -> HttpResponse:
    form = JobFilterForm(request.GET)
    values = form.values
    query, state, kind = (values.get(name) or "" for name in ("q", "state", "kind"))
    rows = jobs.job_list(state=state, kind=kind, query=query, before=values.get("before"), limit=jobs.PAGE + 1)
    page = rows[: jobs.PAGE]
    context = {
        "form": form,
        "jobs": page,
        "next": page[-1].pk if len(rows) > jobs.PAGE else None,
        "is_filtered": bool(query or state or kind),
        "is_moving": any(not job.is_terminal for job in page),
    }
    version = (jobs.jobs_version(page), waiting.reasons_clock(page))
    return live(request, "jobs/list.html", "rows", lambda: context | {"waits": waiting.waits(page)}, version)


@rule("job.create")
@require_GET
def job_new(request: HttpRequest) -> HttpResponse:
    """The method cards: all of them, or those that fit the checkpoint that is chosen."""
    number = request.GET.get("variant", "")
    checkpoint = registry.checkpoint_numbered(number)
    carried = urlencode({"variant": checkpoint.pk}) if checkpoint else ""
    context = {"families": sizes.method_families(checkpoint), "checkpoint": checkpoint, "carried": carried}
    return render(request, "jobs/new.html", context)


@rule("job.create")
@require_http_methods(["GET", "POST"])
def job_create(request: SignedInRequest, method: str) -> HttpResponse:
    """A POST with ``check`` only shows what the job would come to; any other one queues it."""
    if method not in METHODS:
        raise Http404(_("There is no method of that name."))
    original = original_job(request, JobKind.COMPRESS)
    before = clone_initial(original) if original else {}
    given = {name: value for name, value in request.GET.items() if name != "from"}
    form = MethodForm(request.POST or None, method=method, initial=before | given)
    status = 200
    if request.method == "POST" and "check" not in request.POST:
        status = 422
        if form.is_valid():
            job, status = attempt(form, lambda: _compress(request, method, form, original))
            if job is not None:
                return redirect("job-detail", job.pk)
    marks = change_marks(form, before)
    context = {
        "form": form,
        "families": sizes.method_families(form.checkpoint, also=method),
        "has_choice": len(METHODS) > 1,
        "carried": urlencode(shared_values(form)),
        "method": METHODS[method],
        "name": method,
        "original": original,
        "marks": marks,
        "sections": form.sections(marks),
        "sizes": sizes.predictions(method),
        "is_any_registered": sizes.compressible(method).exists(),
        **preview(request, form, MethodForm(as_data(form), method=method)),
    }
    region = "#preview" if wants_region(request) and "check" in request.POST else ""
    return render(request, f"jobs/create.html{region}", context, status=status)


def _compress(request: SignedInRequest, method: str, form: MethodForm, original: Job | None) -> Job:
    values = form.cleaned_data
    return compression_create(
        actor=request.user,
        method=method,
        variant=values["variant"],
        config=form.config_values,
        calibration=values["calibration_set"],
        seed=values["seed"],
        priority=values["priority"],
        cloned_from=original,
        queue=form.queue,
    )


@rule("page.view")
@require_GET
def job_detail(request: HttpRequest, pk: int) -> HttpResponse:
    job = found(lambda: jobs.job_get(pk))

    def context() -> dict[str, object]:
        steps = jobs.job_steps(job)
        progress = jobs.job_progress(job, steps)
        made = registry.artifact_of_job(job) if job.state == JobState.SUCCEEDED else None
        matrices = registry.matrices(made.figures) if made else jobs.matrices_so_far(steps)
        training = trainings.training(made.figures) if made else trainings.training_so_far(steps)
        shared = sharing.sharing_of(made) if made else sharing.sharing_so_far(steps)
        rounds = sharing.rounds_of(made) if made else sharing.rounds_so_far(steps)
        return {
            "job": job,
            "steps": steps,
            "progress": progress,
            "timeline": timeline_picture(jobs.timeline_columns(steps)),
            "ledger": ledger_picture(made.ledger, made.source_bytes) if made else None,
            "heatmap": heatmap_picture(matrices),
            "coding": coding_picture(matrices),
            "proxy": heatmap_picture(
                registry.proxy_losses(made.figures) if made else jobs.proxies_so_far(steps), Measure.PROXY
            ),
            "sharing": sharing_picture(shared),
            "candidates": candidates_picture(rounds, shared.blocks) if shared else None,
            "ranks": ranks_picture(sharing.ranks_of(made)) if made else None,
            "savings": sharing.savings(made) if made else [],
            "curve": curve_picture(trainings.losses_so_far(steps)),
            "training": training_picture(training),
            "heldout": heldout_picture(training.held_out),
            "memory": memory_picture(made.figures.get("training") or {}) if made else None,
            "study": studies.study_of(job),
            "log": jobs.log_tail(job),
            "wait": waiting.job_wait(job),
            "outcome": outcomes.job_outcome(job, steps),
            "promises": promises.promises(job, steps),
            "priorities": Priority.choices,
            "settings": outcomes.job_settings(job),
            "changes": outcomes.clone_changes(job),
        }

    return live(request, "jobs/detail.html", "progress", context, jobs.job_version(job))


@rule("page.view")
@require_GET
def job_log(request: HttpRequest, pk: int) -> HttpResponse:
    job = found(lambda: jobs.job_get(pk))
    query, before = request.GET.get("q", "").strip()[:200], request.GET.get("before", "")
    lines = jobs.log_page(job, query=query, before=int(before) if before.isdecimal() and len(before) < 18 else None)
    context = {"job": job, "lines": lines, "query": query, "earlier": lines[0].pk if len(lines) == 500 else None}
    version = (job.state, query, before, lines[-1].pk if lines else 0)
    return live(request, "jobs/log.html", "lines", lambda: context, version)


@rule("page.view")
@require_GET
def job_log_download(request: HttpRequest, pk: int) -> StreamingHttpResponse:
    """The whole log as plain text."""
    job = found(lambda: jobs.job_get(pk))

    def lines() -> Iterator[str]:
        for line in job.log_lines.order_by("pk").iterator(chunk_size=1000):
            yield f"{line.at.isoformat(timespec='milliseconds')} {line.level:<7} {line.text}\n"

    response = StreamingHttpResponse(lines(), content_type="text/plain; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="job-{job.pk}.log.txt"'
    return response


@rule("job.cancel")
@require_POST
def job_cancel_page(request: SignedInRequest, pk: int) -> HttpResponse:
    job = found(lambda: jobs.job_get(pk))
    how = request.POST.get("how", "")
    try:
        job_cancel(actor=request.user, job=job, how=how)
    except Refused as error:
        messages.error(request, str(error))
    else:
        messages.success(request, _stopping(how))
    return redirect("job-detail", pk)


def _stopping(how: str) -> str:
    if how == CancelRequest.STOP:
        return _("The job stops after the step that is running; what is done is kept.")
    return _("The running step is killed; the steps before it are kept.")


@rule("job.create")
@require_POST
def job_retry_page(request: SignedInRequest, pk: int) -> HttpResponse:
    job = found(lambda: jobs.job_get(pk))
    try:
        again = job_retry(actor=request.user, job=job)
    except Refused as error:
        messages.error(request, str(error))
        return redirect("job-detail", pk)
    messages.success(request, _("Queued again; steps that are done already are not computed twice."))
    return redirect("job-detail", again.pk)


@rule("job.create")
@require_POST
def job_priority(request: SignedInRequest, pk: int) -> HttpResponse:
    job = found(lambda: jobs.job_get(pk))
    text = request.POST.get("priority", "")
    try:
        job_reprioritise(actor=request.user, job=job, priority=int(text))
    except ValueError:
        messages.error(request, _("A priority is a whole number; “%(text)s” is none.") % {"text": text[:20]})
    except Refused as error:
        messages.error(request, str(error))
    return redirect("job-detail", pk)
