"""Names beside their marks, where they touch neither a mark nor another name; and the legend below a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dashboard.pictures.marks import outline
from dashboard.pictures.svg import cut, element, text, width_of

ROW = 18


@dataclass(frozen=True)
class Ground:
    """Where names may stand: from ``left`` to ``right``, not below ``floor``; none longer than ``longest``."""

    left: float
    right: float
    floor: float
    longest: float


@dataclass(frozen=True)
class _Box:
    """The room that a label or a mark takes."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


Named = tuple[str, float, float]
"""A name and the place of its mark."""


def labels(named: Iterable[Named], marks: Iterable[tuple[float, float]], ground: Ground) -> list[object]:
    """Direct labels for ``named``, kept clear of all ``marks``; from the top downward."""
    taken = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y in marks]
    shapes: list[object] = []
    for label, x, y in sorted(named, key=lambda one: one[2]):
        words = cut(label, ground.longest, 12)
        anchor, at, height, box = _free_place(x, y, width_of(words, 12), taken, ground)
        taken.append(box)
        shapes.append(text(at, height, words, class_="label halo", anchor=anchor))
    return shapes


def _free_place(
    x: float, y: float, width: float, taken: Sequence[_Box], ground: Ground
) -> tuple[str | None, float, float, _Box]:
    """Anchor and place of a label for a mark at ``x``, ``y``: the nearest that is free, right before left."""
    places: list[tuple[str | None, float, float, _Box]] = []
    for shift in (0, -13, 13, -26, 26, -39, 39):
        middle = min(max(y + shift, 8), ground.floor - 6)
        if x + 10 + width <= ground.right:
            places.append((None, x + 10, middle, _Box(x + 8, middle - 6, x + 10 + width, middle + 6)))
        if x - 10 - width >= ground.left:
            places.append(("end", x - 10, middle, _Box(x - 10 - width, middle - 6, x - 8, middle + 6)))
    free = next((one for one in places if not any(one[3].meets(other) for other in taken)), places[0])
    return free[0], free[1], free[2] + 4, free[3]


def legend(
    entries: Iterable[tuple[str, str, str]], *, left: float, right: float, y: float
) -> tuple[list[object], float]:
    """``entries``: colour, shape and words of each. Returns the shapes and how high the drawing becomes."""
    shapes: list[object] = []
    x = left
    for tone, shape, words in entries:
        room = 14 + width_of(words) + 16
        if x + room > right and x > left:
            x, y = left, y + ROW
        mark = element("path", d=outline(shape, x + 5, y - 4), class_=f"mark {tone}")
        shapes += [mark, text(x + 15, y, words, class_="note")]
        x += room
    return shapes, y + 8
