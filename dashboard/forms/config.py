"""Form fields made from a config dataclass: type, default, label, help and choices come from its code.

What a field's metadata may say: ``label`` and ``help``; ``choices``; ``group``, the legend under which it stands;
``advanced``, so that it is folded away under 'More settings'; ``empty``, what it means that an optional number is not
given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from django import forms
from django.utils.html import format_html
from django.utils.translation import gettext
from django.utils.translation import gettext as translated
from django.utils.translation import gettext_lazy as _

from compression_worker.contracts import CompressionError
from compression_worker.settings import kind_of
from dashboard.selectors.outcomes import config_label
from dashboard.selectors.queues import default_queue, offered_queues

LONG_TEXT = frozenset({"prompts"})


def config_fields(config: type[Any], *, leave_out: frozenset[str] = frozenset()) -> dict[str, forms.Field]:
    """One form field for each field of ``config``, in its order."""
    return {one.name: _field(one) for one in fields(config) if one.init and one.name not in leave_out}


def _field(one: Field[Any]) -> forms.Field:
    kind, is_optional = kind_of(one)
    empty = translated(one.metadata["empty"]) if one.metadata.get("empty") else gettext("not set")
    common: dict[str, Any] = {
        "label": translated(config_label(one)),
        "help_text": _help(one, empty),
        "initial": one.default,
        "required": one.default != "" and not is_optional,
    }
    if one.metadata.get("choices"):
        return _choice(one, kind, empty if is_optional else "", common)
    attributes = {"placeholder": empty} if is_optional else {}
    if kind is bool:
        return forms.BooleanField(**common | {"required": False})
    if kind is int:
        return forms.IntegerField(widget=forms.NumberInput(attrs=attributes), **common)
    if kind is float:
        return forms.FloatField(widget=forms.NumberInput(attrs={"step": "any", **attributes}), **common)
    widget = forms.Textarea(attrs={"rows": 4}) if one.name in LONG_TEXT else forms.TextInput(attrs=attributes)
    return forms.CharField(widget=widget, empty_value=None if is_optional else "", **common)


def _choice(one: Field[Any], kind: type[Any], empty: str, common: Mapping[str, Any]) -> forms.Field:
    choices = [(choice, choice) for choice in one.metadata["choices"]]
    if empty:
        choices.insert(0, ("", empty))
    return forms.TypedChoiceField(
        choices=choices, coerce=lambda text: kind(text), empty_value=None if empty else "", **common
    )


def _help(one: Field[Any], empty: str) -> str:
    """What the setting does, and what it is when nobody touches it."""
    words = translated(one.metadata["help"]) if one.metadata.get("help") else ""
    default = default_words(one.default, empty)
    if not default:
        return words
    said = gettext("Default: %(value)s") % {"value": default}
    return format_html('{} <span class="default">{}</span>', words, said)


def default_words(value: object, empty: str) -> str:
    """A default as a person reads it; nothing for a text that is empty."""
    if value is None:
        return empty
    if isinstance(value, bool):
        return gettext("yes") if value else gettext("no")
    return str(value)


@dataclass(frozen=True)
class Section:
    """Fields that belong together. A ``folded`` one is closed until something in it deserves a look."""

    name: str
    legend: str
    fields: list[forms.BoundField]
    folded: bool = False
    is_open: bool = False


class ConfigForm(forms.Form):
    """A form that holds the fields of a config dataclass, and a queue where there is a choice of one."""

    config: type[Any]
    config_names: set[str]
    subject = _("What to work on")
    folded_names: frozenset[str] = frozenset()
    """Fields of the form itself that are folded away beside the advanced settings."""
    queueing_names: tuple[str, ...] = ("priority", "queue")

    def add_config(self, config: type[Any]) -> None:
        made = config_fields(config)
        self.config, self.config_names = config, set(made)
        self.fields.update(made)
        self._fill_in(made)

    def _fill_in(self, made: Mapping[str, forms.Field]) -> None:
        """A page that was opened before an upgrade does not ask for newer settings: they stay at their defaults."""
        absent = {
            name: field.initial
            for name, field in made.items()
            if name not in self.data and not isinstance(field, forms.BooleanField) and field.initial is not None
        }
        if self.is_bound and absent:
            data: Any = self.data.copy()  # type: ignore[attr-defined]
            for name, value in absent.items():
                data[name] = value
            self.data = data

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

    def sections(self, marks: Mapping[str, str]) -> list[Section]:
        """The fields as a person meets them: the subject, the settings by group, the rest of them folded, the queue.

        ``marks``: fields that must be seen, because they differ from those of a former job.
        """
        advanced = {one.name for one in fields(self.config) if one.metadata.get("advanced")} | self.folded_names
        own = [name for name in self.fields if name not in {*self.config_names, *advanced, *self.queueing_names}]
        groups: dict[str, list[str]] = {}
        for one in fields(self.config):
            if one.name in self.config_names and one.name not in advanced:
                groups.setdefault(one.metadata.get("group", ""), []).append(one.name)
        folded = [name for name in self.fields if name in advanced]
        queueing = [name for name in self.queueing_names if name in self.fields]
        parts = [
            Section("subject", str(self.subject), self._bound(own)),
            *(Section("settings", _legend(group), self._bound(names)) for group, names in groups.items()),
            Section("more", gettext("More settings"), self._bound(folded), True, self._deserves(folded, marks)),
            Section("queueing", gettext("When and where it runs"), self._bound(queueing)),
        ]
        return [part for part in parts if part.fields]

    def _bound(self, names: list[str]) -> list[forms.BoundField]:
        return [self[name] for name in names]

    def _deserves(self, names: list[str], marks: Mapping[str, str]) -> bool:
        """Whether a field among ``names`` is wrong, marked, or no longer what it is by itself."""
        return any(
            name in marks or name in self.errors or _plain(self[name].value()) != _plain(self.fields[name].initial)
            for name in names
        )


def _legend(group: str) -> str:
    return translated(group) if group else gettext("Settings")


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


def check_config(form: forms.Form, config: type[Any], names: set[str]) -> Any:
    """The config of these values, judged by itself; what it refuses stands beside the field that it names."""
    values = {name: form.cleaned_data[name] for name in names if name in form.cleaned_data}
    if len(values) < len(names):
        return None
    try:
        return config(**values)
    except CompressionError as error:
        form.add_error(_named(error.message, names), error.message)
    except (TypeError, ValueError) as error:
        form.add_error(_named(str(error), names), str(error))
    return None


def _named(message: str, names: set[str]) -> str | None:
    """The field that a message speaks of: the one it names first."""
    places = {name: found.start() for name in names if (found := re.search(rf"\b{re.escape(name)}\b", message))}
    return min(places, key=lambda name: places[name]) if places else None
