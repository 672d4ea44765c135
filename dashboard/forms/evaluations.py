"""Uploading a sample set, asking for an evaluation."""

from __future__ import annotations

from typing import Any

from django import forms
from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from compression_worker.evaluation.config import EvaluationConfig
from dashboard.formats import byte_words
from dashboard.forms.config import ConfigForm, check_config
from dashboard.lifecycle import ArtifactState
from dashboard.models import Artifact, Checkpoint, Job, SampleSet
from dashboard.models.evaluations import SampleKind
from dashboard.selectors.evaluations import sample_set_choices
from dashboard.selectors.preflight import Preflight, evaluation_inputs, evaluation_preflight


class SampleSetForm(forms.Form):
    name = forms.SlugField(
        label=gettext_lazy("Name"), max_length=100, help_text=gettext_lazy("A name that exists gets a new version.")
    )
    kind = forms.ChoiceField(
        label=gettext_lazy("Kind"),
        choices=SampleKind.choices,
        help_text=gettext_lazy("Text measures perplexity and fidelity; multiple choice measures accuracy."),
    )
    file = forms.FileField(
        label=gettext_lazy("File"),
        help_text=gettext_lazy(
            "UTF-8. Text: TXT, or JSONL with “text”. Multiple choice: JSONL with question, choices, answer."
        ),
    )
    origin = forms.CharField(
        label=gettext_lazy("Origin"),
        max_length=200,
        required=False,
        help_text=gettext_lazy("Where the samples come from, and their licence."),
    )

    def clean_file(self) -> UploadedFile[bytes]:
        file: UploadedFile[bytes] = self.cleaned_data["file"]
        if (file.size or 0) > settings.UPLOAD_LIMIT_BYTES:
            raise forms.ValidationError(
                _("The file has %(size)s; at most %(limit)s are allowed. Split it, or take fewer samples.")
                % {"size": byte_words(file.size), "limit": byte_words(settings.UPLOAD_LIMIT_BYTES)}
            )
        return file


class TargetField(forms.ChoiceField):
    """An artifact (``a7``) or an uncompressed variant (``c3``)."""

    def clean(self, value: Any) -> tuple[Checkpoint, Artifact | None]:
        chosen = super().clean(value)
        kind, number = chosen[:1], int(chosen[1:])
        if kind == "a":
            artifact = Artifact.objects.select_related("variant").get(pk=number)
            return artifact.variant, artifact
        return Checkpoint.objects.get(pk=number), None


class EvaluationForm(ConfigForm):
    subject = gettext_lazy("What to measure")

    target = TargetField(
        label=gettext_lazy("Evaluate"),
        help_text=gettext_lazy("An artifact is measured beside what it was made from, on the same samples."),
    )
    text_set = forms.ModelChoiceField(
        SampleSet.objects.none(),
        label=gettext_lazy("Text set"),
        required=False,
        empty_label=gettext_lazy("none"),
        help_text=gettext_lazy("For perplexity, KL divergence and top-1 agreement."),
    )
    choice_set = forms.ModelChoiceField(
        SampleSet.objects.none(),
        label=gettext_lazy("Multiple-choice set"),
        required=False,
        empty_label=gettext_lazy("none"),
        help_text=gettext_lazy("For choice accuracy and flips."),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_config(EvaluationConfig)
        self.add_queue()
        self.fields["target"].choices = _targets()  # type: ignore[attr-defined]
        self.fields["text_set"].queryset = sample_set_choices(SampleKind.TEXT)  # type: ignore[attr-defined]
        self.fields["choice_set"].queryset = sample_set_choices(SampleKind.CHOICE)  # type: ignore[attr-defined]

    def clean(self) -> dict[str, Any]:
        check_config(self, EvaluationConfig, self.config_names)
        values = self.cleaned_data
        if not values.get("text_set") and not values.get("choice_set") and not self.errors:
            self.add_error("text_set", _("Choose a text set, a multiple-choice set, or both."))
        return values

    def preflight(self) -> Preflight | None:
        """What the measurement would need as the form stands; None while target or settings are not sound."""
        self.is_valid()
        values = self.cleaned_data
        if "target" not in values or not self.config_names <= values.keys():
            return None
        variant, artifact = values["target"]
        inputs = evaluation_inputs(variant, artifact, values.get("text_set"), values.get("choice_set"))
        return evaluation_preflight(EvaluationConfig(**self.config_values), inputs, self.queue)


def evaluation_initial(job: Job) -> dict[str, Any]:
    """What the form of ``job`` said, to start a changed copy from."""
    spec = job.spec or {}
    artifact = spec.get("artifact")
    return {
        "target": f"a{artifact}" if artifact else f"c{job.variant_id}",
        "text_set": spec.get("text_set"),
        "choice_set": spec.get("choice_set"),
        "queue": job.queue,
        **(spec.get("config") or {}),
    }


def _targets() -> list[tuple[str, Any]]:
    artifacts = Artifact.objects.filter(state=ArtifactState.PUBLISHED).select_related("variant")
    checkpoints = Checkpoint.objects.order_by("name")
    return [
        ("", _("choose what to measure")),
        (_("Artifacts"), [(f"a{one.pk}", f"{one.name} · {one.variant.name}") for one in artifacts]),
        (_("Uncompressed"), [(f"c{one.pk}", one.name) for one in checkpoints]),
    ]
