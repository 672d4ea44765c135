"""The form of a new study: a model, ways of compressing it, the text they read, what all of them are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django import forms
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from compression_worker.evaluation.config import EvaluationConfig
from dashboard.forms.config import ConfigForm, Section, check_config
from dashboard.models import Checkpoint, Priority, SampleSet
from dashboard.models.evaluations import SampleKind
from dashboard.selectors.evaluations import sample_set_choices
from dashboard.selectors.registry import checkpoint_numbered
from dashboard.selectors.sizes import Card, method_families
from dashboard.selectors.trials import WIDTHS, StudyForecast, Way, study_forecast, ways_for, ways_of


@dataclass(frozen=True)
class Line:
    """A method in the table of ways: a box for each width that it allows, or one over all of them."""

    card: Card
    boxes: list[tuple[Way | None, bool]]

    @property
    def is_whole(self) -> bool:
        """Whether the method has no choice of bits."""
        return len(self.boxes) == 1


class WaysField(forms.MultipleChoiceField):
    """Ways of compressing, each as its key; ``gptq:4``."""

    def clean(self, value: Any) -> list[Way]:
        keys: list[str] = super().clean(value)
        known = {way.key: way for way in ways_for(None)}
        return [known[key] for key in known if key in keys]


class StudyForm(ConfigForm):
    """Which ways fit depends on the model: those that do not are not offered, and refused where they are sent."""

    variant = forms.ModelChoiceField(
        Checkpoint.objects.order_by("name"),
        label=gettext_lazy("Model"),
        empty_label=gettext_lazy("choose a model"),
        help_text=gettext_lazy("A base model or a variant. A variant can also be compressed against its base."),
    )
    ways = WaysField(
        label=gettext_lazy("Methods and bits"),
        error_messages={"required": gettext_lazy("Choose at least one way of compressing.")},
    )
    calibration = forms.ModelChoiceField(
        SampleSet.objects.none(),
        label=gettext_lazy("Calibration text"),
        required=False,
        empty_label=gettext_lazy("none"),
        help_text=gettext_lazy("Text that methods read. Use text like that of the model's work, never the test set."),
    )
    training_tokens = forms.IntegerField(
        label=gettext_lazy("Training tokens"),
        required=False,
        min_value=1,
        max_value=1 << 40,
        help_text=gettext_lazy(
            "For methods that train on the calibration text, such as INT2.1; others ignore it. Empty: each method's "
            "own number, which is hours of work without a GPU."
        ),
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
    priority = forms.TypedChoiceField(
        label=gettext_lazy("Priority"),
        coerce=int,
        initial=Priority.NORMAL,
        choices=Priority.choices,
        help_text=gettext_lazy("Urgent jobs are claimed before all others, those for idle hours after them."),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_config(EvaluationConfig)
        self.add_queue()
        self.fields["ways"].choices = [(way.key, way.label) for way in ways_for(None)]  # type: ignore[attr-defined]
        self.fields["calibration"].queryset = sample_set_choices(SampleKind.TEXT)  # type: ignore[attr-defined]
        self.fields["text_set"].queryset = sample_set_choices(SampleKind.TEXT)  # type: ignore[attr-defined]
        self.fields["choice_set"].queryset = sample_set_choices(SampleKind.CHOICE)  # type: ignore[attr-defined]
        self.fields["variant"].widget.attrs |= {
            "hx-get": reverse("study-new"),
            "hx-include": "#job-form",
            "hx-params": "variant,ways",
            "hx-target": "#ways",
            "hx-select": "#ways",
            "hx-swap": "outerHTML",
        }

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What is chosen as the form stands, sound or not."""
        return checkpoint_numbered(str(self["variant"].value() or ""))

    @property
    def widths(self) -> tuple[int, ...]:
        return WIDTHS

    def families(self) -> list[tuple[str, list[Line]]]:
        """The lines of the table, by what methods compress; those that do not fit the model are left out."""
        chosen = set(self["ways"].value() or [])
        return [
            (family.title, [_line(card, chosen) for card in family.cards])
            for family in method_families(self.checkpoint)
        ]

    def parts(self) -> dict[str, list[Section]]:
        """Fields before and after the table of ways; all settings of the evaluations are folded."""
        subject = Section("subject", _("What to compress"), self._bound(["variant", "calibration"]))
        training = Section("training", _("Methods that train"), self._bound(["training_tokens"]))
        measured = Section("measured", _("What to measure all of them on"), self._bound(["text_set", "choice_set"]))
        names = [name for name in self.fields if name in self.config_names]
        folded = Section("more", _("Settings of the evaluations"), self._bound(names), True, self._deserves(names, {}))
        queueing = [name for name in self.queueing_names if name in self.fields]
        last = Section("queueing", _("When and where it runs"), self._bound(queueing))
        return {"before": [subject], "after": [training, measured, folded, last]}

    def clean(self) -> dict[str, Any]:
        check_config(self, EvaluationConfig, self.config_names)
        values = self.cleaned_data
        checkpoint, ways = values.get("variant"), values.get("ways") or []
        if checkpoint and (wrong := [way for way in ways if way not in ways_for(checkpoint)]):
            words = {"way": wrong[0].label, "name": checkpoint.name}
            self.add_error("ways", _("%(way)s needs a base, and '%(name)s' has none.") % words)
        readers = [way for way in ways if way.reads_text]
        if readers and not values.get("calibration") and "calibration" not in self.errors:
            self.add_error("calibration", _("%(way)s reads text: choose a set.") % {"way": readers[0].label})
        if not values.get("text_set") and not values.get("choice_set"):
            self.add_error("text_set", _("Choose a text set, a multiple-choice set, or both."))
        return values

    def forecast(self) -> StudyForecast | None:
        """What the study would need as the form stands; None while model, ways or settings are not sound."""
        self.is_valid()
        values = self.cleaned_data
        if not values.get("variant") or not values.get("ways") or not self.config_names <= values.keys():
            return None
        return study_forecast(
            values["variant"],
            values["ways"],
            calibration=values.get("calibration"),
            sets=(values.get("text_set"), values.get("choice_set")),
            config=EvaluationConfig(**self.config_values),
            queue=self.queue,
            tokens=values.get("training_tokens"),
        )


def _line(card: Card, chosen: set[str]) -> Line:
    ways = ways_of(card.name)
    if ways[0].bits is None:
        return Line(card, [(ways[0], ways[0].key in chosen)])
    by_width = {way.bits: way for way in ways}
    found = [by_width.get(width) for width in WIDTHS]
    return Line(card, [(way, way is not None and way.key in chosen) for way in found])
