"""Asking for approval, deciding, deploying, rolling back, and the policy. Each outward action needs its reason."""

from __future__ import annotations

from typing import Any

from django import forms
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from dashboard.models import Approval, Artifact, Checkpoint, Evaluation, Policy
from dashboard.selectors.environments import approvals_deployable
from dashboard.verdicts import SHARES, Check


def _reason(help_text: Any = "") -> forms.CharField:
    return forms.CharField(
        label=gettext_lazy("Reason"),
        max_length=2000,
        widget=forms.Textarea(attrs={"rows": 2}),
        help_text=help_text,
        error_messages={"required": gettext_lazy("Say why: the reason is kept in the history.")},
    )


class ReasonForm(forms.Form):
    reason = _reason(gettext_lazy("Kept in the history with your name."))


class RequestForm(forms.Form):
    """Which evaluation the request rests on."""

    evaluation = forms.ModelChoiceField(Evaluation.objects.none(), label=gettext_lazy("Evaluation"), empty_label=None)
    note = forms.CharField(
        label=gettext_lazy("Note for the approver"),
        max_length=2000,
        required=False,
        widget=forms.Textarea(attrs={"rows": 3}),
        help_text=gettext_lazy("What it is for, what to look at."),
    )

    def __init__(self, *args: Any, artifact: Artifact, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        found = artifact.evaluations.select_related("text_set", "choice_set").order_by("-created_at")
        self.fields["evaluation"].queryset = found  # type: ignore[attr-defined]
        self.fields["evaluation"].label_from_instance = evaluation_label  # type: ignore[attr-defined]


def evaluation_label(evaluation: Evaluation) -> str:
    sets = " · ".join(str(one) for one in (evaluation.text_set, evaluation.choice_set) if one)
    return f"#{evaluation.pk} · {sets}"


class DecisionForm(forms.Form):
    decision = forms.ChoiceField(choices=[("approve", "approve"), ("reject", "reject")], widget=forms.HiddenInput)
    reason = _reason(gettext_lazy("The person who asked reads it, and so will whoever asks why in a year."))


class GenerationForm(forms.Form):
    """Holds the generation that the person saw, so that nobody overrides a change they did not know of."""

    seen_generation = forms.IntegerField(widget=forms.HiddenInput, min_value=0)


class DeployForm(GenerationForm):
    approval = forms.ModelChoiceField(
        Approval.objects.none(),
        label=gettext_lazy("Approved artifact"),
        empty_label=gettext_lazy("choose an approved artifact"),
    )
    reason = _reason()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["approval"].queryset = approvals_deployable()  # type: ignore[attr-defined]
        self.fields["approval"].label_from_instance = approval_label  # type: ignore[attr-defined]


def approval_label(approval: Approval) -> str:
    return _("%(artifact)s, approval %(number)s by %(who)s") % {
        "artifact": approval.artifact.name,
        "number": approval.pk,
        "who": approval.decided_by,
    }


class FullPrecisionForm(GenerationForm):
    variant = forms.ModelChoiceField(
        Checkpoint.objects.none(), label=gettext_lazy("Model"), empty_label=gettext_lazy("choose a model")
    )
    reason = _reason()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["variant"].queryset = Checkpoint.objects.order_by("name")  # type: ignore[attr-defined]


class RollbackForm(GenerationForm):
    reason = _reason(gettext_lazy("A few words are enough: “refusals up”. It moves at once."))


SEVERITIES = [("", gettext_lazy("not checked")), ("warn", gettext_lazy("warns")), ("block", gettext_lazy("blocks"))]


class PolicyForm(forms.Form):
    """A limit and a severity for each check; shares are typed as percentages."""

    def __init__(self, *args: Any, policy: Policy | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rules = {rule.get("check"): rule for rule in (policy.rules if policy else [])}
        for check in Check:
            rule = rules.get(check.value, {})
            limit = rule.get("limit")
            shown = None if limit is None else round(limit * 100, 6) if check in SHARES else limit
            unit = " (%)" if check in SHARES else ""
            self.fields[f"{check.value}_limit"] = forms.FloatField(
                label=f"{check.label}{unit}",
                required=False,
                initial=shown,
                min_value=0,
                widget=forms.NumberInput(attrs={"step": "any"}),
            )
            self.fields[f"{check.value}_severity"] = forms.ChoiceField(
                label=_("When it is not met"), required=False, choices=SEVERITIES, initial=rule.get("severity", "")
            )

    def clean(self) -> dict[str, Any]:
        for check in Check:
            severity = self.cleaned_data.get(f"{check.value}_severity")
            if severity and self.cleaned_data.get(f"{check.value}_limit") is None:
                self.add_error(f"{check.value}_limit", _("Give a limit, or do not check it."))
        return self.cleaned_data

    @property
    def rules(self) -> list[dict[str, Any]]:
        found = []
        for check in Check:
            severity = self.cleaned_data.get(f"{check.value}_severity")
            if severity:
                limit = self.cleaned_data[f"{check.value}_limit"]
                scaled = limit / 100 if check in SHARES else limit
                found.append({"check": check.value, "limit": scaled, "severity": severity})
        return found

    @property
    def pairs(self) -> list[tuple[forms.BoundField, forms.BoundField]]:
        return [(self[f"{check.value}_limit"], self[f"{check.value}_severity"]) for check in Check]
