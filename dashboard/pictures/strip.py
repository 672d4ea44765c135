"""The layer strip: one cell per matrix, rows by kind, columns by layer; the darker, the larger the relative error."""

from __future__ import annotations

import re
from collections.abc import Mapping

from django.utils.translation import gettext as _

from dashboard.formats import significant
from dashboard.pictures.svg import Picture, drawing, rect, text

LEFT, CELL, LEVELS = 96, 20, 7
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")


ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _reading_order(kind: str) -> tuple[int, str]:
    """As a token passes through a block; unknown kinds come last, by name."""
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), kind)


def layer_and_kind(name: str) -> tuple[int, str] | None:
    """``model.layers.3.self_attn.q_proj.weight`` -> (3, "q_proj"); None for what lies outside the blocks."""
    found = LAYER.search(name.removesuffix(".weight"))
    return (int(found[1]), found[2].rsplit(".", 1)[-1]) if found else None


def strip_picture(errors: Mapping[str, float]) -> Picture | None:
    """``errors``: matrix name -> relative error of its delta."""
    cells = {place: (name, value) for name, value in errors.items() if (place := layer_and_kind(name))}
    if not cells:
        return None
    kinds = sorted({kind for _layer, kind in cells}, key=_reading_order)
    layers = sorted({layer for layer, _kind in cells})
    worst_name, worst = max(cells.values(), key=lambda cell: cell[1])
    low = min(value for _name, value in cells.values())
    cell = CELL if len(layers) <= 34 else max(8, 680 // len(layers))
    title = _("Relative error between %(low)s and %(high)s; the largest is %(name)s") % {
        "low": significant(low, 2),
        "high": significant(worst, 2),
        "name": worst_name,
    }
    shapes: list[object] = [text(0, row * CELL + 14, kind, class_="label") for row, kind in enumerate(kinds)]
    for (layer, kind), (name, value) in cells.items():
        x, y = LEFT + layers.index(layer) * cell, kinds.index(kind) * CELL
        shapes.append(
            rect(
                x,
                y,
                cell - 1,
                CELL - 1,
                class_=f"heat-{_level(value, low, worst)}",
                hover=f"{name} · {significant(value)}",
            )
        )
    shapes += _axis(layers, cell, len(kinds) * CELL + 14)
    width = max(LEFT + len(layers) * cell + 8, 300)
    return Picture(
        title=title,
        svg=drawing(title, width, len(kinds) * CELL + 20, shapes),
        columns=(_("matrix"), _("relative error")),
        rows=[(name, significant(value, 4)) for name, value in cells.values()],
        numeric=frozenset({1}),
    )


def _level(value: float, low: float, high: float) -> int:
    return round((value - low) / (high - low) * (LEVELS - 1)) if high > low else 0


def _axis(layers: list[int], cell: int, y: float) -> list[object]:
    every = max(1, len(layers) // 10)
    return [
        text(LEFT + column * cell + cell / 2, y, layer, class_="tick", anchor="middle")
        for column, layer in enumerate(layers)
        if column % every == 0
    ]
