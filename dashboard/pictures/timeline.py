"""The step timeline: one bar per step, as tall as it took long, attempts stacked, kills and losses marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from dashboard.formats import duration_words
from dashboard.glossary import group_label
from dashboard.lifecycle import AttemptOutcome, StepState
from dashboard.pictures.svg import Picture, drawing, line, rect, text

HEIGHT, LEFT, FLOOR = 118, 56, 92
BROKEN = frozenset({AttemptOutcome.ERRORED, AttemptOutcome.KILLED, AttemptOutcome.LOST})
TONES: dict[str, str] = {
    AttemptOutcome.RUNNING: "fill-accent",
    AttemptOutcome.DONE: "fill-good",
    AttemptOutcome.FAILED: "fill-bad",
    AttemptOutcome.ERRORED: "fill-bad",
    AttemptOutcome.KILLED: "fill-caution",
    AttemptOutcome.LOST: "fill-caution",
    AttemptOutcome.CANCELLED: "fill-muted",
    AttemptOutcome.BLOCKED: "fill-muted",
}


@dataclass(frozen=True)
class Bar:
    """One claim of a step: who, how long, how it ended."""

    number: int
    worker: str
    outcome: AttemptOutcome
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """One step with its attempts, oldest first."""

    index: int
    name: str
    group: str
    state: StepState
    reused: bool
    bars: tuple[Bar, ...]

    @property
    def seconds(self) -> float:
        return sum(bar.seconds for bar in self.bars)


def timeline_picture(columns: Sequence[Column]) -> Picture | None:
    if not columns:
        return None
    longest = max((column.seconds for column in columns), default=0) or 1.0
    width = min(28, max(5, 660 // len(columns)))
    title = _title(columns)
    shapes: list[object] = [
        line(LEFT, FLOOR, LEFT + len(columns) * width, FLOOR, class_="axis"),
        text(LEFT - 6, FLOOR - 62, duration_words(longest), class_="tick", anchor="end"),
        text(LEFT - 6, FLOOR, "0", class_="tick", anchor="end"),
    ]
    for place, column in enumerate(columns):
        shapes += _column(column, LEFT + place * width, width - 2, longest)
    shapes += _groups(columns, width)
    return Picture(
        title=title,
        svg=drawing(title, max(LEFT + len(columns) * width + 16, 320), HEIGHT, shapes),
        columns=(_("step"), _("state"), _("attempt"), _("worker"), _("outcome"), _("time"), _("what happened")),
        rows=_rows(columns),
        numeric=frozenset({2, 5}),
        wide=True,
    )


def _title(columns: Sequence[Column]) -> str:
    done = sum(column.state == StepState.DONE for column in columns)
    again = sum(bar.outcome in BROKEN for column in columns for bar in column.bars)
    reused = sum(column.reused for column in columns)
    words = _("%(done)s of %(total)s steps done") % {"done": done, "total": len(columns)}
    if reused:
        words += _("; %(count)s reused from an earlier job") % {"count": reused}
    if again:
        words += ngettext(
            "; %(count)s attempt was lost and repeated", "; %(count)s attempts were lost and repeated", again
        ) % {"count": again}
    return words


def _column(column: Column, x: float, width: float, longest: float) -> list[object]:
    y = float(FLOOR)
    shapes: list[object] = []
    for bar in column.bars:
        height = max(2.0, 66 * bar.seconds / longest)
        y -= height
        hover = f"{column.name} · {bar.outcome.label} · {duration_words(bar.seconds)} · {bar.worker}"
        shapes.append(rect(x, y, width, height - 0.6, class_=TONES[bar.outcome], hover=hover))
    if any(bar.outcome in BROKEN for bar in column.bars):
        shapes.append(text(x + width / 2, y - 3, "✕", class_="kill", anchor="middle"))
    if column.reused:
        shapes.append(rect(x, FLOOR - 5, width, 5, class_="fill-reused", hover=f"{column.name} · {_('reused')}"))
    elif not column.bars:
        shapes.append(
            rect(x, FLOOR - 3, width, 3, class_="fill-waiting", hover=f"{column.name} · {column.state.label}")
        )
    return shapes


def _groups(columns: Sequence[Column], width: float) -> list[object]:
    """A rule and a name under each run of steps of one group."""
    shapes: list[object] = []
    start = 0
    for place in range(1, len(columns) + 1):
        if place < len(columns) and columns[place].group == columns[start].group:
            continue
        x, room = LEFT + start * width, (place - start) * width
        shapes.append(line(x, FLOOR + 5, x + room - 2, FLOOR + 5, class_="bracket"))
        name = group_label(columns[start].group)
        if name and room > 6.5 * len(name):
            shapes.append(text(x, FLOOR + 19, name, class_="note"))
        start = place
    return shapes


def _rows(columns: Sequence[Column]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for column in columns:
        state = f"{column.state.label} · {_('reused')}" if column.reused else str(column.state.label)
        if not column.bars:
            rows.append((column.name, state, "", "", "", "", ""))
        rows += [
            (column.name, state, bar.number, bar.worker, bar.outcome.label, duration_words(bar.seconds), bar.detail)
            for bar in column.bars
        ]
    return rows
