"""Form fields made from a config dataclass: type, default, label, help and choices come from its code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

from django import forms
from django.utils.translation import gettext as translated
from django.utils.translation import gettext_lazy as _

from compression_worker.contracts import CompressionError
from dashboard.selectors.outcomes import config_label
from dashboard.selectors.queues import default_queue, offered_queues

LONG_TEXT = frozenset({"prompts"})


def config_fields(config: type[Any], *, leave_out: frozenset[str] = frozenset()) -> dict[str, forms.Field]:
    """One form field for each field of ``config``, in its order."""
    return {one.name: _field(one) for one in fields(config) if one.init and one.name not in leave_out}


def _field(one: Field[Any]) -> forms.Field:
    words = one.metadata
    common: dict[str, Any] = {
        "label": translated(config_label(one)),
        "help_text": translated(words["help"]) if words.get("help") else "",
        "initial": one.default,
        "required": one.default != "",
    }
    if words.get("choices"):
        return forms.ChoiceField(choices=[(choice, choice) for choice in words["choices"]], **common)
    match one.type:
        case "bool":
            return forms.BooleanField(**common | {"required": False})
        case "int":
            return forms.IntegerField(**common)
        case "float":
            return forms.FloatField(widget=forms.NumberInput(attrs={"step": "any"}), **common)
    widget = forms.Textarea(attrs={"rows": 4}) if one.name in LONG_TEXT else forms.TextInput()
    return forms.CharField(widget=widget, **common)


class ConfigForm(forms.Form):
    """A form that holds the fields of a config dataclass, and a queue where there is a choice of one."""

    config_names: set[str]

    def add_queue(self) -> None:
        queues = offered_queues()
        if len(queues) > 1:
            self.fields["queue"] = queue_field(queues, default_queue())

    @property
    def config_values(self) -> dict[str, Any]:
        return {name: self.cleaned_data[name] for name in self.fields if name in self.config_names}

    @property
    def queue(self) -> str:
        return self.cleaned_data.get("queue") or default_queue()


def queue_field(queues: list[str], chosen: str) -> forms.ChoiceField:
    """Where the steps go that hold whole models; the others always go to workers without a GPU."""
    return forms.ChoiceField(
        label=_("Queue"),
        choices=[(name, name) for name in queues],
        initial=chosen,
        help_text=_("Where the steps go that load whole models. Copying and hashing is done in the queue cpu."),
    )


def change_marks(form: forms.Form, before: Mapping[str, Any]) -> dict[str, str]:
    """Field -> what it was before, for those that begin with another value than a former job had."""
    marks = {}
    for name in form.fields:
        present = form[name].value()
        if name in before and _plain(present) != _plain(before[name]):
            marks[name] = _plain(before[name]) or "–"
    return marks


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return "\n".join(str(one) for one in value)
    return "" if value is None else str(value)


def as_data(form: forms.Form) -> dict[str, Any]:
    """What a browser would send if the form were submitted as it stands."""
    values = {name: form[name].value() for name in form.fields}
    return {name: value for name, value in values.items() if value is not None and value is not False and value != ""}


def check_config(form: forms.Form, config: type[Any], names: set[str]) -> None:
    """Let the dataclass judge its own values; what it refuses stands beside the field that it names."""
    values = {name: form.cleaned_data[name] for name in names if name in form.cleaned_data}
    if len(values) < len(names):
        return
    try:
        config(**values)
    except CompressionError as error:
        form.add_error(_named(error.message, names), error.message)
    except (TypeError, ValueError) as error:
        form.add_error(_named(str(error), names), str(error))


def _named(message: str, names: set[str]) -> str | None:
    """The field that a message speaks of: the one it names first."""
    places = {name: found.start() for name in names if (found := re.search(rf"\b{re.escape(name)}\b", message))}
    return min(places, key=lambda name: places[name]) if places else None
