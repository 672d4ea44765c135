"""What came of a job, in words: its result, or a failure card that says what, where and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext as translated
from django.utils.translation import gettext_lazy

from compression_worker.catalog import METHODS
from compression_worker.evaluation.config import EvaluationConfig
from dashboard.lifecycle import JobKind, JobState
from dashboard.models import Artifact, Checkpoint, Evaluation, Job, RollbackCertificate, SampleSet, Step
from dashboard.selectors.failure_cards import FailureCard, failure_card


@dataclass(frozen=True)
class Outcome:
    """A card. ``href`` leads on to the result; ``card`` says the cause of what went wrong, and what to try."""

    tone: str
    title: str
    text: str = ""
    where: str = ""
    advice: str = ""
    href: str = ""
    href_label: str = ""
    card: FailureCard | None = None


def job_outcome(job: Job, steps: Sequence[Step]) -> Outcome | None:
    if job.state == JobState.SUCCEEDED:
        return _result(job)
    card = failure_card(job, steps)
    if card is None:
        return None
    words = {
        JobState.FAILED: ("bad", _("The job says no")),
        JobState.DEAD: ("bad", _("The job broke")),
        JobState.CANCELLED: ("caution", _("Stopped by a person")),
        JobState.BLOCKED: ("caution", _("Waiting")),
    }
    tone, title = words[JobState(job.state)]
    text = job.get_blocked_reason_display() if job.state == JobState.BLOCKED else job.error
    return Outcome(tone, title, text, _where(card.step), _advice(job), card=card)


def _where(step: Step | None) -> str:
    return _("in step %(number)s, %(name)s") % {"number": step.index + 1, "name": step.name} if step else ""


def _advice(job: Job) -> str:
    if job.state == JobState.CANCELLED:
        return ""
    if job.state == JobState.BLOCKED:
        return _("It goes on by itself as soon as that changes.")
    if job.state == JobState.DEAD:
        return _("The same step broke three times. Read the log, then try again or report the error.")
    match JobKind(job.kind):
        case JobKind.IMPORT:
            return _("Nothing was imported. Put the folder right, then retry.")
        case JobKind.COMPRESS:
            return _("Change what it names, then clone the job; finished steps are reused where they still fit.")
        case JobKind.EVALUATE:
            return _("Change the set or the settings, then ask again.")
        case JobKind.ESCROW:
            return _("Nothing was given up: the variant's own weights stay. Put right what it names, then retry.")
        case JobKind.RESTORE:
            return _("The escrow stays as it is. Put right what it names, then retry.")
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
        case JobKind.ESCROW | JobKind.RESTORE:
            if job.variant:
                return _good(job.variant.name, "checkpoint-detail", job.variant.name, _("Open the checkpoint"))
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
    shown += config_pairs(_config_class(job), _config(job))
    for key, label in _SETS:
        found = SampleSet.objects.filter(pk=spec[key]).first() if spec.get(key) else None
        if found:
            shown.append((str(label), str(found)))
    if job.kind == JobKind.COMPRESS:
        shown.append((_("Seed"), str(spec.get("seed", 0))))
    return shown


_SETS = (
    ("calibration", gettext_lazy("Calibration text")),
    ("text_set", gettext_lazy("Text set")),
    ("choice_set", gettext_lazy("Multiple-choice set")),
)


def clone_changes(job: Job) -> list[tuple[str, str, str]]:
    """What a clone changed: (label, before, after)."""
    if job.cloned_from is None:
        return []
    kind = _config_class(job)
    before, after = dict(config_pairs(kind, _config(job.cloned_from))), dict(config_pairs(kind, _config(job)))
    return [(label, before.get(label, "–"), value) for label, value in after.items() if before.get(label) != value]


def artifact_settings(artifact: Artifact) -> list[tuple[str, str]]:
    """The settings that an artifact was made with."""
    return config_pairs(_class_of_method(artifact.method), artifact.config)


def config_pairs(kind: type[Any] | None, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) in the order of the form, which a JSON column does not keep; unknown settings come last."""
    known = {one.name: one for one in fields(kind)} if kind else {}
    labels = {name: translated(config_label(one)) for name, one in known.items()}
    names = [*(name for name in labels if name in config), *sorted(set(config) - set(labels))]
    return [(labels.get(name, name), _setting_words(known.get(name), config[name])) for name in names]


def _setting_words(field: Field[Any] | None, value: object) -> str:
    """A setting's value; of an optional one that is not given, what that means."""
    if value is None and field is not None and field.metadata.get("empty"):
        return translated(field.metadata["empty"])
    return _written(value)


def config_label(field: Field[Any]) -> str:
    """The label of a setting, in English: from its metadata, or from its name."""
    return str(field.metadata.get("label") or field.name.replace("_", " ").capitalize())


def _config_class(job: Job) -> type[Any] | None:
    return EvaluationConfig if job.kind == JobKind.EVALUATE else _class_of_method(job.method)


def _class_of_method(name: str) -> type[Any] | None:
    return METHODS[name].config_class() if name in METHODS else None


def _config(job: Job) -> dict[str, Any]:
    config = (job.spec or {}).get("config")
    return dict(config) if isinstance(config, dict) else {}


def _written(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return _("yes") if value else _("no")
    lines = value if isinstance(value, list) else str(value).splitlines()
    return " · ".join(str(one) for one in lines)
