"""Importing a checkpoint, withdrawing an artifact."""

from __future__ import annotations

from typing import Any

from django import forms
from django.utils.translation import gettext_lazy as _

from dashboard.models import Checkpoint, Job
from dashboard.services.registry import import_folders


class ImportForm(forms.Form):
    """A folder is chosen from what the import roots list; nobody types a path."""

    folder = forms.ChoiceField(
        label=_("Folder"),
        help_text=_(
            "Folders in the import roots of this installation: config, tokenizer, safetensors; or a PEFT adapter."
        ),
    )
    name = forms.SlugField(
        label=_("Name"),
        max_length=100,
        help_text=_("Letters, digits, hyphens and underscores. It cannot change later."),
    )
    base = forms.ModelChoiceField(
        Checkpoint.objects.none(),
        label=_("Base model"),
        required=False,
        empty_label=_("none: this is a base model itself"),
        help_text=_(
            "For a fine-tuned variant: the model that it was tuned from. Tensors are paired by name and shape. "
            "An adapter is merged into it."
        ),
    )
    licence = forms.CharField(
        label=_("Licence"),
        max_length=100,
        required=False,
        help_text=_("For example Apache-2.0, as its publisher says."),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        folders = import_folders()
        groups = [(root, [(f"{root}/{name}", name) for name in names]) for root, names in folders.items() if names]
        self.fields["folder"].choices = [("", _("choose a folder")), *groups]  # type: ignore[attr-defined]
        self.fields["base"].queryset = Checkpoint.objects.filter(base=None)  # type: ignore[attr-defined]
        self.has_folders = bool(groups)

    def clean_folder(self) -> tuple[str, str]:
        root, _slash, folder = self.cleaned_data["folder"].partition("/")
        return root, folder


def import_initial(job: Job | None) -> dict[str, Any]:
    """What the form of a former import said, to begin again from."""
    spec = (job.spec if job else None) or {}
    return {
        "folder": f"{spec['root']}/{spec['folder']}" if "folder" in spec else None,
        **{name: spec.get(name) for name in ("name", "base", "licence")},
    }


class RetireForm(forms.Form):
    reason = forms.CharField(label=_("Reason"), max_length=2000, widget=forms.Textarea(attrs={"rows": 2}))
