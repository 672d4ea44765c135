"""Numbers as people read them: bytes, ratios, significant digits, intervals, durations; in the reader's language."""

from __future__ import annotations

import math
from datetime import timedelta

from django.utils.formats import number_format
from django.utils.translation import gettext as _

MINUS = "−"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def whole(value: float) -> str:
    """An exact whole number with its digits grouped."""
    return number_format(int(value), force_grouping=True)


def range_words(low: int, high: int) -> str:
    """``32 to 64``, or ``64`` where both are."""
    return _("%(low)s to %(high)s") % {"low": low, "high": high} if low < high else str(high)


def significant(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """``value`` to a few significant digits, never in exponent form unless it is tiny; a true minus sign."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{abs(value):.1e}" if places > 8 else number_format(round(abs(value), places), places, force_grouping=True)
    return (MINUS if value < 0 else "+" if sign else "") + text


def fixed(value: float | None, places: int, *, sign: bool = False) -> str:
    """``value`` to a fixed number of decimal places, so that a column lines up."""
    if value is None or not math.isfinite(value):
        return "–"
    text = number_format(round(abs(value), places), places, force_grouping=True)
    rounded = round(value, places)
    return (MINUS if rounded < 0 else "+" if sign and rounded > 0 else "") + text


def byte_words(value: float | None, digits: int = 3) -> str:
    """Decimal bytes to three significant digits: ``17.8 MB``."""
    if value is None:
        return "–"
    size, unit = float(value), 0
    while abs(size) >= 999.5 and unit < len(BYTE_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    places = 0 if unit == 0 else max(0, digits - (3 if abs(size) >= 100 else 2 if abs(size) >= 10 else 1))
    return f"{number_format(round(size, places), places)} {BYTE_UNITS[unit]}"


def ratio_words(value: float | None) -> str:
    return "–" if value is None else f"{significant(value)}×"


def percent_words(value: float | None, places: int = 1, *, sign: bool = False) -> str:
    return "–" if value is None else f"{fixed(value * 100, places, sign=sign)} %"


def points_words(value: float, places: int = 1) -> str:
    """A difference of two percentages: ``0.5 points``."""
    return _("%(points)s points") % {"points": fixed(value * 100, places)}


def places_for(*values: float | None) -> int:
    """Decimal places for figures whose half widths are ``values``: the narrowest keeps one digit, two after a 1."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    if not sizes:
        return 2
    power = math.floor(math.log10(min(sizes)))
    return min(6, max(0, -power + (1 if min(sizes) < 2 * 10.0**power else 0)))


def duration_words(value: float | timedelta | None) -> str:
    """A span of time: ``0.8 s``, ``1 min 40 s``, ``2 h 5 min``, ``3 d``."""
    if value is None:
        return "–"
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if seconds < 10:
        return _("%(seconds)s s") % {"seconds": fixed(seconds, 1)}
    if seconds < 60:
        return _("%(seconds)s s") % {"seconds": fixed(seconds, 0)}
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return _("%(minutes)s min %(seconds)s s") % {"minutes": minutes, "seconds": rest}
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return _("%(hours)s h %(minutes)s min") % {"hours": hours, "minutes": minutes}
    return _("%(days)s d %(hours)s h") % {"days": hours // 24, "hours": hours % 24}
