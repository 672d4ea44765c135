"""Bits per weight against perplexity: one mark per way of compressing, joined method by method, on two log scales.

Perplexity grows without end where a method collapses, so its axis is logarithmic. Full precision is a line of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from dashboard.formats import significant
from dashboard.pictures.labels import Ground, labels, legend
from dashboard.pictures.marks import SHAPES, outline, place_of
from dashboard.pictures.pareto import round_values
from dashboard.pictures.svg import Picture, drawing, element, line, link, text

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 30, 24, 48
LONGEST = 130
"""Pixels of a name."""
BIT_TICKS = (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 32)


@dataclass(frozen=True)
class BitsPoint:
    """One way of compressing. ``low`` and ``high`` None: its interval is not known."""

    label: str
    family: str
    bits: float
    value: float
    low: float | None = None
    high: float | None = None
    href: str = ""


@dataclass(frozen=True)
class _Mark:
    """A point with an interval that can be drawn on a log scale."""

    point: BitsPoint
    low: float
    high: float

    @classmethod
    def of(cls, point: BitsPoint) -> _Mark:
        low = point.low if point.low is not None and 0 < point.low <= point.value else point.value
        high = point.high if point.high is not None and point.value <= point.high < math.inf else point.value
        return cls(point, low, high)


class _Scale:
    """Bits to x and perplexity to y, both logarithmic; better is up, as in every picture of quality."""

    def __init__(self, marks: Sequence[_Mark]) -> None:
        bits = [math.log2(mark.point.bits) for mark in marks]
        self.first, self.last = min(bits) - 0.25, max(bits) + 0.25
        low, high = math.log10(min(mark.low for mark in marks)), math.log10(max(mark.high for mark in marks))
        pad = max(0.08 * (high - low), 0.01)
        self.best, self.worst = low - pad, high + pad

    def x(self, bits: float) -> float:
        return LEFT + (math.log2(bits) - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (math.log10(value) - self.best) / (self.worst - self.best) * (HEIGHT - TOP - BOTTOM)


def bits_picture(points: Sequence[BitsPoint], full: BitsPoint | None, axis: str, *, note: str = "") -> Picture | None:
    """``axis`` says whose bits they are. None while there are fewer than two points: one compares with nothing."""
    points = [point for point in points if _sound(point)]
    if len(points) < 2:
        return None
    marks = [_Mark.of(point) for point in points]
    shown = [*marks, _Mark.of(full)] if full else marks
    scale = _Scale(shown)
    families = list(dict.fromkeys(point.family for point in points))
    title = _finding(points, full)
    shapes = _axes(scale, axis)
    if full:
        shapes += _reference(full, scale)
    shapes += _joins(marks, families, scale)
    for mark in marks:
        shapes += _drawn(mark, place_of(families.index(mark.point.family)), scale)
    shapes += _names(marks, full, scale)
    key, height = _legend(families, full is not None)
    about = _(
        "Further left is fewer bits, further up is better. Each mark leads to its artifact; bars are 95 % intervals."
    )
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, height, [*shapes, *key], about=about, has_links=True),
        columns=(_("name"), _("method"), axis, _("perplexity"), _("95 % low"), _("95 % high")),
        rows=[_row(mark) for mark in sorted(shown, key=lambda mark: mark.point.bits)],
        numeric=frozenset({2, 3, 4, 5}),
        note=note,
    )


def _sound(point: BitsPoint) -> bool:
    return point.bits > 0 and math.isfinite(point.bits) and point.value > 0 and math.isfinite(point.value)


def _row(mark: _Mark) -> tuple[object, ...]:
    point = mark.point
    return (
        link(point.href, point.label) if point.href else point.label,
        point.family,
        significant(point.bits, 4),
        significant(point.value, 4),
        "–" if point.low is None else significant(point.low, 4),
        "–" if point.high is None else significant(point.high, 4),
    )


def _finding(points: Sequence[BitsPoint], full: BitsPoint | None) -> str:
    """The best at the fewest bits: of those within half a bit of the smallest, the one of least perplexity."""
    fewest = min(point.bits for point in points)
    best = min((point for point in points if point.bits <= fewest + 0.5), key=lambda point: point.value)
    words = {"name": best.label, "bits": significant(best.bits), "value": significant(best.value)}
    if full is None:
        return _("%(name)s is best at the fewest bits: %(bits)s a weight, perplexity %(value)s") % words
    return _("%(name)s is best at the fewest bits: %(bits)s a weight, perplexity %(value)s instead of %(full)s") % (
        words | {"full": significant(full.value)}
    )


def _axes(scale: _Scale, axis: str) -> list[object]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    shapes: list[object] = [
        line(LEFT, floor, right, floor, class_="axis"),
        text(
            (LEFT + right) / 2, HEIGHT - 8, _("%(axis)s (log scale)") % {"axis": axis}, class_="note", anchor="middle"
        ),
        text(0, 11, _("perplexity (log scale) · better is up"), class_="note"),
    ]
    for bits in BIT_TICKS:
        if scale.first <= math.log2(bits) <= scale.last:
            x = scale.x(bits)
            shapes.append(line(x, floor, x, floor + 4, class_="axis"))
            shapes.append(
                text(x, floor + 16, significant(bits, 2 if bits >= 10 else 1), class_="tick", anchor="middle")
            )
    for value in log_values(scale.best, scale.worst):
        y = scale.y(value)
        shapes.append(line(LEFT, y, right, y, class_="grid"))
        shapes.append(text(LEFT - 6, y + 4, _short(value), class_="tick", anchor="end"))
    return shapes


def log_values(low: float, high: float) -> list[float]:
    """From two to eight round numbers between ``10**low`` and ``10**high``; a wide span is told by powers alone."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        inside = [digit * 10.0**power for power in powers for digit in digits]
        found = [value for value in inside if low <= math.log10(value) <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 8)]
    return round_values(10.0**low, 10.0**high)


def _short(value: float) -> str:
    if value >= 100_000:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return significant(value, 2 if value < 1000 else 1)


def _reference(full: BitsPoint, scale: _Scale) -> list[object]:
    """A line at the perplexity of full precision, and its own mark."""
    y = scale.y(full.value)
    hover = _hover(_Mark.of(full))
    mark = element("path", element("title", hover), d=outline(SHAPES[0], scale.x(full.bits), y), class_="mark family-0")
    return [line(LEFT, y, WIDTH - RIGHT, y, class_="reference"), mark]


def _joins(marks: Sequence[_Mark], families: Sequence[str], scale: _Scale) -> list[object]:
    """A thin line through the points of each method, from few bits to many."""
    own: dict[str, list[BitsPoint]] = defaultdict(list)
    for mark in marks:
        own[mark.point.family].append(mark.point)
    shapes: list[object] = []
    for family, points in own.items():
        if len(points) < 2:
            continue
        ordered = sorted(points, key=lambda point: point.bits)
        path = "M" + " L".join(f"{scale.x(point.bits):.1f},{scale.y(point.value):.1f}" for point in ordered)
        shapes.append(element("path", d=path, class_=f"join family-{place_of(families.index(family))}"))
    return shapes


def _drawn(mark: _Mark, family: int, scale: _Scale) -> list[object]:
    x, y = scale.x(mark.point.bits), scale.y(mark.point.value)
    low, high = scale.y(mark.low), scale.y(mark.high)
    tone = f"whisker family-{family}"
    whisker = [
        line(x, low, x, high, class_=tone),
        line(x - 4, low, x + 4, low, class_=tone),
        line(x - 4, high, x + 4, high, class_=tone),
    ]
    hover = _hover(mark)
    shape = element("path", element("title", hover), d=outline(SHAPES[family], x, y), class_=f"mark family-{family}")
    return [*whisker, link(mark.point.href, shape, label=hover) if mark.point.href else shape]


def _hover(mark: _Mark) -> str:
    point = mark.point
    return _("%(name)s · %(bits)s bits a weight · perplexity %(value)s (%(low)s … %(high)s)") % {
        "name": point.label,
        "bits": significant(point.bits, 4),
        "value": significant(point.value),
        "low": significant(mark.low),
        "high": significant(mark.high),
    }


def _names(marks: Sequence[_Mark], full: BitsPoint | None, scale: _Scale) -> list[object]:
    """Each method by its name at its fewest bits, and full precision: what the others are, the axis says."""
    fewest: dict[str, BitsPoint] = {}
    for point in sorted((mark.point for mark in marks), key=lambda point: point.bits):
        fewest.setdefault(point.family, point)
    named = [(family, scale.x(point.bits), scale.y(point.value)) for family, point in fewest.items()]
    places = [(scale.x(mark.point.bits), scale.y(mark.point.value)) for mark in marks]
    if full:
        named.append((full.label, scale.x(full.bits), scale.y(full.value)))
        places.append(named[-1][1:])
    ground = Ground(left=LEFT, right=WIDTH, floor=HEIGHT - BOTTOM, longest=LONGEST)
    return labels(named, places, ground)


def _legend(families: Sequence[str], has_full: bool) -> tuple[list[object], float]:
    entries = [(f"family-{place_of(at)}", SHAPES[place_of(at)], name) for at, name in enumerate(families)]
    if has_full:
        entries.insert(0, ("family-0", SHAPES[0], _("full precision")))
    return legend(entries, left=LEFT, right=WIDTH, y=HEIGHT + 12)
