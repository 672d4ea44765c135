"""The generation strip: who served what, in order, in one environment; rollbacks and refusals as marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.utils.timezone import localtime
from django.utils.translation import gettext as _

from dashboard.lifecycle import DeploymentKind, DeploymentState
from dashboard.pictures.svg import Picture, drawing, element, line, rect, text

WIDTH, HEIGHT, TOP, BAR = 760, 92, 22, 30


@dataclass(frozen=True)
class Generation:
    """One deployment: what answered from ``start`` until ``end`` (None: still does)."""

    number: int
    what: str
    kind: DeploymentKind
    state: DeploymentState
    start: datetime
    end: datetime | None
    who: str
    reason: str


def generations_picture(history: Sequence[Generation], environment: str) -> Picture | None:
    """``history`` oldest first; the last one is what the environment points at now."""
    if not history:
        return None
    now = history[-1]
    title = _("%(environment)s serves %(what)s, generation %(number)s") % {
        "environment": environment,
        "what": now.what,
        "number": now.number,
    }
    room = (WIDTH - 14) / len(history)
    shapes: list[object] = []
    for place, generation in enumerate(history):
        shapes += _segment(generation, place * room, room, is_now=generation is now)
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, HEIGHT, shapes),
        columns=(_("generation"), _("what"), _("kind"), _("state"), _("from"), _("until"), _("who"), _("why")),
        rows=[_row(generation) for generation in reversed(history)],
        numeric=frozenset({0}),
        wide=True,
    )


def _when(moment: datetime | None) -> str:
    return f"{localtime(moment):%Y-%m-%d %H:%M:%S}" if moment else ""


def _row(generation: Generation) -> tuple[object, ...]:
    return (
        generation.number,
        generation.what,
        generation.kind.label,
        generation.state.label,
        _when(generation.start),
        _when(generation.end),
        generation.who,
        generation.reason,
    )


def _tone(generation: Generation) -> str:
    if generation.state == DeploymentState.REFUSED:
        return "fill-bad"
    return "fill-accent" if generation.kind == DeploymentKind.COMPRESSED else "fill-muted"


def _cut(words: str, fits: int) -> str:
    return words if len(words) <= fits else words[: fits - 1] + "…"


def _segment(generation: Generation, x: float, room: float, *, is_now: bool) -> list[object]:
    hover = (
        f"{generation.number} · {generation.what} · {generation.state.label} · {generation.who}: {generation.reason}"
    )
    shapes: list[object] = [rect(x, TOP, room - 3, BAR, class_=_tone(generation), hover=hover)]
    if generation.kind == DeploymentKind.ROLLBACK:
        shapes += [
            line(x, TOP - 8, x, TOP + BAR + 8, class_="rollback-mark"),
            text(x + 3, TOP - 6, f"↩ {_('rollback')}" if room > 70 else "↩", class_="note"),
        ]
    if generation.state == DeploymentState.REFUSED:
        shapes.append(text(x + 3, TOP - 6, f"✗ {_('refused')}" if room > 70 else "✗", class_="note"))
    if is_now:
        tip = x + room - 3
        arrow = f"M{tip:.1f},{TOP} l10,{BAR / 2:g} l-10,{BAR / 2:g} Z"
        shapes.append(element("path", d=arrow, class_=_tone(generation)))
    fits = max(1, int(room / 6.2))
    shapes.append(text(x + 1, TOP + BAR + 17, generation.number, class_="label"))
    if fits > 6:
        shapes.append(text(x + 1, TOP + BAR + 33, _cut(generation.what, fits), class_="note"))
    return shapes
