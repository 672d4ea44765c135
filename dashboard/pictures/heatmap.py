"""The error of every matrix: one cell each with its number in it; the stronger the colour, the larger the error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from django.utils.translation import gettext as _

from dashboard.formats import byte_words, significant
from dashboard.pictures.matrices import NUMBERS, ROW, Cell, Grid, Layout, Matrix, grid
from dashboard.pictures.svg import Picture, cut, drawing, rect, text, width_of

LEVELS, SWATCH = 7, 46
STRONG = 4
"""From this level on, numbers are written in the colour of paper."""


class Measure(Enum):
    """What the numbers of a heatmap are."""

    ERROR = "error"  # of the weights, relative
    PROXY = "proxy"  # of the layer's outputs on the calibration text, relative

    @property
    def label(self) -> str:
        return _("relative error") if self is Measure.ERROR else _("relative proxy loss")

    @property
    def about(self) -> str:
        if self is Measure.ERROR:
            return _("Rows are blocks, columns are kinds of matrix. The number in a cell is its relative error.")
        return _("Rows are blocks, columns are kinds of matrix. The number in a cell is its relative proxy loss.")


def heatmap_picture(matrices: Sequence[Matrix], measure: Measure = Measure.ERROR) -> Picture | None:
    """None while no error of any matrix is known. ``measure``: what each matrix's ``error`` holds."""
    known = [one for one in matrices if one.error is not None]
    errors = [one.error for one in known if one.error is not None and math.isfinite(one.error)]
    if not errors:
        return None
    shown = grid(known)
    scale = Scale(min(errors), max(errors))
    layout = Layout.of(shown)
    worst = max(known, key=_size)
    title = _finding(worst, scale, measure)
    shapes = layout.frame()
    for cell in shown.in_order():
        shapes += _cell(cell, *layout.at(cell), layout.cell, scale, is_worst=worst in cell.matrices)
    outside, y = _outside(shown, layout.bottom, scale)
    legend, height = _legend(scale, y + 16, measure)
    columns, rows, numeric = _table(shown, measure)
    return Picture(
        title=title,
        svg=drawing(title, layout.width, height, [*shapes, *outside, *legend], about=measure.about),
        columns=columns,
        rows=rows,
        numeric=numeric,
        note=_several(shown),
    )


class Scale:
    """Errors to seven levels, evenly between the smallest and the largest."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def level(self, value: float) -> int:
        if self.high <= self.low:
            return 0
        return min(LEVELS - 1, int((value - self.low) / (self.high - self.low) * LEVELS))

    def edge(self, level: int) -> float:
        """Where ``level`` begins."""
        return self.low + (self.high - self.low) * (level / LEVELS)


def _size(one: Matrix) -> float:
    return one.error if one.error is not None and math.isfinite(one.error) else -math.inf


def worst_of(cell: Cell) -> Matrix:
    return max(cell.matrices, key=_size)


def _finding(worst: Matrix, scale: Scale, measure: Measure) -> str:
    words = {"low": short_number(scale.low), "high": short_number(scale.high), "name": worst.name}
    if scale.high <= scale.low:
        same = {"error": significant(scale.low, 2)}
        if measure is Measure.ERROR:
            return _("Relative error %(error)s in every matrix") % same
        return _("Relative proxy loss %(error)s in every matrix") % same
    if measure is Measure.ERROR:
        return _("Relative error between %(low)s and %(high)s; the largest is %(name)s") % words
    return _("Relative proxy loss between %(low)s and %(high)s; the largest is %(name)s") % words


def short_number(value: float | None) -> str:
    """A number that fits into a cell."""
    if value is None or not math.isfinite(value):
        return "?"
    if abs(value) >= 1000 or 0 < abs(value) < 0.0005:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return significant(value, 2 if abs(value) >= 0.0995 else 1)


def _cell(cell: Cell, x: float, y: float, width: float, scale: Scale, *, is_worst: bool) -> list[object]:
    found = worst_of(cell)
    return _mark(found, _hover(cell), x, y, width, scale, is_worst=is_worst)


def _mark(
    one: Matrix, hover: str, x: float, y: float, width: float, scale: Scale, *, is_worst: bool = False
) -> list[object]:
    if one.error is None or not math.isfinite(one.error):
        box, ink = "heat-none", "cell"
    else:
        level = scale.level(one.error)
        box, ink = f"heat-{level}", "cell strong" if level >= STRONG else "cell"
    shapes: list[object] = [
        rect(x, y, width - 1, ROW - 1, class_=f"{box} worst" if is_worst else box, hover=hover),
        text(x + (width - 1) / 2, y + 12, short_number(one.error), class_=ink, anchor="middle"),
    ]
    return shapes


def _hover(cell: Cell) -> str:
    if len(cell.matrices) == 1:
        return _words(cell.matrices[0])
    errors = [one.error for one in cell.matrices if one.error is not None and math.isfinite(one.error)]
    if not errors:
        return cell.name
    return _("%(name)s: %(low)s to %(high)s, mean %(mean)s") % {
        "name": cell.name,
        "low": significant(min(errors)),
        "high": significant(max(errors)),
        "mean": significant(sum(errors) / len(errors)),
    }


def _words(one: Matrix) -> str:
    pieces = [one.name, significant(one.error, 4), one.coding]
    if one.size_bytes is not None:
        pieces.append(byte_words(one.size_bytes))
    return " · ".join(piece for piece in pieces if piece)


def _outside(shown: Grid, y: float, scale: Scale) -> tuple[list[object], float]:
    """What lies in no block, one line each: a cell and its name."""
    if not shown.outside:
        return [], y
    y += 8 if shown.cells else 0
    shapes: list[object] = []
    for one in shown.outside:
        shapes += _mark(one, _words(one), NUMBERS, y, 64, scale)
        shapes.append(text(NUMBERS + 72, y + 12, cut(one.name, 300), class_="note"))
        y += ROW
    return shapes, y


def _legend(scale: Scale, y: float, measure: Measure) -> tuple[list[object], float]:
    """The scale of colours with the errors at which each begins and ends."""
    words = measure.label
    left = max(float(NUMBERS), width_of(words) + 10)
    shapes: list[object] = [text(0, y + 9, words, class_="note")]
    levels = range(LEVELS) if scale.high > scale.low else range(1)
    for level in levels:
        shapes.append(rect(left + level * SWATCH, y, SWATCH - 1, 11, class_=f"heat-{level}"))
        shapes.append(text(left + level * SWATCH, y + 24, _edge(scale.edge(level)), class_="tick"))
    if scale.high > scale.low:
        end = left + LEVELS * SWATCH
        shapes.append(text(end, y + 24, _edge(scale.high), class_="tick"))
    return shapes, y + 30


def _edge(value: float) -> str:
    """An edge of the scale of colours, with a digit more than a cell has room for."""
    return significant(value, 2) if 0.0005 <= abs(value) < 0.0995 else short_number(value)


def _several(shown: Grid) -> str:
    if all(len(cell.matrices) == 1 for cell in shown.cells.values()):
        return ""
    return _("Where a cell stands for all experts of a block, it shows the largest error among them.")


def _table(shown: Grid, measure: Measure) -> tuple[list[str], list[tuple[object, ...]], frozenset[int]]:
    """A line for each cell; columns only for what is known of any matrix."""
    lines = [(cell.name, cell.matrices) for cell in shown.in_order()] + [(one.name, (one,)) for one in shown.outside]
    every = [one for _name, matrices in lines for one in matrices]
    wanted = [True, any(one.output_error is not None for one in every)]
    wanted += [any(one.coding for one in every), any(one.size_bytes is not None for one in every)]
    heads = (measure.label, _("error of the output"), _("coding"), _("bytes"))
    columns = [head for head, is_wanted in zip(heads, wanted, strict=True) if is_wanted]
    rows: list[tuple[object, ...]] = []
    for name, matrices in lines:
        cells = (
            significant(max(matrices, key=_size).error, 4),
            _largest([one.output_error for one in matrices]),
            ", ".join(sorted({one.coding for one in matrices if one.coding})) or "–",
            byte_words(sum(one.size_bytes or 0 for one in matrices)),
        )
        rows.append((name, *(cell for cell, is_wanted in zip(cells, wanted, strict=True) if is_wanted)))
    numeric = frozenset(at + 1 for at, head in enumerate(columns) if head != heads[2])
    return [_("matrix"), *columns], rows, numeric


def _largest(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return significant(max(known), 4) if known else "–"
