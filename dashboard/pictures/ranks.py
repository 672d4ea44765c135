"""What the rank of differences buys, before training: the KL divergence over the parameters that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.utils.translation import gettext as _

from dashboard.formats import percent_words, range_words, significant, whole
from dashboard.pictures.svg import Picture, drawing, element, line, text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 170, 60, 24, 22, 26
APART = 34
"""Between two labels that can both be read."""


@dataclass(frozen=True)
class Rank:
    """One rank: the parameters that it leaves of ``before``, and the divergence on held-out text in nats.

    ``lowest``: where groups have ranks of their own, of which ``rank`` is the highest.
    """

    rank: int
    parameters: int
    before: int
    kl: float
    lowest: int | None = None

    @property
    def words(self) -> str:
        return range_words(self.rank if self.lowest is None else self.lowest, self.rank)

    @property
    def label(self) -> str:
        """As short as it can be."""
        return f"r{self.rank}" if self.lowest is None else f"r{self.lowest}–{self.rank}"

    @property
    def fewer(self) -> str:
        return percent_words(1 - self.parameters / self.before)


def ranks_picture(points: Sequence[Rank]) -> Picture | None:
    """``points`` from the lowest rank to the highest; None with fewer than two."""
    if len(points) < 2:
        return None
    first, last = points[0], points[-1]
    words = {"first": significant(first.kl), "last": significant(last.kl), "low": first.words, "rank": last.words}
    if last.kl < first.kl:
        title = _("Before training KL falls from %(first)s nats at rank %(low)s to %(last)s at rank %(rank)s") % words
    else:
        title = (
            _("A higher rank brings nothing before training: KL %(first)s at rank %(low)s, %(last)s at rank %(rank)s")
            % words
        )
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, HEIGHT, _shapes(points)),
        columns=(_("rank"), _("parameters"), _("fewer"), _("KL, nats")),
        rows=[(one.words, whole(one.parameters), one.fewer, significant(one.kl, 4)) for one in points],
        numeric=frozenset({0, 1, 2, 3}),
    )


def _shapes(points: Sequence[Rank]) -> list[object]:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    low, high = min(one.parameters for one in points), max(one.parameters for one in points)
    least, most = min(one.kl for one in points), max(one.kl for one in points)
    places = [
        (
            LEFT + 8 + (one.parameters - low) / ((high - low) or 1) * (right - LEFT - 8),
            floor - 8 - (one.kl - least) / ((most - least) or 1) * (floor - 8 - TOP),
        )
        for one in points
    ]
    shapes: list[object] = [
        line(LEFT, floor, right, floor, class_="axis"),
        text(LEFT - 6, TOP + 4, significant(most), class_="tick", anchor="end"),
        text(LEFT - 6, floor - 4, significant(least), class_="tick", anchor="end"),
        text(LEFT, HEIGHT - 6, f"−{points[0].fewer}", class_="tick"),
        text(right, HEIGHT - 6, f"−{points[-1].fewer}", class_="tick", anchor="end"),
        text((LEFT + right) / 2, HEIGHT - 6, _("parameters left, by rank"), class_="note", anchor="middle"),
        element("path", d="M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in places), class_="curve"),
    ]
    free = float("inf")
    for one, (x, y) in reversed(list(zip(points, places, strict=True))):
        hover = _("rank %(rank)s: KL %(kl)s") % {"rank": one.words, "kl": significant(one.kl, 4)}
        shapes.append(element("circle", element("title", hover), cx=x, cy=y, r=3.5, class_="fill-accent"))
        if free - x >= APART:
            shapes.append(text(x, y - 8, one.label, class_="tick", anchor="middle"))
            free = x
    return shapes
