"""The form that frees what a preview of the store lists."""

from __future__ import annotations

from django import forms
from django.utils.translation import gettext_lazy as _


class SweepForm(forms.Form):
    reason = forms.CharField(
        label=_("Reason"),
        max_length=2000,
        widget=forms.Textarea(attrs={"rows": 2}),
        help_text=_("Kept in the history with your name."),
    )
