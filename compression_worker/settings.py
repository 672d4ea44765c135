"""Settings as a config class declares them: listed for people, read from ``key=value``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any

from compression_worker.contracts import CompressionError, Json


def listed(config: type[Any]) -> list[Json]:
    """Each setting's name, type, default, help and (where they are few) choices."""
    return [
        {
            "name": field.name,
            "type": kind_of(field)[0].__name__,
            "default": field.default,
            "help": field.metadata.get("help", ""),
            "choices": list(field.metadata.get("choices", ())),
        }
        for field in fields(config)
    ]


KINDS: dict[str, type[Any]] = {one.__name__: one for one in (bool, int, float, str)}


def kind_of(field: Field[Any]) -> tuple[type[Any], bool]:
    """The type of a setting, and whether it may be left empty: ``float | None`` is a number that may."""
    names = [name.strip() for name in str(field.type).split("|")]
    kinds = [KINDS[name] for name in names if name in KINDS]
    return kinds[0] if kinds else type(field.default), "None" in names


def parsed(config: type[Any], given: Iterable[str]) -> Json:
    """All settings of ``config``, with those of ``given`` (``key=value``) in place of their defaults.

    An optional setting that is given without a value is not set. What cannot be understood is a mistake in the command
    (code ``usage``); what cannot work is refused by the class.
    """
    known = {field.name: field for field in fields(config)}
    values: Json = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise CompressionError("usage", f"'{pair}' sets nothing: use NAME=VALUE with one of {', '.join(known)}")
        kind, is_optional = kind_of(known[name])
        values[name] = None if is_optional and not text else _value(name, text, kind)
    return {name: field.default for name, field in known.items()} | completed(config, values)


def completed(config: type[Any], given: Mapping[str, Any]) -> Json:
    """``given``, and the settings that have another default because of them (metadata ``default_with``)."""
    values = dict(given)
    for field in fields(config):
        for other, value in field.metadata.get("default_with", {}).items():
            if field.name not in given and given.get(other) is not None:
                values[field.name] = value
    return values


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
