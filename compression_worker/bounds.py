"""What a setting may be: each refuses a value that is not, and says what it must be (``bad_setting``)."""

from __future__ import annotations

import math

from compression_worker.contracts import CompressionError


def whole_number(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise CompressionError("bad_setting", f"{name} is {value!r}; it must be a whole number from {low} to {high:,}")


def positive(name: str, value: object, high: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(float(str(value))) or not 0 < float(str(value)) <= high:
        raise CompressionError("bad_setting", f"{name} is {value!r}; it must be above 0 and at most {high:g}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CompressionError("bad_setting", f"{name} is {value!r}; it may be one of {', '.join(choices)}")
