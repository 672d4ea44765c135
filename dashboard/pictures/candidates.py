"""What each block would cost if it shared: a row for each round of choosing, a cell for each candidate in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from dashboard.formats import significant
from dashboard.pictures.blocks import CELL, Strip
from dashboard.pictures.heatmap import LEVELS, STRONG, SWATCH, Scale, short_number
from dashboard.pictures.svg import Picture, drawing, rect, text, width_of

ROW, HEAD, GAP, LEFT = 17, 20, 10, 62
SMALLEST = 1e-9
"""What is less counts as so much on the scale of colours."""


@dataclass(frozen=True)
class Candidate:
    """A block that may follow: the anchor that it would have, and how far the model would be from what it was.

    Without an anchor it would be left out.
    """

    anchor: int | None
    kl: float

    @property
    def is_known(self) -> bool:
        return math.isfinite(self.kl)


@dataclass(frozen=True)
class Round:
    """One round of choosing. ``found``: candidate by block."""

    found: Mapping[int, Candidate]
    chosen: frozenset[int]


def candidates_picture(rounds: Sequence[Round], blocks: int) -> Picture | None:
    """None where nothing was measured."""
    known = [one for round_ in rounds for one in round_.found.values() if one.is_known]
    if not known:
        return None
    scale = _scale(one.kl for one in known)
    strip = Strip(blocks, left=LEFT, height=HEAD + len(rounds) * ROW + GAP)
    title = _finding(rounds)
    shapes: list[object] = list(strip.numbers(HEAD - 7))
    taken: set[int] = set()
    for number, round_ in enumerate(rounds):
        for row in range(strip.rows):
            y = row * strip.height + HEAD + number * ROW + 12
            label = _("round %(number)s") % {"number": number + 1}
            shapes.append(text(LEFT - 6, y, label, class_="tick", anchor="end"))
        for block in range(blocks):
            x, top = strip.at(block)
            shapes += _cell(round_, block, x, top + HEAD + number * ROW, scale, follows=block in taken)
        taken |= round_.chosen
    legend, height, right = _legend(scale, strip.bottom + 6)
    about = _(
        "Rows are rounds of choosing, columns are blocks. The number in a cell is the KL divergence from the whole "
        "model when this block shares, or is left out, too, beside those chosen in earlier rounds."
    )
    return Picture(
        title=title,
        svg=drawing(title, max(strip.width, right), height, [*shapes, *legend], about=about),
        columns=(_("round"), _("block"), _("would use block"), _("KL divergence"), _("picked")),
        rows=list(_rows(rounds)),
        numeric=frozenset({0, 1, 2, 3}),
    )


def _scale(values: Iterable[float]) -> Scale:
    """Divergences differ by powers of ten, so the levels are even between logarithms."""
    logs = [math.log10(max(value, SMALLEST)) for value in values]
    return Scale(min(logs), max(logs))


def _finding(rounds: Sequence[Round]) -> str:
    every = [one.kl for round_ in rounds for one in round_.found.values() if one.is_known]
    chosen = [round_.found[block].kl for round_ in rounds for block in sorted(round_.chosen) if block in round_.found]
    words = {"dear": significant(max(every), 2)}
    if not chosen:
        return _("The dearest candidate came to a KL divergence of %(dear)s") % words
    words |= {"low": significant(min(chosen), 2), "high": significant(max(chosen), 2)}
    return _("Chosen blocks came to a KL divergence of %(low)s to %(high)s; the dearest candidate to %(dear)s") % words


def _cell(round_: Round, block: int, x: float, y: float, scale: Scale, *, follows: bool) -> list[object]:
    one = round_.found.get(block)
    middle = x + (CELL - 1) / 2
    if one is None:
        shapes: list[object] = [rect(x, y, CELL - 1, ROW - 1, class_="ground")]
        return [*shapes, text(middle, y + 12, "✓", class_="cell", anchor="middle")] if follows else shapes
    box, ink = "heat-none", "cell"
    if one.is_known:
        level = scale.level(math.log10(max(one.kl, SMALLEST)))
        box, ink = f"heat-{level}", "cell strong" if level >= STRONG else "cell"
    if block in round_.chosen:
        box += " worst"
    return [
        rect(x, y, CELL - 1, ROW - 1, class_=box, hover=_hover(block, one, is_chosen=block in round_.chosen)),
        text(middle, y + 12, _short(one.kl), class_=ink, anchor="middle"),
    ]


def _short(kl: float) -> str:
    """A divergence in four letters: a nought before the point goes without saying."""
    if 0.001 <= kl < 0.0995:
        return f"{kl:.3f}".removeprefix("0")
    return f"{kl:.0e}".replace("e-0", "e-") if 0 < kl < 0.001 else short_number(kl)


def _hover(block: int, one: Candidate, *, is_chosen: bool) -> str:
    if one.anchor is None:
        words = _("block %(block)s left out: KL divergence %(kl)s")
    else:
        words = _("block %(block)s on block %(anchor)s: KL divergence %(kl)s")
    words %= {"block": block, "anchor": one.anchor, "kl": significant(one.kl, 4)}
    return f"{words} · {_('picked')}" if is_chosen else words


def _legend(scale: Scale, y: float) -> tuple[list[object], float, float]:
    """The scale of colours with where each begins, and what a frame and a tick mean; how high and wide all becomes."""
    words = _("KL divergence (log scale)")
    left = max(float(LEFT), width_of(words) + 10)
    shapes: list[object] = [text(0, y + 9, words, class_="note")]
    is_wide = scale.high > scale.low
    for level in range(LEVELS if is_wide else 1):
        shapes.append(rect(left + level * SWATCH, y, SWATCH - 1, 11, class_=f"heat-{level}"))
        shapes.append(text(left + level * SWATCH, y + 24, _short(10 ** scale.edge(level)), class_="tick"))
    if is_wide:
        shapes.append(text(left + LEVELS * SWATCH, y + 24, _short(10**scale.high), class_="tick"))
    y += 46
    framed, follows = _("framed: chosen in this round"), _("✓ chosen in an earlier round")
    shapes += [
        rect(2, y - 9, 14, 10, class_="heat-0 worst"),
        text(24, y, framed, class_="note"),
        text(40 + width_of(framed), y, follows, class_="note"),
    ]
    return shapes, y + 10, left + LEVELS * SWATCH + 30


def _rows(rounds: Sequence[Round]) -> Iterable[tuple[object, ...]]:
    for number, round_ in enumerate(rounds, start=1):
        for block, one in sorted(round_.found.items()):
            anchor = _("left out") if one.anchor is None else one.anchor
            yield number, block, anchor, significant(one.kl, 4), _("yes") if block in round_.chosen else ""
