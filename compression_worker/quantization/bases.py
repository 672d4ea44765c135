"""Methods that make a packed base for another method, and the settings that are handed to them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from compression_worker.catalog import METHODS
from compression_worker.contracts import CompressionError

BASES = tuple(name for name in ("gptq", "quip_sharp") if name in METHODS)
"""By their names in the catalog."""


def base_config(method: str, given: Mapping[str, Any]) -> Any:
    """The settings of the base's own method, from those of ``given`` that are set.

    Refuses what that method refuses, or does not have.
    """
    made = METHODS[method].config_class()
    known = {one.name for one in fields(made)}
    set_ones = {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(set_ones.keys() - known):
        raise CompressionError("bad_setting", f"{unknown[0]} is set, and {METHODS[method].label} has no such setting")
    return made(**set_ones)
