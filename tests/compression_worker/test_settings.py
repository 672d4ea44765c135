"""Settings from the command line: each of its own type, optional ones that may stay empty, clear refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from compression_worker.catalog import METHODS
from compression_worker.contracts import CompressionError
from compression_worker.settings import listed, parsed


@dataclass(frozen=True, kw_only=True)
class Config:
    ratio: float | None = None
    group: int | None = 64
    steps: int = 200
    rate: float = 1e-4
    exact: bool = True
    way: str = "near"


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("ratio=12", "ratio", 12.0), ("ratio=", "ratio", None), ("group=8", "group", 8), ("group=", "group", None),
        ("steps=0", "steps", 0), ("rate=2", "rate", 2.0), ("exact=False", "exact", False), ("way=a=b", "way", "a=b"),
        ("way=", "way", ""),
    ],
)  # fmt: skip
def test_a_setting_is_read_as_its_own_type(given: str, name: str, value: Any) -> None:
    values = parsed(Config, [given])
    assert values[name] == value
    assert type(values[name]) is type(value)
    assert Config(**values)


def test_what_is_not_given_keeps_its_default() -> None:
    assert Config(**parsed(Config, [])) == Config()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ratio=many", "ratio is 'many'; it must be a number"), ("group=1.5", "group is '1.5'; it must be a whole number"),
        ("steps=", "steps is ''; it must be a whole number"), ("exact=maybe", "it must be true or false"),
        ("steps", "sets nothing"), ("bits=1", "sets nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(given: str, words: str) -> None:
    with pytest.raises(CompressionError, match=words) as refused:
        parsed(Config, [given])
    assert refused.value.code == "usage"


def test_the_list_names_types_and_can_be_written_as_json() -> None:
    types = {one["name"]: (one["type"], one["default"]) for one in listed(Config)}
    assert types["ratio"] == ("float", None)
    assert types["group"] == ("int", 64)
    assert types["exact"] == ("bool", True)
    assert json.loads(json.dumps(listed(Config))) == listed(Config)


@pytest.mark.parametrize("config", [method.config_class() for method in METHODS.values()])
def test_every_setting_of_every_method_has_a_type_that_can_be_typed(config: type[Any]) -> None:
    assert {one["type"] for one in listed(config)} <= {"bool", "int", "float", "str"}
