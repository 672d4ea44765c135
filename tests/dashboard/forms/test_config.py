"""Forms made from a config: kinds of fields, optional numbers, groups, what is folded, and what a refusal keeps."""

from __future__ import annotations

from typing import Any

import pytest

from compression_worker.catalog import METHODS
from compression_worker.evaluation.config import EvaluationConfig
from dashboard.forms.config import ConfigForm, check_config, config_fields
from dashboard.selectors.outcomes import config_pairs
from tests.dashboard.sketch import SketchConfig

WHOLE = {"ratio": "", "limit": "", "bits": "2", "way": "", "exact": "on", "group_size": "64"}


class SketchForm(ConfigForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_config(SketchConfig)

    def clean(self) -> dict[str, Any]:
        check_config(self, self.config, self.config_names)
        return self.cleaned_data


def made(**values: str) -> SketchForm:
    form = SketchForm(WHOLE | values)
    form.is_valid()
    return form


def test_an_optional_number_that_is_empty_is_not_set() -> None:
    form = made()
    assert form.errors == {}
    assert form.config_values == {
        "ratio": None, "limit": None, "bits": 2, "way": None, "exact": True, "group_size": 64,
    }  # fmt: skip


def test_an_optional_number_that_is_given_is_a_number_of_its_kind() -> None:
    values = made(ratio="12.5", limit="7", way="far").config_values
    assert (values["ratio"], values["limit"], values["way"]) == (12.5, 7, "far")
    assert [type(values[name]) for name in ("ratio", "limit")] == [float, int]


@pytest.mark.parametrize(("name", "value"), [("ratio", "many"), ("limit", "1.5"), ("bits", "3"), ("way", "up")])
def test_what_is_no_such_number_or_choice_is_refused_beside_its_field(name: str, value: str) -> None:
    form = made(**{name: value})
    assert list(form.errors) == [name]
    assert form[name].value() == value


def test_what_the_config_refuses_stands_beside_the_field_that_it_names() -> None:
    assert list(made(ratio="0.5").errors) == ["ratio"]
    assert list(made(group_size="12").errors) == ["group_size"]


def test_each_field_says_what_it_is_by_itself() -> None:
    helps = {name: str(field.help_text) for name, field in config_fields(SketchConfig).items()}
    assert "Default: no target" in helps["ratio"]
    assert "Default: not set" in helps["limit"]
    assert "Default: 4" in helps["bits"]
    assert "Default: yes" in helps["exact"]
    assert "Of a &lt;code&gt;." in helps["bits"]


def test_an_optional_field_says_what_empty_means_where_it_is_empty() -> None:
    form = SketchForm()
    assert 'placeholder="no target"' in str(form["ratio"])
    assert '<option value="" selected>either</option>' in str(form["way"])


def test_settings_stand_in_their_groups_and_the_advanced_ones_are_folded() -> None:
    sections = SketchForm().sections({})
    shown = [(one.legend, [field.name for field in one.fields], one.folded, one.is_open) for one in sections]
    assert shown == [
        ("Target", ["ratio", "limit"], False, False),
        ("Settings", ["bits", "way"], False, False),
        ("More settings", ["exact", "group_size"], True, False),
    ]


@pytest.mark.parametrize("values", [{"group_size": "12"}, {"group_size": "128"}, {"exact": ""}])
def test_what_is_wrong_or_unusual_opens_the_fold(values: dict[str, str]) -> None:
    assert [one.is_open for one in made(**values).sections({}) if one.folded] == [True]


def test_a_mark_opens_the_fold_and_the_defaults_leave_it_closed() -> None:
    assert [one.is_open for one in made().sections({}) if one.folded] == [False]
    assert [one.is_open for one in made().sections({"group_size": "128"}) if one.folded] == [True]


@pytest.mark.parametrize("config", [*(method.config_class() for method in METHODS.values()), EvaluationConfig])
def test_the_form_as_it_comes_is_a_config_as_it_comes(config: type[Any]) -> None:
    """What a browser sends of an untouched form is exactly the defaults."""
    fields = config_fields(config)
    sent = {name: "" if field.initial is None else str(field.initial) for name, field in fields.items()}
    cleaned = {name: field.clean(sent[name] if sent[name] != "False" else "") for name, field in fields.items()}
    assert config(**cleaned) == config()


def test_settings_are_written_out_in_words() -> None:
    config = {"ratio": None, "limit": None, "exact": False, "bits": 2, "old": 3}
    assert config_pairs(SketchConfig, config) == [
        ("Target ratio", "no target"), ("Limit", "–"), ("Bits", "2"), ("Exact", "no"), ("old", "3"),
    ]  # fmt: skip
