"""The loss curve of a training, also while it runs: a line over the training steps on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.utils.translation import gettext as _

from dashboard.formats import significant
from dashboard.pictures.svg import Picture, drawing, element, line, text

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 150, 60, 24
MOST_POINTS, MOST_ROWS, MOST_DECADES = 200, 50, 5
SMALL = 1e-3


@dataclass(frozen=True)
class Training:
    """``losses``: before each training step, first to last; ``total``: steps that there will be, while it runs.

    ``held_out``: what it came to on held-out text, as :func:`dashboard.pictures.heldout_picture` takes it.
    ``replaces``: more and more of the model is replaced meanwhile, so that a loss may rise although it learns.
    """

    losses: Sequence[float] = ()
    held_out: Sequence[Mapping[str, Any]] = ()
    total: int = 0
    replaces: bool = False

    @property
    def is_running(self) -> bool:
        return self.total > len(self.losses)

    @property
    def drawn(self) -> list[tuple[int, float]]:
        """The losses that a logarithmic scale can show, with their places: one of nothing has none."""
        return [(at, loss) for at, loss in enumerate(self.losses) if math.isfinite(loss) and loss > 0]


def curve_picture(losses: Sequence[float]) -> Picture | None:
    """Of a distillation. ``losses``: the loss before each training step, first to last."""
    training = Training(losses)
    if len(training.drawn) < 2:
        return None
    title = _("Distillation: the loss goes from %(first)s to %(last)s in %(steps)s steps")
    return _picture(title % _ends(training), training)


def training_picture(training: Training) -> Picture | None:
    """Of a training that belongs to the method, also while it runs; None before two steps are known."""
    return _picture(_finding(training), training) if len(training.drawn) >= 2 else None


def _picture(title: str, training: Training) -> Picture:
    drawn = training.drawn
    scale = _Scale([loss for _at, loss in drawn], max(len(training.losses), training.total))
    path = "M" + " L".join(f"{scale.x(at):.1f},{scale.y(loss):.1f}" for at, loss in _thinned(drawn))
    floor = HEIGHT - BOTTOM
    shapes = [
        line(LEFT, floor, WIDTH - 8, floor, class_="axis"),
        text(LEFT - 6, 16, _tick(10**scale.high), class_="tick", anchor="end"),
        text(LEFT - 6, floor - 4, _tick(10**scale.low), class_="tick", anchor="end"),
        text(LEFT, HEIGHT - 6, "1", class_="tick"),
        text(WIDTH - 8, HEIGHT - 6, scale.steps, class_="tick", anchor="end"),
        text((LEFT + WIDTH) / 2, HEIGHT - 6, _("training step (loss on a log scale)"), class_="note", anchor="middle"),
        element("path", element("title", title), d=path, class_="curve"),
    ]
    every = max(1, len(training.losses) // MOST_ROWS)
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, HEIGHT, shapes),
        columns=(_("training step"), _("loss")),
        rows=[(at + 1, significant(loss, 4)) for at, loss in enumerate(training.losses) if at % every == 0],
        numeric=frozenset({0, 1}),
        note=_note(training),
    )


def _tick(value: float) -> str:
    """Short enough for the margin, however small."""
    return significant(value) if value >= SMALL else f"{value:.0e}"


class _Scale:
    """Training steps to x, and losses to y by their logarithms."""

    def __init__(self, values: Sequence[float], steps: int) -> None:
        logs = [math.log10(value) for value in values]
        self.high, self.steps = max(logs), steps
        self.low = max(min(logs), self.high - MOST_DECADES)

    def x(self, step: float) -> float:
        """``step`` from 0 on."""
        return LEFT + min(1.0, step / (self.steps - 1)) * (WIDTH - LEFT - 8)

    def y(self, value: float) -> float:
        """What is smaller than the scale lies on its lower end."""
        floor = HEIGHT - BOTTOM
        share = max(0.0, math.log10(value) - self.low) / (self.high - self.low or 1.0)
        return floor - 8 - share * (floor - 18)


def _ends(training: Training) -> dict[str, object]:
    """What the title says; a loss below the scale stands where a step had nothing to learn, and is no end."""
    drawn = [loss for _at, loss in training.drawn]
    losses = [loss for loss in drawn if loss * 10**MOST_DECADES >= max(drawn)]
    return {
        "first": significant(losses[0]),
        "last": significant(losses[-1]),
        "steps": len(training.losses),
        "total": training.total,
    }


def _finding(training: Training) -> str:
    if training.is_running:
        title = _("Training so far: the loss goes from %(first)s to %(last)s in %(steps)s of %(total)s steps")
    else:
        title = _("Training: the loss goes from %(first)s to %(last)s in %(steps)s steps")
    return title % _ends(training)


def _note(training: Training) -> str:
    notes = []
    if training.replaces:
        notes.append(_("More and more of the model is replaced meanwhile, so the loss may rise though it learns."))
    if training.is_running:
        notes.append(_("It shows the steps of those parts of the training that are done."))
    return " ".join(notes)


def _thinned(drawn: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A bounded number of them, evenly, the first and the last among them."""
    last = len(drawn) - 1
    if last < MOST_POINTS:
        return list(drawn)
    return [drawn[at] for at in sorted({round(one * last / (MOST_POINTS - 1)) for one in range(MOST_POINTS)})]
