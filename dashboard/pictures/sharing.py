"""Which layers use the weights of which, what every candidate would have cost, and what sharing saves and does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.utils.translation import gettext as _

from dashboard.formats import percent_words
from dashboard.pictures.svg import Picture, drawing, element, rect, text

WIDTH, SIDE, GAP = 720, 26, 3
TOP, LEGEND = 58, 34
EVERY = 4
"""Blocks are numbered each so many, where there is no room for every number."""


def sharing_picture(sharing: Mapping[str, Any]) -> Picture | None:
    """``sharing``: figures of an artifact; None where no layer shares.

    ``groups`` (anchor -> followers), ``blocks``, ``rounds`` (``kl``: candidate -> anchor and divergence),
    ``parameters`` and ``operations`` before and after.
    """
    anchors = {follower: int(anchor) for anchor, all_of in (sharing.get("groups") or {}).items() for follower in all_of}
    if not anchors:
        return None
    blocks = int(sharing["blocks"])
    step = min(SIDE + GAP, WIDTH / blocks)
    title = _finding(sharing, len(anchors), blocks)
    shapes: list[object] = [_arc(anchor, follower, step) for follower, anchor in sorted(anchors.items())]
    for block in range(blocks):
        shapes += _block(block, anchors, step, is_numbered=step > SIDE or block % EVERY == 0)
    about = _("A square for each block; an arc leads from each block that follows to the one whose weights it uses.")
    return Picture(
        title=title,
        svg=drawing(title, WIDTH, TOP + SIDE + LEGEND, shapes, about=about),
        columns=(_("block"), _("role"), _("weights of block"), *_rounds(sharing)),
        rows=[_row(block, anchors, sharing) for block in range(blocks)],
        numeric=frozenset({0, 2, *range(3, 3 + len(sharing.get("rounds") or []))}),
    )


def _finding(sharing: Mapping[str, Any], followers: int, blocks: int) -> str:
    parameters, operations = sharing["parameters"], sharing["operations"]
    return _(
        "%(followers)s of %(blocks)s blocks use the weights of another: %(fewer)s fewer parameters, and %(more)s more "
        "arithmetic for each token"
    ) % {
        "followers": followers,
        "blocks": blocks,
        "fewer": percent_words(1 - parameters["after"] / parameters["before"]),
        "more": percent_words(operations["after"] / operations["before"] - 1),
    }


def _arc(anchor: int, follower: int, step: float) -> object:
    start, end = (anchor + 0.5) * step, (follower + 0.5) * step
    height = min(TOP - 4, 14 + 6 * (follower - anchor))
    bend = f"C{start:.1f},{TOP - height:.1f} {end:.1f},{TOP - height:.1f} {end:.1f},{TOP}"
    return element("path", d=f"M{start:.1f},{TOP} {bend}", class_="edge")


def _block(block: int, anchors: Mapping[int, int], step: float, *, is_numbered: bool) -> list[object]:
    tone = "fill-accent" if block in anchors.values() else "fill-reused" if block in anchors else "fill-muted"
    words = _("block %(block)s: %(role)s") % {"block": block, "role": _role(block, anchors)}
    if block in anchors:
        words += f" · {anchors[block]}"
    shapes: list[object] = [rect(block * step, TOP, step - GAP, SIDE, class_=tone, hover=words)]
    if is_numbered:
        shapes.append(text((block + 0.5) * step - GAP / 2, TOP + SIDE + 16, block, class_="tick", anchor="middle"))
    return shapes


def _role(block: int, anchors: Mapping[int, int]) -> str:
    if block in anchors:
        return _("follows")
    return _("anchor") if block in anchors.values() else _("by itself")


def _rounds(sharing: Mapping[str, Any]) -> Sequence[str]:
    """A column for each round in which candidates were measured."""
    count = len(sharing.get("rounds") or [])
    return [_("KL in round %(number)s") % {"number": number} for number in range(1, count + 1)]


def _row(block: int, anchors: Mapping[int, int], sharing: Mapping[str, Any]) -> tuple[object, ...]:
    found = []
    for one in sharing.get("rounds") or []:
        measured = one["kl"].get(str(block))
        mark = " ✓" if block in one["chosen"] else ""
        found.append(f"{measured[1]:.4g}{mark}" if measured else "–")
    return block, _role(block, anchors), anchors.get(block, "–"), *found
