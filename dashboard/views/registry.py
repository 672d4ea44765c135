"""Checkpoints and artifacts: list, detail with lineage, import, what differs from the base, withdrawal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils.translation import gettext as _
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from dashboard.forms.registry import ImportForm, RetireForm, import_initial
from dashboard.glossary import METRICS, metric_label
from dashboard.lifecycle import JobKind
from dashboard.models import Artifact
from dashboard.permissions import rule
from dashboard.pictures import (
    Measure,
    candidates_picture,
    coding_picture,
    curve_picture,
    heatmap_picture,
    heldout_picture,
    ledger_picture,
    lineage_picture,
    memory_picture,
    pareto_picture,
    ranks_picture,
    sharing_picture,
    training_picture,
)
from dashboard.selectors import (
    approvals,
    environments,
    escrows,
    evaluations,
    memo,
    outcomes,
    registry,
    sharing,
    storage,
    studies,
    trainings,
)
from dashboard.selectors.comparisons import comparisons
from dashboard.services.registry import artifact_retire, checkpoint_import
from dashboard.views.answers import SignedInRequest, attempt, found
from dashboard.views.previews import original_job


@rule("page.view")
@require_GET
def checkpoint_list(request: HttpRequest) -> HttpResponse:
    query = request.GET.get("q", "").strip()[:100]
    context = {"checkpoints": registry.checkpoint_tree(query), "query": query, "imports": registry.imports_running()}
    return render(request, "registry/list.html", context)


@rule("page.view")
@require_GET
def checkpoint_detail(request: HttpRequest, name: str) -> HttpResponse:
    checkpoint = found(lambda: registry.checkpoint_get(name))
    rows = registry.artifact_rows(checkpoint)
    rules = evaluations.policy_rules()
    context = {
        "checkpoint": checkpoint,
        "rows": rows,
        "quality": next((metric_label(row.metric["name"]) for row in rows if row.metric), ""),
        "verdicts": {row.artifact.pk: _verdict(row, rules) for row in rows if row.metric},
        "comparisons": [
            (one.name, pareto_picture(one.points, one.quality, note=one.note)) for one in comparisons(rows)
        ],
        "lineage": lineage_picture(registry.lineage(checkpoint)),
        "damages": storage.damages_of_checkpoint(checkpoint),
        "full": escrows.full_precision(checkpoint),
        "variants": checkpoint.variants.order_by("name"),
        "studies": studies.studies_of(checkpoint),
        "certificate": environments.certificate_latest(checkpoint.pk),
        "certificate_valid": approvals.certificate_valid(checkpoint),
    }
    return render(request, "registry/checkpoint.html", context)


def _verdict(row: registry.ArtifactRow, rules: Sequence[Mapping[str, Any]]) -> evaluations.MetricRow | None:
    results = {**row.evaluation.results, "metrics": [row.metric]} if row.evaluation else {}
    return next(iter(evaluations.metric_rows(results, rules)), None)


@rule("page.view")
@require_GET
def differences(request: HttpRequest, name: str) -> HttpResponse:
    checkpoint = found(lambda: registry.checkpoint_get(name))
    return render(request, "registry/differences.html", {"checkpoint": checkpoint})


@rule("checkpoint.import")
@require_http_methods(["GET", "POST"])
def checkpoint_import_page(request: SignedInRequest) -> HttpResponse:
    form = ImportForm(request.POST or None, initial=import_initial(original_job(request, JobKind.IMPORT)))
    status = 200
    if request.method == "POST":
        status = 422
        if form.is_valid():
            root, folder = form.cleaned_data["folder"]
            name, base, licence = (form.cleaned_data[field] for field in ("name", "base", "licence"))
            job, status = attempt(
                form,
                lambda: checkpoint_import(
                    actor=request.user, root=root, folder=folder, name=name, base=base, licence=licence
                ),
            )
            if job is not None:
                return redirect("job-detail", job.pk)
    return render(request, "registry/import.html", {"form": form}, status=status)


@rule("page.view")
@require_GET
def artifact_detail(request: SignedInRequest, pk: int) -> HttpResponse:
    return _artifact_page(request, found(lambda: registry.artifact_get(pk)), RetireForm())


def _artifact_page(request: SignedInRequest, artifact: Artifact, form: RetireForm, status: int = 200) -> HttpResponse:
    matrices, shared = registry.matrices(artifact.figures), sharing.sharing_of(artifact)
    training = trainings.training(artifact.figures)
    rows = list(artifact.evaluations.select_related("text_set", "choice_set", "job").order_by("-created_at"))
    rules = evaluations.policy_rules()
    context = {
        "artifact": artifact,
        "about": sharing.sharing_words(artifact),
        "ledger": ledger_picture(artifact.ledger, artifact.source_bytes),
        "heatmap": heatmap_picture(matrices),
        "coding": coding_picture(matrices),
        "proxy": heatmap_picture(registry.proxy_losses(artifact.figures), Measure.PROXY),
        "sharing": sharing_picture(shared),
        "candidates": candidates_picture(sharing.rounds_of(artifact), shared.blocks) if shared else None,
        "ranks": ranks_picture(sharing.ranks_of(artifact)),
        "savings": sharing.savings(artifact),
        "curve": curve_picture(trainings.distillation_losses(artifact.figures)),
        "training": training_picture(training),
        "heldout": heldout_picture(training.held_out),
        "memory": memory_picture(artifact.figures.get("training") or {}),
        "evaluations": rows,
        "settings": outcomes.artifact_settings(artifact),
        "latest_rows": evaluations.metric_rows(rows[0].results, rules) if rows else [],
        "approvals": memo.approval_list_of(artifact),
        "deployments": artifact.deployments.select_related("environment", "created_by").order_by("-created_at"),
        "hindrance": memo.request_hindrance(request.user, artifact, rows),
        "damages": storage.damages_of_artifact(artifact),
        "study": studies.study_of(artifact.job),
        "form": form,
        "metrics": METRICS,
    }
    return render(request, "registry/artifact.html", context, status=status)


@rule("artifact.retire")
@require_POST
def artifact_retire_page(request: SignedInRequest, pk: int) -> HttpResponse:
    artifact = found(lambda: registry.artifact_get(pk))
    form = RetireForm(request.POST)
    status = 422
    if form.is_valid():
        reason = form.cleaned_data["reason"]
        retired, status = attempt(form, lambda: artifact_retire(actor=request.user, artifact=artifact, reason=reason))
        if retired is not None:
            messages.success(request, _("%(name)s is withdrawn.") % {"name": artifact.name})
            return redirect("artifact-detail", pk)
    return _artifact_page(request, artifact, form, status)
