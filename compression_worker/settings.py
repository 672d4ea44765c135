"""Settings as a config class declares them: listed for people, read from ``key=value``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from compression_worker.contracts import CompressionError, Json


def listed(config: type[Any]) -> list[Json]:
    """Each setting's name, type, default, help and (where they are few) choices."""
    return [
        {
            "name": field.name,
            "type": type(field.default).__name__,
            "default": field.default,
            "help": field.metadata.get("help", ""),
            "choices": list(field.metadata.get("choices", ())),
        }
        for field in fields(config)
    ]


def parsed(config: type[Any], given: Iterable[str]) -> Json:
    """All settings of ``config``, with those of ``given`` (``key=value``) in place of their defaults.

    What cannot be understood is a mistake in the command (code ``usage``); what cannot work is refused by the class.
    """
    defaults = {field.name: field.default for field in fields(config)}
    values = dict(defaults)
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or name not in defaults:
            raise CompressionError("usage", f"'{pair}' sets nothing: use NAME=VALUE with one of {', '.join(defaults)}")
        values[name] = _value(name, text, type(defaults[name]))
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
