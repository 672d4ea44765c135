"""Checkpoints with what was made from them: lists, the lineage tree, and how good each artifact measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import Count, QuerySet
from django.urls import reverse
from django.utils.translation import gettext as _

from compression_worker.catalog import METHODS
from dashboard.lifecycle import ACTIVE_JOB_STATES, ArtifactState, JobKind, JobState
from dashboard.models import Artifact, Checkpoint, Environment, Evaluation, Job
from dashboard.pictures import Matrix, Node
from dashboard.pictures.matrices import from_figures
from dashboard.selectors.sharing import sharing_words

QUALITIES = ("perplexity", "choice_accuracy", "kl_divergence")
"""Which metric the table of artifacts shows: the first of these that was measured."""


def checkpoint_list(query: str = "") -> QuerySet[Checkpoint]:
    """Bases with their variants beneath them."""
    checkpoints = Checkpoint.objects.select_related("base").annotate(
        artifact_count=Count("artifacts", distinct=True), variant_count=Count("variants", distinct=True)
    )
    return checkpoints.filter(name__icontains=query) if query else checkpoints


def checkpoint_tree(query: str = "") -> list[Checkpoint]:
    """The same, ordered as a family: each base is followed by its variants (``depth`` 0 and 1 and so on)."""
    children: dict[int | None, list[Checkpoint]] = defaultdict(list)
    checkpoints = list(checkpoint_list(query))
    known = {one.pk for one in checkpoints}
    for one in checkpoints:
        children[one.base_id if one.base_id in known else None].append(one)
    ordered: list[Checkpoint] = []

    def walk(parent: int | None, depth: int) -> None:
        for one in children[parent]:
            one.depth = depth  # type: ignore[attr-defined]
            ordered.append(one)
            walk(one.pk, depth + 1)

    walk(None, 0)
    return ordered


def checkpoint_get(name: str) -> Checkpoint:
    return Checkpoint.objects.select_related("base", "job", "created_by").get(name=name)


def checkpoint_numbered(number: str) -> Checkpoint | None:
    """The checkpoint whose key a form or an address names; None for whatever is no such number."""
    well_formed = number.isascii() and number.isdecimal() and len(number) < 18
    return Checkpoint.objects.select_related("base").filter(pk=int(number)).first() if well_formed else None


def imports_running() -> QuerySet[Job]:
    return Job.objects.filter(kind=JobKind.IMPORT, state__in=ACTIVE_JOB_STATES)


@dataclass(frozen=True)
class ArtifactRow:
    """An artifact beside its evaluations (newest first), approvals and places."""

    artifact: Artifact
    evaluations: list[Evaluation]
    environments: list[str]

    @property
    def evaluation(self) -> Evaluation | None:
        return self.evaluations[0] if self.evaluations else None

    @property
    def about(self) -> str:
        """What tells it from others of its method, where its name does not."""
        return sharing_words(self.artifact)

    @property
    def metric(self) -> Mapping[str, Any] | None:
        return quality_metric(self.evaluation.results) if self.evaluation else None


def artifact_rows(variant: Checkpoint) -> list[ArtifactRow]:
    """The artifacts of ``variant``, newest first, in three queries."""
    artifacts = list(variant.artifacts.select_related("job", "variant").order_by("-created_at"))
    evaluations = evaluations_of([one.pk for one in artifacts])
    places = _environments_by_artifact()
    return [ArtifactRow(one, evaluations.get(one.pk, []), places.get(one.pk, [])) for one in artifacts]


def evaluations_of(artifact_ids: Sequence[int]) -> dict[int, list[Evaluation]]:
    """The evaluations of each artifact, newest first, in one query."""
    found: dict[int, list[Evaluation]] = defaultdict(list)
    for one in Evaluation.objects.filter(artifact_id__in=artifact_ids).order_by("-created_at", "-pk"):
        if one.artifact_id is not None:
            found[one.artifact_id].append(one)
    return found


def quality_metric(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    metrics: dict[str, Mapping[str, Any]] = {metric["name"]: metric for metric in results.get("metrics", [])}
    return next((metrics[name] for name in QUALITIES if name in metrics), None)


def _environments_by_artifact() -> dict[int, list[str]]:
    places: dict[int, list[str]] = defaultdict(list)
    for one in Environment.objects.filter(active__artifact__isnull=False).select_related("active"):
        if one.active and one.active.artifact_id:
            places[one.active.artifact_id].append(one.name)
    return places


def short_name(artifact: Artifact) -> str:
    """An artifact's name without its variant's, for places where the variant is plain."""
    return artifact.name.removeprefix(f"{artifact.variant.name}-") or artifact.name


def lineage(checkpoint: Checkpoint) -> Node:
    """The whole family of ``checkpoint``: from its root down to the environments that serve it."""
    root = checkpoint
    while root.base is not None:
        root = root.base
    served: dict[int, list[Environment]] = defaultdict(list)
    served_full: dict[int, list[Environment]] = defaultdict(list)
    for one in Environment.objects.filter(active__isnull=False).select_related("active"):
        if one.active and one.active.artifact_id:
            served[one.active.artifact_id].append(one)
        elif one.active:
            served_full[one.active.variant_id].append(one)
    return _node(root, checkpoint, served, served_full)


def _node(
    one: Checkpoint,
    here: Checkpoint,
    served: Mapping[int, list[Environment]],
    served_full: Mapping[int, list[Environment]],
) -> Node:
    artifacts = one.artifacts.select_related("variant").filter(state=ArtifactState.PUBLISHED).order_by("created_at")
    children = [
        *(_node(variant, here, served, served_full) for variant in one.variants.order_by("name")),
        *(
            Node(
                label=short_name(artifact),
                kind=method_label(artifact.method),
                href=reverse("artifact-detail", args=[artifact.pk]),
                size_bytes=artifact.artifact_bytes,
                children=tuple(_place(place) for place in served.get(artifact.pk, [])),
            )
            for artifact in artifacts
        ),
        *(_place(place) for place in served_full.get(one.pk, [])),
    ]
    return Node(
        label=one.name,
        kind=_("base model") if one.base_id is None else _("variant"),
        href=reverse("checkpoint-detail", args=[one.name]),
        size_bytes=one.size_bytes,
        children=tuple(children),
        is_here=one.pk == here.pk,
    )


def _place(environment: Environment) -> Node:
    label = _("generation %(number)s") % {"number": environment.generation}
    return Node(environment.name, label, reverse("environment-detail", args=[environment.name]))


def method_label(name: str) -> str:
    return METHODS[name].label if name in METHODS else name


def artifact_get(pk: int) -> Artifact:
    return Artifact.objects.select_related("variant__base", "base", "job__created_by").get(pk=pk)


def artifact_of_job(job: Job) -> Artifact | None:
    return Artifact.objects.filter(job=job).first()


def matrices(figures: Mapping[str, Any]) -> list[Matrix]:
    """Each compressed matrix with its error and, where it is told, how it is stored."""
    return from_figures(figures.get("matrices") or [])


def proxy_losses(figures: Mapping[str, Any]) -> list[Matrix]:
    """Each matrix with its relative proxy loss, where the method measured one; others say nothing."""
    return from_figures(figures.get("matrices") or [], "proxy_loss")


def saved_bytes() -> tuple[int, int]:
    """Bytes that published artifacts stand for, and bytes that they take."""
    before = after = 0
    for one in Artifact.objects.filter(state=ArtifactState.PUBLISHED).only("source_bytes", "artifact_bytes"):
        before, after = before + one.source_bytes, after + one.artifact_bytes
    return before, after


def search_everything(query: str, limit: int = 20) -> dict[str, list[Any]]:
    """Checkpoints, artifacts and jobs whose name has ``query`` in it (or whose number or digest it is)."""
    if not query:
        return {"checkpoints": [], "artifacts": [], "jobs": []}
    number = query.lstrip("#")
    jobs = Job.objects.filter(title__icontains=query)
    if number.isascii() and number.isdigit() and len(number) < 18:
        jobs = jobs | Job.objects.filter(pk=int(number))
    return {
        "checkpoints": list((Checkpoint.objects.filter(name__icontains=query) | _by_digest(Checkpoint, query))[:limit]),
        "artifacts": list((Artifact.objects.filter(name__icontains=query) | _by_digest(Artifact, query))[:limit]),
        "jobs": list(jobs.select_related("created_by").exclude(state=JobState.DRAFT)[:limit]),
    }


def _by_digest(model: Any, query: str) -> Any:
    return model.objects.filter(digest__startswith=query.lower()) if len(query) >= 6 else model.objects.none()
