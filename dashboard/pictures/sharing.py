"""Which blocks use the weights of another: the blocks in order, and an arc from each follower to its anchor.

What a block is can be seen from its form alone: an anchor is filled, a follower is dashed, one that is left out is
dotted and crossed, a protected block lies between two bars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from dashboard.formats import percent_words, whole
from dashboard.pictures.blocks import CELL, Strip
from dashboard.pictures.svg import Picture, drawing, element, line, rect, text, width_of

ARCS, BOX, UNDER = 44, 18, 24
"""Room for the arcs of a row, height of a block, and room for what stands below it."""
LEGEND_ROW = 18


@dataclass(frozen=True)
class Sharing:
    """``groups``: follower -> anchor. ``left_out``: blocks whose shared modules do nothing.

    ``still``: those that are not chosen yet. ``fewer``: share of parameters.
    """

    blocks: int
    groups: Mapping[int, int]
    protected: frozenset[int] = field(default_factory=frozenset)
    fewer: float | None = None
    still: int = 0
    left_out: frozenset[int] = field(default_factory=frozenset)

    @property
    def anchors(self) -> Mapping[int, list[int]]:
        """Anchor -> its followers, both in order."""
        found: dict[int, list[int]] = {}
        for follower, anchor in sorted(self.groups.items()):
            found.setdefault(anchor, []).append(follower)
        return dict(sorted(found.items()))


def sharing_picture(sharing: Sharing | None) -> Picture | None:
    """None while no block shares."""
    if sharing is None or not (sharing.groups or sharing.left_out):
        return None
    strip = Strip(sharing.blocks, left=2, height=ARCS + BOX + UNDER)
    title = _finding(sharing)
    shapes: list[object] = []
    for follower, anchor in sorted(sharing.groups.items()):
        shapes += _arc(strip, follower, anchor)
    for block in range(sharing.blocks):
        shapes += _block(strip, sharing, block)
    legend, height = _legend(sharing, strip)
    about = _("Blocks from the first to the last. An arc leads from a follower to the block whose weights it uses.")
    return Picture(
        title=title,
        svg=drawing(title, strip.width, height, [*shapes, *legend], about=about),
        columns=(_("block"), _("what it is"), _("uses the weights of block"), _("used by blocks")),
        rows=[_row(sharing, block) for block in range(sharing.blocks)],
        numeric=frozenset({0, 2}),
    )


def _finding(sharing: Sharing) -> str:
    count, gone = len(sharing.groups), len(sharing.left_out)
    words = ngettext(
        "%(count)s of %(blocks)s blocks uses another's weights",
        "%(count)s of %(blocks)s blocks use another's weights",
        count,
    ) % {"count": whole(count), "blocks": whole(sharing.blocks)}
    if gone:
        words += ngettext("; %(count)s is left out", "; %(count)s are left out", gone) % {"count": whole(gone)}
    if sharing.fewer is not None:
        words += _("; %(share)s fewer parameters") % {"share": percent_words(sharing.fewer)}
    if sharing.still:
        words += ngettext(
            "; %(count)s more is still to be chosen", "; %(count)s more are still to be chosen", sharing.still
        ) % {"count": whole(sharing.still)}
    return words


def _arc(strip: Strip, follower: int, anchor: int) -> list[object]:
    """From one block to the other; one that reaches into another row begins as a stub, and its number says where to."""
    x, top = strip.at(follower)
    begin, floor = x + (CELL - 2) / 2, top + ARCS
    if strip.row(follower) != strip.row(anchor):
        stub = f"M{begin:.1f},{floor:.1f} v-10 h-8"
        return [element("path", element("title", _uses(follower, anchor)), d=stub, class_="curve")]
    end = strip.at(anchor)[0] + (CELL - 2) / 2
    high = min(ARCS - 6, 8 + 5 * (follower - anchor))
    # A cubic reaches three quarters of the height of its control points.
    path = f"M{begin:.1f},{floor:.1f} C{begin:.1f},{floor - high * 4 / 3:.1f} {end:.1f},{floor - high * 4 / 3:.1f} "
    path += f"{end:.1f},{floor:.1f}"
    return [element("path", element("title", _uses(follower, anchor)), d=path, class_="curve")]


def _block(strip: Strip, sharing: Sharing, block: int) -> list[object]:
    x, top = strip.at(block)
    y, anchor = top + ARCS, sharing.groups.get(block)
    shapes = _form(x, y, sharing, block, _hover(sharing, block))
    ink = "cell strong" if block in sharing.anchors else "cell"
    shapes.append(text(x + (CELL - 2) / 2, y + 12.5, block, class_=ink, anchor="middle"))
    if block in sharing.left_out:
        shapes.append(text(x + (CELL - 2) / 2, y + BOX + 13, "×", class_="tick", anchor="middle"))
    if anchor is not None:
        shapes.append(text(x + (CELL - 2) / 2, y + BOX + 13, f"↰{anchor}", class_="tick", anchor="middle"))
    return shapes


def _form(x: float, y: float, sharing: Sharing, block: int, hover: str = "") -> list[object]:
    class_ = "anchor" if block in sharing.anchors else "follower" if block in sharing.groups else "untouched"
    class_ = "absent" if block in sharing.left_out else class_
    shapes: list[object] = [rect(x, y, CELL - 2, BOX, class_=class_, hover=hover)]
    if block in sharing.protected:
        shapes += _bars(x, y)
    return shapes


def _bars(x: float, y: float) -> list[object]:
    return [line(x, at, x + CELL - 2, at, class_="guard") for at in (y - 2, y + BOX + 2)]


def _roles(sharing: Sharing, block: int) -> str:
    found = []
    if block in sharing.anchors:
        found.append(_("anchor"))
    if block in sharing.groups:
        found.append(_("follower"))
    if block in sharing.left_out:
        found.append(_("left out"))
    if block in sharing.protected:
        found.append(_("protected"))
    return ", ".join(found) or _("untouched")


def _hover(sharing: Sharing, block: int) -> str:
    if block in sharing.groups:
        return _uses(block, sharing.groups[block])
    words = _("block %(block)s: %(what)s") % {"block": block, "what": _roles(sharing, block)}
    users = ", ".join(str(one) for one in sharing.anchors.get(block, []))
    return words + (_(", used by %(blocks)s") % {"blocks": users} if users else "")


def _uses(follower: int, anchor: int) -> str:
    return _("block %(block)s: follower, uses the weights of block %(anchor)s") % {"block": follower, "anchor": anchor}


def _legend(sharing: Sharing, strip: Strip) -> tuple[list[object], float]:
    """A form of each kind that there is, its word, and how many there are."""
    anchors, followers = len(sharing.anchors), len(sharing.groups)
    protected = len(sharing.protected)
    others = set(range(sharing.blocks)) - set(sharing.anchors) - set(sharing.groups) - sharing.protected
    others -= sharing.left_out
    entries = [
        ("anchor", anchors, _("anchor: others use its weights")),
        ("follower", followers, _("follower: keeps a difference only")),
        ("absent", len(sharing.left_out), _("× left out: keeps nothing")),
        ("guard", protected, _("between bars: protected, never follows")),
        ("untouched", len(others), _("untouched")),
    ]
    shapes: list[object] = []
    x, y = 2.0, strip.bottom + 12
    for class_, count, label in entries:
        if not count:
            continue
        words = f"{label} ({whole(count)})"
        room = 22 + width_of(words) + 16
        if x + room > strip.width and x > 2:
            x, y = 2.0, y + LEGEND_ROW
        shapes.append(rect(x, y - 8, 14, 9, class_="untouched" if class_ == "guard" else class_))
        if class_ == "guard":
            shapes += [line(x, at, x + 14, at, class_="guard") for at in (y - 10, y + 3)]
        shapes.append(text(x + 22, y, words, class_="note"))
        x += room
    return shapes, y + 10


def _row(sharing: Sharing, block: int) -> tuple[object, ...]:
    users = ", ".join(str(one) for one in sharing.anchors.get(block, []))
    return block, _roles(sharing, block), sharing.groups.get(block, "–"), users or "–"
