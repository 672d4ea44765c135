"""Quality against true bytes: one mark per artifact with its 95 % whiskers, the frontier, and full precision beside it.

What another artifact beats in both is greyed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from django.utils.translation import gettext as _

from dashboard.formats import byte_words, percent_words, ratio_words, significant, whole
from dashboard.pictures.labels import Ground, labels, legend
from dashboard.pictures.marks import SHAPES, outline, place_of
from dashboard.pictures.svg import Picture, drawing, element, line, link, text

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 146, 24, 62
MOST_LABELS = 12
"""With more points, only those of the frontier are named in the picture."""


@dataclass(frozen=True)
class Point:
    """One way to serve a variant. ``family`` gives shape and colour; without ``href`` it is the variant itself.

    ``about`` tells it from others of its family, in a few words.
    """

    label: str
    family: str
    size_bytes: int
    value: float
    low: float
    high: float
    href: str = ""
    about: str = ""

    @property
    def kind(self) -> str:
        return " · ".join(filter(None, (self.family, self.about)))


@dataclass(frozen=True)
class Quality:
    """What is measured: its name, its direction, and whether it is a share (read as a percentage)."""

    label: str
    higher_is_better: bool
    is_share: bool = False

    def words(self, value: float, digits: int = 3) -> str:
        if self.is_share:
            return percent_words(value)
        return f"{value:.1e}" if abs(value) >= 1e6 else significant(value, digits)


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


def pareto_picture(points: Sequence[Point], quality: Quality, *, note: str = "") -> Picture | None:
    """None while there are fewer than two points: one point compares with nothing."""
    points = [_sound(point) for point in points if point.size_bytes > 0 and math.isfinite(point.value)]
    if len(points) < 2:
        return None
    beaten = {id(point) for point in points if dominated(point, points, higher_is_better=quality.higher_is_better)}
    frontier = [point for point in points if id(point) not in beaten]
    full = next((point for point in points if not point.href), None)
    scale = _Scale(points, quality.higher_is_better)
    families = list(dict.fromkeys(sorted(point.family for point in points if point.href)))
    title = _finding(points, quality)
    shapes: list[object] = [*_axes(scale, quality, full), *_frontier(frontier, scale), *_reference(full, scale)]
    for point in sorted(points, key=lambda one: -scale.y(one.value)):
        family = place_of(families.index(point.family)) if point.href else 0
        shapes += _mark(point, quality, scale, family, id(point) in beaten, full)
    shapes += _labels(points if len(points) <= MOST_LABELS else frontier, points, scale)
    key, height = _legend(families, full is not None, bool(beaten))
    about = _(
        "Further left is smaller, further up is better. Each mark leads to its artifact; bars are 95 % intervals."
    )
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, height, [*shapes, *key], about=about, has_links=True),
        columns=(
            _("name"), _("kind"), _("bytes"), _("true ratio"), quality.label, _("95 % low"), _("95 % high"), _("place"),
        ),
        rows=[_row(point, quality, full, id(point) in beaten) for point in sorted(points, key=_by_size)],
        numeric=frozenset({2, 3, 4, 5, 6}),
        note=note,
    )  # fmt: skip


def _by_size(point: Point) -> int:
    return point.size_bytes


def _sound(point: Point) -> Point:
    """With an interval that can be drawn: where one end is not known, the value stands for it."""
    low = min(point.low, point.value) if math.isfinite(point.low) else point.value
    high = max(point.high, point.value) if math.isfinite(point.high) else point.value
    return replace(point, low=low, high=high)


def _row(point: Point, quality: Quality, full: Point | None, is_beaten: bool) -> tuple[object, ...]:
    return (
        link(point.href, point.label) if point.href else point.label,
        point.kind,
        whole(point.size_bytes),
        ratio_words(full.size_bytes / point.size_bytes) if full else "–",
        quality.words(point.value, 4),
        quality.words(point.low, 4),
        quality.words(point.high, 4),
        _("dominated") if is_beaten else _("on the frontier"),
    )


def _finding(points: Sequence[Point], quality: Quality) -> str:
    largest, smallest = max(points, key=_by_size), min(points, key=_by_size)
    return _("%(smallest)s needs %(small)s instead of %(large)s; %(quality)s %(after)s instead of %(before)s") % {
        "smallest": smallest.label,
        "small": byte_words(smallest.size_bytes),
        "large": byte_words(largest.size_bytes),
        "quality": quality.label,
        "after": quality.words(smallest.value),
        "before": quality.words(largest.value),
    }


def _axes(scale: _Scale, quality: Quality, full: Point | None) -> list[object]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    named = _("true bytes, and the true ratio (log scale)") if full else _("true bytes (log scale)")
    shapes: list[object] = [
        line(LEFT, floor, right, floor, class_="axis"),
        text((LEFT + right) / 2, HEIGHT - 8, named, class_="note", anchor="middle"),
        text(0, 11, _("%(quality)s · better is up") % {"quality": quality.label}, class_="note"),
    ]
    for size in _ticks(scale.first, scale.last):
        x = scale.x(size)
        shapes += [
            line(x, floor, x, floor + 4, class_="axis"),
            text(x, floor + 16, byte_words(size, 1), class_="tick", anchor="middle"),
        ]
        if full and 0.1 <= (ratio := full.size_bytes / size) < 10_000:
            times = ratio_words(float(f"{ratio:.2g}"))
            shapes.append(text(x, floor + 30, times, class_="tick", anchor="middle"))
    for value in round_values(*sorted((scale.worst, scale.best))):
        shapes += [
            line(LEFT, scale.y(value), right, scale.y(value), class_="grid"),
            text(LEFT - 6, scale.y(value) + 4, quality.words(value), class_="tick", anchor="end"),
        ]
    return shapes


def round_values(low: float, high: float) -> list[float]:
    """From three to eight round numbers between ``low`` and ``high``."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(size for digit in (1, 2, 5, 10) if (size := digit * power) >= (high - low) / 6)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [at * step for at in range(first, last + 1)]


def _ticks(first: float, last: float) -> list[float]:
    powers = range(math.floor(first), math.ceil(last) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        inside = [digit * 10.0**power for power in powers for digit in digits]
        inside = [mark for mark in inside if first <= math.log10(mark) <= last]
        if len(inside) <= 5:
            break
    return inside[:: max(1, len(inside) // 5)]


def _frontier(points: Iterable[Point], scale: _Scale) -> list[object]:
    """Stairs through the points that nothing beats: the best quality for at most so many bytes."""
    steps = sorted({(scale.x(point.size_bytes), scale.y(point.value)) for point in points})
    if len(steps) < 2:
        return []
    path = f"M{steps[0][0]:.1f},{steps[0][1]:.1f}" + "".join(f" H{x:.1f} V{y:.1f}" for x, y in steps[1:])
    return [element("path", element("title", _("The frontier: nothing is both smaller and better")), d=path,
                    class_="frontier")]  # fmt: skip


def _reference(full: Point | None, scale: _Scale) -> list[object]:
    """A line at the quality of full precision."""
    if full is None:
        return []
    y = scale.y(full.value)
    return [line(LEFT, y, WIDTH - RIGHT, y, class_="reference")]


def _mark(
    point: Point, quality: Quality, scale: _Scale, family: int, is_beaten: bool, full: Point | None
) -> list[object]:
    x, y = scale.x(point.size_bytes), scale.y(point.value)
    tone = "muted" if is_beaten else f"family-{family}"
    hover = f"{point.label} · {point.kind} · {byte_words(point.size_bytes)}"
    hover += f" · {ratio_words(full.size_bytes / point.size_bytes)}" if full and point is not full else ""
    hover += (
        f" · {quality.label} {quality.words(point.value)} ({quality.words(point.low)} … {quality.words(point.high)})"
    )
    whisker = [
        line(x, scale.y(point.low), x, scale.y(point.high), class_=f"whisker {tone}"),
        line(x - 4, scale.y(point.low), x + 4, scale.y(point.low), class_=f"whisker {tone}"),
        line(x - 4, scale.y(point.high), x + 4, scale.y(point.high), class_=f"whisker {tone}"),
    ]
    mark = element("path", element("title", hover), d=outline(SHAPES[family], x, y), class_=f"mark {tone}")
    return [*whisker, link(point.href, mark, label=hover) if point.href else mark]


def _labels(named: Sequence[Point], points: Sequence[Point], scale: _Scale) -> list[object]:
    """Direct labels beside their marks, where they touch neither another label nor a mark."""

    def at(point: Point) -> tuple[float, float]:
        return scale.x(point.size_bytes), scale.y(point.value)

    ground = Ground(left=LEFT, right=WIDTH, floor=HEIGHT - BOTTOM, longest=RIGHT - 14)
    return labels([(point.label, *at(point)) for point in named], [at(point) for point in points], ground)


def _legend(families: Sequence[str], has_full: bool, has_beaten: bool) -> tuple[list[object], float]:
    """Which shape is which method; what the lines and the grey mean."""
    entries = [(f"family-{place_of(at)}", SHAPES[place_of(at)], name) for at, name in enumerate(families)]
    if has_full:
        entries.insert(0, ("family-0", SHAPES[0], _("full precision")))
    if has_beaten:
        entries.append(("muted", SHAPES[1], _("grey: another is smaller and better")))
    return legend(entries, left=LEFT, right=WIDTH, y=HEIGHT + 12)
