"""Quality against true bytes: one point per artifact with its 95 % whiskers; what another point beats is greyed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from dashboard.formats import byte_words, significant, whole
from dashboard.pictures.svg import Picture, drawing, element, line, link, text

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 120, 16, 40
SHAPES = ("circle", "triangle", "square", "diamond", "cross")


@dataclass(frozen=True)
class Point:
    """One way to serve a variant. ``family`` gives shape and colour; without ``href`` it is the variant itself."""

    label: str
    family: str
    size_bytes: int
    value: float
    low: float
    high: float
    href: str = ""


def dominated(point: Point, points: Sequence[Point], *, higher_is_better: bool) -> bool:
    """Whether another point is at least as good and at least as small, and one of the two is strict."""
    sign = 1 if higher_is_better else -1
    return any(
        other.size_bytes <= point.size_bytes
        and sign * other.value >= sign * point.value
        and (other.size_bytes < point.size_bytes or sign * other.value > sign * point.value)
        for other in points
    )


class _Scale:
    """Bytes to x (logarithmic) and quality to y, better always up."""

    def __init__(self, points: Sequence[Point], higher_is_better: bool) -> None:
        sizes = [math.log10(point.size_bytes) for point in points]
        self.first, self.last = min(sizes) - 0.12, max(sizes) + 0.12
        bottom, top = min(point.low for point in points), max(point.high for point in points)
        pad = (top - bottom) * 0.12 or abs(top) * 0.05 or 1.0
        self.worst, self.best = (bottom - pad, top + pad) if higher_is_better else (top + pad, bottom - pad)

    def x(self, size_bytes: float) -> float:
        return LEFT + (math.log10(size_bytes) - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.worst) / (self.best - self.worst) * (HEIGHT - TOP - BOTTOM)


def pareto_picture(points: Sequence[Point], quality: str, *, higher_is_better: bool) -> Picture | None:
    """None while there are fewer than two points: one point compares with nothing."""
    points = [point for point in points if point.size_bytes > 0 and math.isfinite(point.value)]
    if len(points) < 2:
        return None
    beaten = {id(point) for point in points if dominated(point, points, higher_is_better=higher_is_better)}
    title = _finding(points, quality, higher_is_better)
    scale = _Scale(points, higher_is_better)
    families = sorted({point.family for point in points if point.href})
    shapes: list[object] = [*_axes(scale, quality)]
    for point in sorted(points, key=lambda one: -scale.y(one.value)):
        family = families.index(point.family) + 1 if point.href else 0
        shapes += _mark(point, scale, family, id(point) in beaten)
    shapes += _labels(points, scale)
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, HEIGHT, shapes),
        columns=(_("name"), _("kind"), _("bytes"), quality, _("95 % low"), _("95 % high"), ""),
        rows=[
            (
                point.label,
                point.family,
                whole(point.size_bytes),
                significant(point.value, 4),
                significant(point.low, 4),
                significant(point.high, 4),
                _("dominated") if id(point) in beaten else "",
            )
            for point in sorted(points, key=lambda one: one.size_bytes)
        ],
        numeric=frozenset({2, 3, 4, 5}),
    )


def _finding(points: Sequence[Point], quality: str, higher_is_better: bool) -> str:
    largest, smallest = max(points, key=lambda p: p.size_bytes), min(points, key=lambda p: p.size_bytes)
    return _("%(smallest)s needs %(small)s instead of %(large)s; %(quality)s %(after)s instead of %(before)s") % {
        "smallest": smallest.label,
        "small": byte_words(smallest.size_bytes),
        "large": byte_words(largest.size_bytes),
        "quality": quality,
        "after": significant(smallest.value),
        "before": significant(largest.value),
    }


def _axes(scale: _Scale, quality: str) -> list[object]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    shapes: list[object] = [
        line(LEFT, floor, right, floor, class_="axis"),
        text((LEFT + right) / 2, HEIGHT - 4, _("true bytes (log scale)"), class_="note", anchor="middle"),
        text(0, 11, _("%(quality)s · better is up") % {"quality": quality}, class_="note"),
    ]
    for size in _ticks(scale.first, scale.last):
        x = scale.x(size)
        shapes += [
            line(x, floor, x, floor + 4, class_="axis"),
            text(x, floor + 16, byte_words(size, 1), class_="tick", anchor="middle"),
        ]
    for step in range(5):
        value = scale.worst + (scale.best - scale.worst) * (step + 0.5) / 5
        shapes += [
            line(LEFT, scale.y(value), right, scale.y(value), class_="grid"),
            text(LEFT - 6, scale.y(value) + 4, significant(value), class_="tick", anchor="end"),
        ]
    return shapes


def _ticks(first: float, last: float) -> list[float]:
    powers = range(math.floor(first), math.ceil(last) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        inside = [digit * 10.0**power for power in powers for digit in digits]
        inside = [mark for mark in inside if first <= math.log10(mark) <= last]
        if len(inside) <= 5:
            break
    return inside


def _mark(point: Point, scale: _Scale, family: int, is_beaten: bool) -> list[object]:
    x, y = scale.x(point.size_bytes), scale.y(point.value)
    tone = "muted" if is_beaten else f"family-{family % len(SHAPES)}"
    hover = f"{point.label} · {byte_words(point.size_bytes)} · {significant(point.value)}"
    hover += f" ({significant(point.low)} … {significant(point.high)})"
    whisker = [
        line(x, scale.y(point.low), x, scale.y(point.high), class_=f"whisker {tone}"),
        line(x - 4, scale.y(point.low), x + 4, scale.y(point.low), class_=f"whisker {tone}"),
        line(x - 4, scale.y(point.high), x + 4, scale.y(point.high), class_=f"whisker {tone}"),
    ]
    mark = element(
        "path", element("title", hover), d=_outline(SHAPES[family % len(SHAPES)], x, y), class_=f"mark {tone}"
    )
    return [*whisker, link(point.href, mark) if point.href else mark]


def _outline(shape: str, x: float, y: float, r: float = 5.5) -> str:
    match shape:
        case "circle":
            return f"M{x - r:.1f},{y:.1f} a{r},{r} 0 1,0 {2 * r},0 a{r},{r} 0 1,0 {-2 * r},0 Z"
        case "triangle":
            return f"M{x:.1f},{y - r:.1f} l{r},{2 * r} h{-2 * r} Z"
        case "square":
            return f"M{x - r:.1f},{y - r:.1f} h{2 * r} v{2 * r} h{-2 * r} Z"
        case "diamond":
            return f"M{x:.1f},{y - r - 1:.1f} l{r + 1},{r + 1} l{-r - 1},{r + 1} l{-r - 1},{-r - 1} Z"
        case _:
            a = r - 2
            return f"M{x - r:.1f},{y - 2:.1f} h{a} v{-a} h4 v{a} h{a} v4 h{-a} v{a} h-4 v{-a} h{-a} Z"


def _labels(points: Sequence[Point], scale: _Scale) -> list[object]:
    """Direct labels to the right of each point, pushed apart where they would touch."""
    shapes: list[object] = []
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: scale.y(one.value)):
        x, y = scale.x(point.size_bytes) + 10, scale.y(point.value) + 4
        while any(abs(y - other) < 13 and abs(x - left) < 110 for left, other in taken):
            y += 13
        taken.append((x, y))
        shapes.append(text(x, y, point.label if len(point.label) <= 26 else point.label[:25] + "…", class_="label"))
    return shapes
