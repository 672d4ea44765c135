"""What came of a job, in words: its result, or a failure card that says what, where and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext as translated

from compression_worker.catalog import METHODS
from dashboard.lifecycle import JobKind, JobState, StepState
from dashboard.models import Artifact, Checkpoint, Evaluation, Job, RollbackCertificate, SampleSet, Step


@dataclass(frozen=True)
class Outcome:
    """A card. ``href`` leads on: to the result, or to the thing to change."""

    tone: str
    title: str
    text: str = ""
    where: str = ""
    advice: str = ""
    href: str = ""
    href_label: str = ""


def job_outcome(job: Job, steps: Sequence[Step]) -> Outcome | None:
    match job.state:
        case JobState.SUCCEEDED:
            return _result(job)
        case JobState.FAILED:
            return Outcome("bad", _("The job says no"), job.error, _where(steps), _advice(job))
        case JobState.DEAD:
            advice = _("The same step broke three times. Read the log, then try again or report the error.")
            return Outcome("bad", _("The job broke"), job.error, _where(steps), advice)
        case JobState.CANCELLED:
            advice = _("What was done is kept: a retry goes on from there.")
            return Outcome("caution", _("Stopped by a person"), job.error, advice=advice)
        case JobState.BLOCKED:
            advice = _("It goes on by itself as soon as that changes.")
            return Outcome("caution", _("Waiting"), job.get_blocked_reason_display(), advice=advice)
    return None


def _where(steps: Sequence[Step]) -> str:
    broken = next((step for step in steps if step.state in (StepState.FAILED, StepState.DEAD)), None)
    return _("in step %(number)s, %(name)s") % {"number": broken.index + 1, "name": broken.name} if broken else ""


def _advice(job: Job) -> str:
    match JobKind(job.kind):
        case JobKind.IMPORT:
            return _("Nothing was imported. Put the folder right, then retry.")
        case JobKind.COMPRESS:
            return _("Change what it names, then clone the job; finished steps are reused where they still fit.")
        case JobKind.EVALUATE:
            return _("Change the set or the settings, then ask again.")
        case JobKind.REHEARSE:
            return _("Without a rehearsed way back nothing can be deployed. Restore the checkpoint, then retry.")


def _result(job: Job) -> Outcome | None:
    match JobKind(job.kind):
        case JobKind.COMPRESS:
            artifact = Artifact.objects.filter(job=job).first()
            if artifact:
                return _good(artifact.name, "artifact-detail", artifact.pk, _("Open the artifact"))
        case JobKind.EVALUATE:
            evaluation = Evaluation.objects.filter(job=job).first()
            if evaluation:
                return _good(job.title, "evaluation-detail", evaluation.pk, _("Open the evaluation"))
        case JobKind.IMPORT:
            checkpoint = Checkpoint.objects.filter(job=job).first()
            if checkpoint:
                return _good(checkpoint.name, "checkpoint-detail", checkpoint.name, _("Open the checkpoint"))
        case JobKind.REHEARSE:
            certificate = RollbackCertificate.objects.filter(job=job).select_related("variant").first()
            if certificate:
                name = certificate.variant.name
                return _good(name, "checkpoint-detail", name, _("Open the checkpoint"))
    return None


def _good(text: str, route: str, key: object, label: str) -> Outcome:
    return Outcome("good", _("Done"), text, href=reverse(route, args=[key]), href_label=label)


def job_settings(job: Job) -> list[tuple[str, str]]:
    """What the form said, in its order and words."""
    spec = job.spec or {}
    shown: list[tuple[str, str]] = []
    if job.kind == JobKind.IMPORT:
        shown.append((_("Folder"), f"{spec.get('root', '')}/{spec.get('folder', '')}"))
        shown.append((_("Name"), str(spec.get("name", ""))))
    labels = _labels(job.method)
    shown += [(labels.get(name, name.replace("_", " ")), _written(value)) for name, value in _config(job).items()]
    for key, label in (
        ("calibration", _("Calibration text")),
        ("text_set", _("Text set")),
        ("choice_set", _("Multiple-choice set")),
    ):
        found = SampleSet.objects.filter(pk=spec[key]).first() if spec.get(key) else None
        if found:
            shown.append((label, str(found)))
    if job.kind == JobKind.COMPRESS:
        shown.append((_("Seed"), str(spec.get("seed", 0))))
    return shown


def clone_changes(job: Job) -> list[tuple[str, str, str]]:
    """What a clone changed: (label, before, after)."""
    if job.cloned_from is None:
        return []
    labels = _labels(job.method)
    before, after = _config(job.cloned_from), _config(job)
    return [
        (labels.get(name, name), _written(before.get(name)), _written(after.get(name)))
        for name in after
        if before.get(name) != after.get(name)
    ]


def _config(job: Job) -> dict[str, Any]:
    """In the order of the method's form: a JSON column keeps none."""
    config = (job.spec or {}).get("config")
    if not isinstance(config, dict):
        return {}
    known = [one.name for one in fields(METHODS[job.method].config_class())] if job.method in METHODS else []
    return {name: config[name] for name in [*known, *sorted(set(config) - set(known))] if name in config}


def _labels(method: str) -> dict[str, str]:
    if method not in METHODS:
        return {}
    return {
        one.name: translated(one.metadata["label"])
        for one in fields(METHODS[method].config_class())
        if one.metadata.get("label")
    }


def _written(value: object) -> str:
    if value is None or value == "":
        return "–"
    return ", ".join(str(one) for one in value) if isinstance(value, list) else str(value)
