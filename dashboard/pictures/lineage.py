"""The lineage tree: base, variants, artifacts, environments, left to right, with bytes on the edges."""

from __future__ import annotations

from dataclasses import dataclass, field

from django.utils.translation import gettext as _

from dashboard.formats import byte_words
from dashboard.pictures.svg import Picture, drawing, element, link, rect, text

COLUMN, ROW, BOX_WIDTH, BOX_HEIGHT = 226, 44, 150, 30


@dataclass(frozen=True)
class Node:
    """One thing in the tree. ``size_bytes`` stands on the edge that leads to it (None: no bytes move)."""

    label: str
    kind: str
    href: str
    size_bytes: int | None = None
    children: tuple[Node, ...] = ()
    is_here: bool = False


@dataclass
class _Layout:
    shapes: list[object] = field(default_factory=list)
    rows: list[tuple[object, ...]] = field(default_factory=list)
    next_row: int = 0
    depth: int = 0

    def place(self, node: Node, depth: int, parent: str) -> float:
        """Draw ``node`` and all below it; returns the y of its middle."""
        self.depth = max(self.depth, depth)
        self.rows.append((node.label, node.kind, parent, byte_words(node.size_bytes) if node.size_bytes else ""))
        middles = [self.place(child, depth + 1, node.label) for child in node.children]
        if not middles:
            self.next_row += 1
        middle = sum(middles) / len(middles) if middles else (self.next_row - 0.5) * ROW
        x = depth * COLUMN
        for child, target in zip(node.children, middles, strict=True):
            self._edge(x + BOX_WIDTH, middle, x + COLUMN, target, child.size_bytes)
        self._box(node, x, middle)
        return middle

    def _edge(self, x1: float, y1: float, x2: float, y2: float, size_bytes: int | None) -> None:
        bend = (x1 + x2) / 2
        self.shapes.append(
            element("path", d=f"M{x1},{y1:.1f} C{bend},{y1:.1f} {bend},{y2:.1f} {x2},{y2:.1f}", class_="edge")
        )
        if size_bytes:
            self.shapes.append(text(x2 - 4, y2 - 5, byte_words(size_bytes), class_="tick halo", anchor="end"))

    def _box(self, node: Node, x: float, middle: float) -> None:
        box = rect(
            x,
            middle - BOX_HEIGHT / 2,
            BOX_WIDTH,
            BOX_HEIGHT,
            class_="node node-here" if node.is_here else "node",
            hover=node.label,
        )
        label = node.label if len(node.label) <= 20 else node.label[:19] + "…"
        words = [text(x + 8, middle - 1, label, class_="label"), text(x + 8, middle + 11, node.kind, class_="tick")]
        self.shapes.append(
            link(node.href, box, *words, label=f"{node.label}, {node.kind}") if node.href else element("g", box, *words)
        )


def lineage_picture(root: Node) -> Picture:
    layout = _Layout()
    layout.place(root, 0, "")
    title = _("Everything made from %(name)s, with its bytes") % {"name": root.label}
    return Picture(
        title=title,
        svg=drawing(
            title, layout.depth * COLUMN + BOX_WIDTH + 4, layout.next_row * ROW + 2, layout.shapes, has_links=True
        ),
        columns=(_("name"), _("kind"), _("made from"), _("bytes")),
        rows=layout.rows,
        numeric=frozenset({3}),
        wide=True,
    )
