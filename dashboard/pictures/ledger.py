"""Where the bytes are: an artifact's bar beside the uncompressed one, and the same bar enlarged by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.utils.translation import gettext as _

from dashboard.formats import byte_words, percent_words, ratio_words, whole
from dashboard.pictures.svg import Picture, drawing, element, rect, text

WIDTH, LEFT, BAR = 720, 118, 22
TONES = 8


def ledger_picture(parts: Sequence[Mapping[str, Any]], source_bytes: int) -> Picture:
    """``parts``: ``{"name", "bytes"}`` adding up to every byte of the artifact."""
    total = sum(int(part["bytes"]) for part in parts) or 1
    ordered = sorted(parts, key=lambda part: -int(part["bytes"]))
    largest = ordered[0]["name"] if ordered else "–"
    title = _("%(ratio)s smaller: %(before)s become %(after)s; most of it is %(part)s") % {
        "ratio": ratio_words(source_bytes / total),
        "before": byte_words(source_bytes),
        "after": byte_words(total),
        "part": largest,
    }
    room, scale = WIDTH - LEFT - 8, max(source_bytes, total)
    shapes = [
        text(0, 16, _("uncompressed"), class_="label"),
        rect(LEFT, 0, room * source_bytes / scale, BAR, class_="fill-muted", hover=byte_words(source_bytes)),
        text(0, 46, _("artifact"), class_="label"),
        rect(LEFT, 30, max(room * total / scale, 1.5), BAR, class_="fill-accent", hover=byte_words(total)),
        text(0, 94, _("enlarged"), class_="label"),
        *_funnel(room, total / scale),
        *_segments(ordered, total, room),
    ]
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, 126, shapes),
        columns=(_("part"), _("bytes"), _("share")),
        rows=[(part["name"], whole(int(part["bytes"])), percent_words(int(part["bytes"]) / total)) for part in ordered],
        numeric=frozenset({1, 2}),
    )


def _funnel(room: float, share: float) -> list[object]:
    end = LEFT + max(room * share, 1.5)
    return [element("path", d=f"M{LEFT},52 L{end:.1f},52 L{LEFT + room:.1f},78 L{LEFT},78 Z", class_="funnel")]


def _segments(parts: Sequence[Mapping[str, Any]], total: int, room: float) -> list[object]:
    shapes: list[object] = []
    x = float(LEFT)
    for number, part in enumerate(parts):
        width = room * int(part["bytes"]) / total
        hover = f"{part['name']} · {byte_words(part['bytes'])} · {percent_words(int(part['bytes']) / total)}"
        shapes.append(rect(x, 78, width, BAR, class_=f"tone-{number % TONES}", hover=hover))
        if width > 7 * len(str(part["name"])):
            shapes.append(text(x + 2, 116, part["name"], class_="note"))
        x += width
    return shapes
