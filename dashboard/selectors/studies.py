"""A study as its page tells it: each way with its jobs, what came of it, and the points of its pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import Count, Max, Q, QuerySet
from django.urls import reverse
from django.utils.translation import gettext as _

from compression_worker.catalog import METHODS
from dashboard.lifecycle import JobState, StepState
from dashboard.models import Artifact, Checkpoint, Evaluation, Job, Step, Study, Trial
from dashboard.pictures import BitsPoint
from dashboard.selectors.evaluations import MetricRow, metric_rows
from dashboard.selectors.preflight import model_of
from dashboard.selectors.registry import method_label
from dashboard.selectors.trials import TOKENS_FIELD, way_label

OF_THE_LINEARS = frozenset({"codes", "masks", "scales", "residual"})
"""Parts of a ledger that hold the compressed matrices."""
COMPRESSED, FULL = "compressed", "variant"
SHOWN = ("perplexity", "kl_divergence", "top1_agreement", "choice_accuracy")


def study_list(limit: int = 100) -> list[Study]:
    """Newest first, with their trials counted by how far they are."""
    done = Count("trials", filter=Q(trials__evaluation__state=JobState.SUCCEEDED))
    studies = Study.objects.select_related("variant", "created_by").annotate(total=Count("trials"), measured=done)
    return list(studies.order_by("-pk")[:limit])


def study_get(pk: int) -> Study:
    related = ("variant__base", "calibration", "text_set", "choice_set", "created_by")
    return Study.objects.select_related(*related).get(pk=pk)


def study_of(job: Job) -> Study | None:
    """The study that a job belongs to."""
    return Study.objects.filter(Q(trials__compression=job) | Q(trials__evaluation=job)).first()


def study_version(study: Study) -> tuple[object, ...]:
    """Changes whenever the page would look different."""
    trials = study.trials.order_by("index")
    jobs = trials.values_list(
        "problem", "compression", "compression__state", "evaluation", "evaluation__state",
        "compression__cancel_requested", "evaluation__cancel_requested",
    )  # fmt: skip
    moved = Step.objects.filter(Q(job__trial__study=study) | Q(job__measured_trial__study=study)).aggregate(
        done=Count("pk", filter=Q(state=StepState.DONE)), claims=Max("attempt")
    )
    return (study.pk, study.stopped_at, *jobs, *moved.values())


@dataclass(frozen=True)
class Spent:
    """What computing took: seconds of all steps together, the most memory that one held, steps that were reused."""

    seconds: float | None = None
    memory_bytes: float | None = None
    gpu_bytes: float | None = None
    reused: int = 0
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class TrialRow:
    """One way: its jobs, its artifact and evaluation once they are there, and what its compression took."""

    trial: Trial
    label: str
    artifact: Artifact | None
    evaluation: Evaluation | None
    metrics: Mapping[str, MetricRow]
    spent: Spent

    @property
    def needs_base(self) -> bool:
        return self.trial.method in METHODS and METHODS[self.trial.method].needs_base

    @property
    def linears_bits(self) -> float | None:
        """Bits for each weight of the block linears, where they are known."""
        return linears_bits(self.artifact) if self.artifact else None

    @property
    def cells(self) -> list[tuple[MetricRow | None, Any]]:
        """Each metric's row and the figure of the compressed model, in the order of the table."""
        return [(row, _cell(row, self.evaluation)) for row in (self.metrics.get(name) for name in SHOWN)]

    @property
    def is_moving(self) -> bool:
        """Whether something is still to happen by itself."""
        trial = self.trial
        if trial.problem or (trial.compression.is_terminal and trial.compression.state != JobState.SUCCEEDED):
            return False
        return trial.evaluation is None or not trial.evaluation.is_terminal

    @property
    def is_broken(self) -> bool:
        jobs = [job for job in (self.trial.compression, self.trial.evaluation) if job]
        return bool(self.trial.problem) or any(job.is_terminal and job.state != JobState.SUCCEEDED for job in jobs)


def linears_bits(artifact: Artifact) -> float | None:
    """As the method tells, or else from the ledger and the shapes in config.json; None for shapes not known here."""
    value = ((artifact.figures or {}).get("linears") or {}).get("bits_per_weight")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    shapes = model_of(artifact.variant).shapes()
    stored = sum(int(part["bytes"]) for part in artifact.ledger if part["name"] in OF_THE_LINEARS)
    return 8 * stored / shapes.linears if shapes and stored else None


def columns(rows: Sequence[TrialRow]) -> list[MetricRow | None]:
    """The metrics that any way was measured in, each by a row that tells its name; None for one that none was."""
    return [next((row.metrics[name] for row in rows if name in row.metrics), None) for name in SHOWN]


def training_tokens(rows: Iterable[TrialRow]) -> int | None:
    """How many tokens the methods that train were asked to train on; None where none of them trains."""
    configs = (row.trial.compression.spec.get("config") or {} for row in rows)
    return next((config[TOKENS_FIELD] for config in configs if TOKENS_FIELD in config), None)


def is_busy(rows: Iterable[TrialRow]) -> bool:
    """Whether a job of the study is unfinished."""
    jobs = (job for row in rows for job in (row.trial.compression, row.trial.evaluation) if job)
    return any(not job.is_terminal for job in jobs)


def _cell(row: MetricRow | None, evaluation: Evaluation | None) -> Any:
    targets = list(evaluation.results.get("targets", [])) if evaluation else []
    return row.cells[targets.index(COMPRESSED)] if row and COMPRESSED in targets else None


def study_rows(study: Study, rules: Sequence[Mapping[str, Any]]) -> list[TrialRow]:
    """In the order in which they were asked for, in three queries."""
    trials = list(
        study.trials.select_related("compression__artifact__variant", "evaluation__evaluation").order_by("index")
    )
    spent = _spent([trial.compression_id for trial in trials])
    return [_row(trial, spent.get(trial.compression_id, Spent()), rules) for trial in trials]


def _row(trial: Trial, spent: Spent, rules: Sequence[Mapping[str, Any]]) -> TrialRow:
    evaluation = getattr(trial.evaluation, "evaluation", None)
    rows = metric_rows(evaluation.results, rules) if evaluation else []
    return TrialRow(
        trial=trial,
        label=way_label(trial.method, trial.bits),
        artifact=getattr(trial.compression, "artifact", None),
        evaluation=evaluation,
        metrics={row.name: row for row in rows},
        spent=spent,
    )


def _spent(jobs: Iterable[int]) -> dict[int, Spent]:
    """Of each job, from what its finished steps measured."""
    found: dict[int, list[tuple[str, bool, Any]]] = defaultdict(list)
    steps = Step.objects.filter(job__in=list(jobs)).values_list("job_id", "state", "reused", "data__measured")
    for job, state, reused, measured in steps:
        found[job].append((state, reused, measured if isinstance(measured, dict) else {}))
    return {job: _sum(rows) for job, rows in found.items()}


def _sum(rows: Sequence[tuple[str, bool, Any]]) -> Spent:
    done = [(reused, measured) for state, reused, measured in rows if state == StepState.DONE]
    return Spent(
        seconds=sum(measured.get("seconds") or 0.0 for _reused, measured in done) or None,
        memory_bytes=_most(measured.get("peak_memory_bytes") for _reused, measured in done),
        gpu_bytes=_most(measured.get("gpu_peak_memory_bytes") for _reused, measured in done),
        reused=sum(reused for reused, _measured in done),
        done=len(done),
        total=len(rows),
    )


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value), default=None)


@dataclass(frozen=True)
class FullPrecision:
    """What everything in a study is compared with. ``figures``: value and interval by metric, once measured."""

    checkpoint: Checkpoint
    weight_bytes: int
    figures: Mapping[str, Mapping[str, Any]]

    @property
    def bits(self) -> float:
        """Of each weight, as it was imported."""
        return 8 * self.weight_bytes / max(self.checkpoint.parameters, 1)


def full_precision_of(study: Study, rows: Sequence[TrialRow]) -> FullPrecision:
    """From the first evaluation that is there: all of them measured it on the same samples."""
    first = next((row.evaluation for row in rows if row.evaluation), None)
    metrics = first.results.get("metrics", []) if first else []
    weight_bytes = int((study.variant.manifest or {}).get("weight_bytes") or study.variant.size_bytes)
    figures = {one["name"]: one["values"][FULL] for one in metrics if FULL in one["values"]}
    return FullPrecision(study.variant, weight_bytes, figures)


def full_row(rows: Sequence[TrialRow]) -> list[Any]:
    """The figures of full precision, in the order of the table's metrics."""
    first = next((row for row in rows if row.evaluation), None)
    if first is None or first.evaluation is None:
        return [None] * len(SHOWN)
    at = list(first.evaluation.results.get("targets", [])).index(FULL)
    return [row.cells[at] if row else None for row in (first.metrics.get(name) for name in SHOWN)]


def points(rows: Sequence[TrialRow], *, whole_file: bool) -> list[BitsPoint]:
    """Where each measured way lies: bits of the linears or of the whole file, and its perplexity."""
    return [point for row in rows if (point := _point(row, whole_file)) is not None]


def _point(row: TrialRow, whole_file: bool) -> BitsPoint | None:
    value = _perplexity(row.evaluation)
    if row.artifact is None or value is None:
        return None
    bits = row.artifact.bits_per_weight if whole_file else row.linears_bits
    if bits is None or not bits > 0:
        return None
    return BitsPoint(
        label=row.label,
        family=method_label(row.trial.method),
        bits=bits,
        value=value["value"],
        low=value.get("low"),
        high=value.get("high"),
        href=reverse("artifact-detail", args=[row.artifact.pk]),
    )


def _perplexity(evaluation: Evaluation | None) -> Mapping[str, Any] | None:
    metrics = evaluation.results.get("metrics", []) if evaluation else []
    found = next((one["values"].get(COMPRESSED) for one in metrics if one["name"] == "perplexity"), None)
    usable = found and found.get("value") is not None and math.isfinite(found["value"]) and found["value"] > 0
    return found if usable else None


def base_note(rows: Sequence[TrialRow]) -> str:
    """What bits of a difference leave out, where a picture holds one."""
    names = sorted({method_label(row.trial.method) for row in rows if row.needs_base and row.evaluation})
    if not names:
        return ""
    return _("%(methods)s: only the difference is counted, and not the base that it needs beside it.") % {
        "methods": ", ".join(names)
    }


def studies_of(checkpoint: Checkpoint) -> QuerySet[Study]:
    return checkpoint.studies.select_related("created_by").order_by("-pk")[:10]
