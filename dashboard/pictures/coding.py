"""How each matrix is stored, where that differs from matrix to matrix: a short sign in each cell, and what it means."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from dashboard.formats import byte_words, percent_words, significant, whole
from dashboard.pictures.matrices import NUMBERS, ROW, Cell, Layout, Matrix, grid
from dashboard.pictures.svg import Picture, cut, drawing, rect, text, width_of

TONES = 8
SIGNS = {
    "tensor": "T", "row": "R", "column": "C", "group": "G", "masks": "M", "rank": "r", "raw": "=", "dropped": "×",
    "sign": "S", "signs": "S", "bits": "b", "groups": "g", "whole": "", "rows": "w",
    "on": "@", "block": "", "tuned": "t",
}  # fmt: skip
AS_IT_WAS = "whole"
"""The coding of a matrix that is stored as it came, beside others that are not."""
LONGEST_SIGN = 9
MIXED = "…"


def coding_picture(matrices: Sequence[Matrix]) -> Picture | None:
    """None where all matrices of the blocks are stored the same way, or nothing is known of it."""
    known = [one for one in matrices if one.coding]
    shown = grid(known)
    if len({one.coding for cell in shown.cells.values() for one in cell.matrices}) < 2:
        return None
    by_coding: dict[str, list[Matrix]] = defaultdict(list)
    for one in known:
        by_coding[one.coding].append(one)
    ordered = sorted(by_coding, key=lambda coding: (-len(by_coding[coding]), coding))
    signs = sign_table(ordered)
    layout = Layout.of(shown, cell=max(width_of(sign, 10) for sign in signs.values()) + 8)
    title = _finding(ordered[0], len(by_coding[ordered[0]]), len(known))
    shapes = layout.frame()
    for cell in shown.in_order():
        shapes += _cell(cell, *layout.at(cell), layout.cell, ordered, signs)
    y = layout.bottom + 8
    for one in shown.outside:
        shapes += _mark(f"{one.name} · {one.coding}", [one.coding], NUMBERS, y, 64, ordered, signs)
        shapes.append(text(NUMBERS + 72, y + 12, cut(one.name, 300), class_="note"))
        y += ROW
    legend, height = _legend(by_coding, ordered, signs, y + 16, layout.width)
    about = _("Rows are blocks, columns are kinds of matrix. The sign in a cell says how the matrix is stored.")
    return Picture(
        title=title,
        svg=drawing(title, layout.width, height, [*shapes, *legend], about=about),
        columns=(_("coding"), _("sign"), _("matrices"), _("share"), _("bytes"), _("mean relative error")),
        rows=[_row(coding, signs[coding], by_coding[coding], len(known)) for coding in ordered],
        numeric=frozenset({2, 3, 4, 5}),
    )


def _finding(coding: str, count: int, total: int) -> str:
    words = {"coding": coding, "count": count, "total": total}
    if coding == AS_IT_WAS:
        return _("Most matrices are stored as they were: %(count)s of %(total)s") % words
    return _("Most matrices are stored by %(coding)s: %(count)s of %(total)s") % words


def sign_table(codings: Sequence[str]) -> dict[str, str]:
    """A short sign for each coding, no two the same: ``2 masks`` -> ``2M``, ``4 bits, 3 groups`` -> ``4b3g``."""
    signs: dict[str, str] = {}
    for coding in codings:
        pieces = re.findall(r"\d+|[^\W\d]+", coding)
        sign = "".join(SIGNS.get(piece, piece if piece.isdecimal() else piece[:2]) for piece in pieces)[
            :LONGEST_SIGN
        ] or (SIGNS["raw"] if coding == AS_IT_WAS else "?")
        while sign in signs.values():
            sign += "'"
        signs[coding] = sign
    return signs


def _cell(cell: Cell, x: float, y: float, width: float, ordered: Sequence[str], signs: dict[str, str]) -> list[object]:
    codings = sorted({one.coding for one in cell.matrices})
    return _mark(f"{cell.name} · {', '.join(codings)}", codings, x, y, width, ordered, signs)


def _mark(
    hover: str,
    codings: Sequence[str],
    x: float,
    y: float,
    width: float,
    ordered: Sequence[str],
    signs: dict[str, str],
) -> list[object]:
    """A sign over a line in the colour of its coding; several codings in one cell have neither."""
    shapes: list[object] = [rect(x, y, width - 1, ROW - 1, class_="ground", hover=hover)]
    if len(codings) == 1:
        shapes.append(rect(x, y + ROW - 4, width - 1, 3, class_=_tone(ordered, codings[0])))
    sign = signs[codings[0]] if len(codings) == 1 else MIXED
    shapes.append(text(x + (width - 1) / 2, y + 11, sign, class_="cell", anchor="middle"))
    return shapes


def _tone(ordered: Sequence[str], coding: str) -> str:
    return f"tone-{ordered.index(coding) % TONES}"


def _legend(
    by_coding: dict[str, list[Matrix]], ordered: Sequence[str], signs: dict[str, str], y: float, width: float
) -> tuple[list[object], float]:
    shapes: list[object] = []
    x = float(NUMBERS)
    for coding in ordered:
        count = len(by_coding[coding])
        words = f"{signs[coding]}  {coding}: " + ngettext("%(count)s matrix", "%(count)s matrices", count) % {
            "count": whole(count)
        }
        room = 18 + width_of(words) + 16
        if x + room > width and x > NUMBERS:
            x, y = float(NUMBERS), y + 18
        shapes += [rect(x, y - 4, 12, 4, class_=_tone(ordered, coding)), text(x + 18, y, words, class_="note")]
        x += room
    return shapes, y + 10


def _row(coding: str, sign: str, matrices: Sequence[Matrix], total: int) -> tuple[object, ...]:
    sizes = [one.size_bytes for one in matrices if one.size_bytes is not None]
    errors = [one.error for one in matrices if one.error is not None and math.isfinite(one.error)]
    return (
        coding,
        sign,
        whole(len(matrices)),
        percent_words(len(matrices) / total),
        byte_words(sum(sizes)) if sizes else "–",
        significant(sum(errors) / len(errors)) if errors else "–",
    )
