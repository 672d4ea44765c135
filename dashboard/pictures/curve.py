"""The loss curve of a training: one line over the training steps, on a logarithmic scale when it falls far."""

from __future__ import annotations

import math
from collections.abc import Sequence

from django.utils.translation import gettext as _

from dashboard.formats import significant
from dashboard.pictures.svg import Picture, drawing, element, line, text

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 150, 60, 24


def curve_picture(losses: Sequence[float], *, is_distillation: bool = True) -> Picture | None:
    """``losses``: the loss before each training step, first to last."""
    losses = [loss for loss in losses if math.isfinite(loss) and loss > 0]
    if len(losses) < 2:
        return None
    words = {"first": significant(losses[0]), "last": significant(losses[-1]), "steps": len(losses)}
    if is_distillation:
        title = _("Distillation: the loss goes from %(first)s to %(last)s in %(steps)s steps") % words
    else:
        title = _("Training: the loss goes from %(first)s to %(last)s in %(steps)s steps") % words
    logs = [math.log10(loss) for loss in losses]
    low, high = min(logs), max(logs)
    span = high - low or 1.0
    floor = HEIGHT - BOTTOM
    points = [
        (LEFT + at / (len(logs) - 1) * (WIDTH - LEFT - 8), floor - 8 - (value - low) / span * (floor - 18))
        for at, value in enumerate(logs)
    ]
    path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    shapes = [
        line(LEFT, floor, WIDTH - 8, floor, class_="axis"),
        text(LEFT - 6, 16, significant(10**high), class_="tick", anchor="end"),
        text(LEFT - 6, floor - 4, significant(10**low), class_="tick", anchor="end"),
        text(LEFT, HEIGHT - 6, "1", class_="tick"),
        text(WIDTH - 8, HEIGHT - 6, len(losses), class_="tick", anchor="end"),
        text((LEFT + WIDTH) / 2, HEIGHT - 6, _("training step (loss on a log scale)"), class_="note", anchor="middle"),
        element("path", element("title", title), d=path, class_="curve"),
    ]
    every = max(1, len(losses) // 50)
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, HEIGHT, shapes),
        columns=(_("training step"), _("loss")),
        rows=[(at + 1, significant(loss, 4)) for at, loss in enumerate(losses) if at % every == 0],
        numeric=frozenset({0, 1}),
    )
