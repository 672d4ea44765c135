"""A training on text that it did not learn from: the KL divergence to the teacher over the tokens it has read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from django.utils.translation import gettext as _

from dashboard.formats import significant
from dashboard.pictures.svg import Picture, drawing, element, line, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 150, 60, 12, 10, 24


def heldout_picture(curve: Sequence[Mapping[str, Any]]) -> Picture | None:
    """``curve``: points with ``phase``, ``tokens`` read so far, ``kl`` in nats and ``ce``; None with fewer than two."""
    known = [point for point in curve if _sound(point)]
    if len(known) < 2:
        return None
    first, last = known[0], known[-1]
    words = {
        "first": significant(first["kl"]), "last": significant(last["kl"]), "tokens": f"{last['tokens']:,}"
    }  # fmt: skip
    if last["kl"] < first["kl"]:
        title = _("On held-out text KL falls from %(first)s to %(last)s nats over %(tokens)s tokens") % words
    else:
        title = _("On held-out text KL does not fall: %(first)s nats before, %(last)s after %(tokens)s tokens") % words
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, HEIGHT, _shapes(known)),
        columns=(_("after"), _("training tokens"), _("KL, nats"), _("cross-entropy, nats")),
        rows=[_row(point) for point in known],
        numeric=frozenset({1, 2, 3}),
    )


def _sound(point: Mapping[str, Any]) -> bool:
    return math.isfinite(point["kl"]) and point["kl"] > 0


def _row(point: Mapping[str, Any]) -> tuple[object, ...]:
    ce = point.get("ce")
    shown = "–" if ce is None or not math.isfinite(ce) else significant(ce, 4)
    return (_phase(point["phase"]), f"{point['tokens']:,}", significant(point["kl"], 4), shown)


def _phase(name: str) -> str:
    """What had been done when a point was measured."""
    known = {
        "base": _("nothing: the packed base alone"),
        "start": _("what training begins with"),
        "train": _("training"),
        "lrec": _("error correction"),
        "emef": _("task tuning"),
    }
    return known.get(name, name)


def _shapes(points: Sequence[Mapping[str, Any]]) -> list[object]:
    logs = [math.log10(point["kl"]) for point in points]
    low, span = min(logs), (max(logs) - min(logs)) or 1.0
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    most = max(point["tokens"] for point in points) or 1
    places = [
        (LEFT + point["tokens"] / most * (right - LEFT), floor - 8 - (value - low) / span * (floor - 8 - TOP))
        for point, value in zip(points, logs, strict=True)
    ]
    marks = [
        element("circle", element("title", _hover(point)), cx=x, cy=y, r=3.5, class_="fill-accent")
        for point, (x, y) in zip(points, places, strict=True)
    ]
    return [
        line(LEFT, floor, right, floor, class_="axis"),
        text(LEFT - 6, TOP + 4, significant(10 ** max(logs)), class_="tick", anchor="end"),
        text(LEFT - 6, floor - 4, significant(10**low), class_="tick", anchor="end"),
        text(LEFT, HEIGHT - 6, "0", class_="tick"),
        text(right, HEIGHT - 6, f"{most:,}", class_="tick", anchor="end"),
        text((LEFT + right) / 2, HEIGHT - 6, _("training tokens (KL on a log scale)"), class_="note", anchor="middle"),
        element("path", d="M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in places), class_="curve"),
        *marks,
    ]


def _hover(point: Mapping[str, Any]) -> str:
    words = {"phase": _phase(point["phase"]), "tokens": f"{point['tokens']:,}", "kl": significant(point["kl"], 4)}
    return _("after %(phase)s, %(tokens)s tokens: KL %(kl)s") % words
