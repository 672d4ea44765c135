"""Settings as a config class declares them: listed for people, read from ``key=value``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from compression_worker.contracts import CompressionError, Json


def listed(config: type[Any]) -> list[Json]:
    """Each setting's name, type, default (None where it need not be set), help and (where they are few) choices."""
    kinds = kinds_of(config)
    return [
        {
            "name": field.name,
            "type": kinds[field.name].__name__,
            "default": field.default,
            "help": field.metadata.get("help", ""),
            "choices": list(field.metadata.get("choices", ())),
        }
        for field in fields(config)
    ]


def kinds_of(config: type[Any]) -> dict[str, type[Any]]:
    """The type of each setting; that of ``float | None`` is float."""
    hints = get_type_hints(config)
    return {
        field.name: next((kind for kind in get_args(hints[field.name]) if kind is not NoneType), hints[field.name])
        for field in fields(config)
    }


def parsed(config: type[Any], given: Iterable[str]) -> Json:
    """All settings of ``config``, with those of ``given`` (``key=value``) in place of their defaults.

    What cannot be understood is a mistake in the command (code ``usage``); what cannot work is refused by the class.
    """
    kinds = kinds_of(config)
    values: Json = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or name not in kinds:
            raise CompressionError("usage", f"'{pair}' sets nothing: use NAME=VALUE with one of {', '.join(kinds)}")
        values[name] = _value(name, text, kinds[name])
    return {field.name: field.default for field in fields(config)} | completed(config, values)


def completed(config: type[Any], given: Mapping[str, Any]) -> Json:
    """``given``, and the settings that have another default because of them (metadata ``default_with``)."""
    values = dict(given)
    for field in fields(config):
        if field.name not in given:
            values |= _because_of(field, given)
    return values


def _because_of(field: Field[Any], given: Mapping[str, Any]) -> Json:
    others = field.metadata.get("default_with", {})
    return next(({field.name: value} for other, value in others.items() if given.get(other) is not None), {})


def _value(name: str, text: str, kind: type[Any]) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise CompressionError("usage", f"{name} is '{text}'; it must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise CompressionError("usage", f"{name} is '{text}'; it must be {what}") from None
