"""Where the bytes are: an artifact's bar beside the uncompressed one, to scale, and the same bar enlarged by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.utils.translation import gettext as _

from dashboard.formats import byte_words, percent_words, ratio_words, whole
from dashboard.glossary import part_label, part_meaning
from dashboard.pictures.svg import Picture, drawing, element, rect, text, width_of

WIDTH, LEFT, BAR = 720, 118, 22
ROOM = WIDTH - LEFT - 8
ENLARGED, NAMES, LEGEND = 78, 115, 152
TONES: dict[str, int] = {
    "codes": 0, "masks": 1, "embeddings": 2, "head": 3, "scales": 4, "residual": 5, "adapter": 5, "deltas": 5,
    "linears": 0, "norms": 6, "headers": 6,
}  # fmt: skip
"""The same part has the same colour on every page; parts that are not named here share the last one."""
OTHER_TONE = 7


def ledger_picture(parts: Sequence[Mapping[str, Any]], source_bytes: int) -> Picture | None:
    """``parts``: ``{"name", "bytes"}`` adding up to every byte of the artifact. None where there are no bytes."""
    ordered = sorted(
        ((str(part["name"]), int(part["bytes"])) for part in parts if int(part["bytes"]) > 0),
        key=lambda part: (-part[1], part[0]),
    )
    total = sum(size for _name, size in ordered)
    if not total:
        return None
    title = _finding(ordered[0][0], total, source_bytes)
    scale = max(source_bytes, total)
    shapes = [
        *_bar(0, _("uncompressed"), source_bytes, scale, "fill-muted"),
        *_bar(30, _("artifact"), total, scale, "fill-accent"),
        _funnel(total / scale),
        text(0, ENLARGED + 15, _("enlarged"), class_="label"),
    ]
    segments, narrow = _segments(ordered, total)
    legend, height = _legend(narrow, total)
    about = _("Two bars to the same scale; the artifact's bar is drawn once more over the whole width, by part.")
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, height, [*shapes, *segments, *legend], about=about),
        columns=(_("part"), _("bytes"), _("share"), _("of the uncompressed bytes"), _("what it is")),
        rows=[
            (part_label(name), whole(size), percent_words(size / total), _share(size, source_bytes), part_meaning(name))
            for name, size in ordered
        ]
        + [(_("all"), whole(total), percent_words(1.0), _share(total, source_bytes), "")],
        numeric=frozenset({1, 2, 3}),
    )


def _share(size: int, source_bytes: int) -> str:
    return percent_words(size / source_bytes, 2) if source_bytes else "–"


def _finding(largest: str, total: int, source_bytes: int) -> str:
    words = {
        "ratio": ratio_words(source_bytes / total),
        "before": byte_words(source_bytes),
        "after": byte_words(total),
        "part": part_label(largest),
    }
    if total >= source_bytes:
        return _("Not smaller: %(before)s become %(after)s; most of it is %(part)s") % words
    return _("%(ratio)s smaller: %(before)s become %(after)s; most of it is %(part)s") % words


def _bar(y: float, label: str, size: int, scale: int, class_: str) -> list[object]:
    return [
        text(0, y + 10, label, class_="label"),
        text(0, y + 22, byte_words(size), class_="tick"),
        rect(LEFT, y, max(ROOM * size / scale, 1.5), BAR, class_=class_, hover=f"{label} · {byte_words(size)}"),
    ]


def _funnel(share: float) -> object:
    end = LEFT + max(ROOM * share, 1.5)
    path = f"M{LEFT},52 L{end:.1f},52 L{LEFT + ROOM:.1f},{ENLARGED} L{LEFT},{ENLARGED} Z"
    return element("path", d=path, class_="funnel")


def _tone(name: str) -> int:
    return TONES.get(name, OTHER_TONE)


def _segments(parts: Sequence[tuple[str, int]], total: int) -> tuple[list[object], list[tuple[str, int]]]:
    """The enlarged bar with names where they fit, and the parts whose names do not."""
    shapes: list[object] = []
    narrow = []
    x = float(LEFT)
    for name, size in parts:
        width = ROOM * size / total
        words, figures = part_label(name), f"{byte_words(size)} · {percent_words(size / total)}"
        shapes.append(rect(x, ENLARGED, width, BAR, class_=f"segment tone-{_tone(name)}", hover=f"{words} · {figures}"))
        if max(width_of(words), width_of(figures, 10)) < width - 6:
            shapes += [
                text(x + 1, NAMES, words, class_="note"),
                text(x + 1, NAMES + 13, figures, class_="tick"),
            ]
        else:
            narrow.append((name, size))
        x += width
    return shapes, narrow


def _legend(parts: Sequence[tuple[str, int]], total: int) -> tuple[list[object], float]:
    """The parts too narrow to be named under the bar, in the bar's order; and how high the drawing becomes."""
    if not parts:
        return [], NAMES + 20
    shapes: list[object] = [text(0, LEGEND, _("small parts"), class_="label")]
    x, y = float(LEFT), float(LEGEND)
    for name, size in parts:
        words = f"{part_label(name)} {byte_words(size)}"
        room = 16 + width_of(words) + 18
        if x + room > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 18
        hover = f"{part_label(name)} · {byte_words(size)} · {percent_words(size / total)}"
        shapes += [
            rect(x, y - 10, 11, 11, class_=f"tone-{_tone(name)}", hover=hover),
            text(x + 16, y, words, class_="note"),
        ]
        x += room
    return shapes, y + 8
