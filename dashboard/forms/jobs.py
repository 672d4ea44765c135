"""The form of a new compression job, made from the method's config."""

from __future__ import annotations

from typing import Any

from django import forms
from django.urls import reverse
from django.utils.translation import gettext_lazy as _

from compression_worker.catalog import METHODS
from dashboard.forms.config import ConfigForm, as_data, check_config
from dashboard.lifecycle import JobKind, JobState
from dashboard.models import Checkpoint, Job, Priority, SampleSet
from dashboard.selectors.evaluations import sample_set_choices
from dashboard.selectors.jobs import STATE_FILTERS
from dashboard.selectors.preflight import Preflight, compression_inputs, compression_preflight
from dashboard.selectors.registry import checkpoint_numbered
from dashboard.selectors.sizes import compressible

SHARED_NAMES = ("variant", "calibration_set", "seed", "priority", "queue")
"""What stays as it is when another method is chosen: everything that is no method's own setting."""


class MethodForm(ConfigForm):
    """What to compress, the method's own settings, the seed, and when it runs."""

    subject = _("What to compress")
    folded_names = frozenset({"seed"})

    variant = forms.ModelChoiceField(
        Checkpoint.objects.none(),
        label=_("Variant"),
        empty_label=_("choose a variant"),
        help_text=_("The fine-tuned model to compress against its base."),
    )
    calibration_set = forms.ModelChoiceField(
        SampleSet.objects.none(),
        label=_("Calibration text"),
        required=False,
        empty_label=_("none"),
        help_text=_("Text that the method reads. Use text like that of the model's work, never the test set."),
    )
    seed = forms.IntegerField(
        label=_("Seed"), initial=0, min_value=0, help_text=_("Same inputs, same seed: same bytes.")
    )
    priority = forms.TypedChoiceField(
        label=_("Priority"),
        coerce=int,
        initial=Priority.NORMAL,
        choices=Priority.choices,
        help_text=_("Urgent jobs are claimed before all others, those for idle hours after them."),
    )

    def __init__(self, *args: Any, method: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        tail = {name: self.fields.pop(name) for name in ("seed", "priority")}
        self.add_config(METHODS[method].config_class())
        self.fields.update(tail)
        self.add_queue()
        present = self.initial.get("priority")
        if present not in (None, *Priority.values):
            self.fields["priority"].choices = [*Priority.choices, (present, f"{present}")]  # type: ignore[attr-defined]
        self._choose_among(method)
        self.fields["calibration_set"].queryset = sample_set_choices("text")  # type: ignore[attr-defined]

    def _choose_among(self, method: str) -> None:
        """What may be compressed; another choice may leave other methods that fit, so their cards are asked for."""
        field = self.fields["variant"]
        field.queryset = compressible(method)  # type: ignore[attr-defined]
        if not METHODS[method].needs_base:
            field.label, field.empty_label = _("Model"), _("choose a model")  # type: ignore[attr-defined]
            field.help_text = _("A base model or a variant: it is compressed by itself.")
        field.widget.attrs |= {
            "hx-get": reverse("job-create", args=[method]),
            "hx-include": "#job-form",
            "hx-params": ",".join(SHARED_NAMES),
            "hx-target": "#methods",
            "hx-select": "#methods",
            "hx-swap": "outerHTML",
        }

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What is chosen as the form stands, sound or not."""
        return checkpoint_numbered(str(self["variant"].value() or ""))

    def clean(self) -> dict[str, Any]:
        config = check_config(self, self.config, self.config_names)
        values = self.cleaned_data
        if config is not None and "calibration_set" not in self.errors and not values.get("calibration_set"):
            if values.get("distill_steps"):
                self.add_error(
                    "calibration_set", _("Distillation reads text: choose a set, or set the distillation steps to 0.")
                )
            elif getattr(config, "calibrates", False):
                self.add_error("calibration_set", _("With these settings the method reads text: choose a set."))
        return values

    def preflight(self) -> Preflight | None:
        """What the job would need as the form stands; None while variant or settings are not sound."""
        self.is_valid()
        values = self.cleaned_data
        if "variant" not in values or not self.config_names <= values.keys():
            return None
        inputs = compression_inputs(self.method, values["variant"], values.get("calibration_set"))
        return compression_preflight(self.method, self.config(**self.config_values), inputs, self.queue)


def clone_initial(job: Job) -> dict[str, Any]:
    """What the form of ``job`` said, to start a changed copy from."""
    spec = job.spec or {}
    return {
        "variant": job.variant_id,
        "calibration_set": spec.get("calibration"),
        "seed": spec.get("seed", 0),
        "priority": job.priority,
        "queue": job.queue,
        **(spec.get("config") or {}),
    }


def shared_values(form: MethodForm) -> dict[str, Any]:
    """What the form says that any other method's form would also ask."""
    return {name: value for name, value in as_data(form).items() if name in SHARED_NAMES}


class JobFilterForm(forms.Form):
    """The filters of the job list; whatever it does not know is ignored."""

    q = forms.CharField(label=_("Search"), required=False, max_length=200)
    state = forms.ChoiceField(label=_("State"), required=False)
    kind = forms.ChoiceField(label=_("Kind"), required=False, choices=[("", _("all")), *JobKind.choices])
    before = forms.IntegerField(required=False, widget=forms.HiddenInput, min_value=1, max_value=2**62)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        named = {"active": _("unfinished"), "finished": _("finished")}
        choices = [(key, named.get(key) or JobState(key).label) for key in STATE_FILTERS]
        self.fields["state"].choices = [("", _("all")), *choices]  # type: ignore[attr-defined]

    @property
    def values(self) -> dict[str, Any]:
        """The filters that are well-formed."""
        self.is_valid()
        return self.cleaned_data
