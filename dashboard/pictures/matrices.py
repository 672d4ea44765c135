"""The matrices of a model as a grid: rows are blocks, columns are kinds of matrix; many blocks stand in several panels.

A model's experts are matrices like others while they are few; many of them share one column.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from django.utils.translation import gettext as _

from dashboard.pictures.svg import text, width_of

BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)$")
ANCHOR = re.compile(r"\bon '([^']+)'$")
"""How a coding names the matrix whose weight is used."""
ORDER = (
    "q", "k", "v", "qkv", "query_key_value", "c_attn", "W_pack", "o", "out", "dense", "attn.c_proj",
    "gate", "w1", "up", "w3", "gate_up", "c_fc", "fc1", "down", "w2", "mlp.c_proj", "fc2",
)  # fmt: skip
"""As a token passes through a block."""
MOST_COLUMNS = 16
ROW, HEAD, NUMBERS, GAP = 17, 20, 30, 18
SINGLE_PANEL, PANEL_ROWS = 34, 42


@dataclass(frozen=True)
class Matrix:
    """One compressed matrix. ``error``: of its delta, relative; ``coding``: in a short word how it is stored."""

    name: str
    error: float | None = None
    coding: str = ""
    size_bytes: int | None = None
    output_error: float | None = None


@dataclass(frozen=True)
class Cell:
    """The matrices of one kind in one block: one, or those of all experts."""

    block: int
    kind: str
    matrices: tuple[Matrix, ...]

    @property
    def name(self) -> str:
        """The matrix's own name, or what its matrices have in common."""
        if len(self.matrices) == 1:
            return self.matrices[0].name
        return _("block %(block)s, %(kind)s of %(count)s experts") % {
            "block": self.block, "kind": self.kind.partition(" ")[0], "count": len(self.matrices),
        }  # fmt: skip


@dataclass(frozen=True)
class Grid:
    blocks: list[int]
    kinds: list[str]
    cells: dict[tuple[int, str], Cell]
    outside: list[Matrix] = field(default_factory=list)
    """Matrices of no block, such as the head."""

    def in_order(self) -> Iterator[Cell]:
        for block in self.blocks:
            for kind in self.kinds:
                if (block, kind) in self.cells:
                    yield self.cells[block, kind]


@dataclass(frozen=True)
class Place:
    """Where a matrix lies: its block, its path there, and its number among experts."""

    block: int
    path: tuple[str, ...]
    expert: str = ""


def place(name: str) -> Place | None:
    """``model.layers.3.mlp.experts.7.w1.weight`` -> block 3, (mlp, experts, w1), 7; None for what lies in no block."""
    found = BLOCK.search(name.removesuffix(".weight"))
    if not found:
        return None
    pieces = found[2].split(".")
    path = tuple(_brief(piece) for piece in pieces if not piece.isdecimal())
    return Place(int(found[1]), path or (found[2],), ".".join(piece for piece in pieces if piece.isdecimal()))


def _brief(piece: str) -> str:
    """``q_proj`` is ``q`` to everybody; other names stay as they are."""
    return brief if (brief := piece.removesuffix("_proj")) in ORDER else piece


def grid(matrices: Iterable[Matrix]) -> Grid:
    """``matrices`` by block and kind."""
    placed = [(place(one.name), one) for one in matrices]
    inside = [(where, one) for where, one in placed if where is not None]
    kinds = _kinds(where for where, _one in inside)
    cells: dict[tuple[int, str], list[Matrix]] = defaultdict(list)
    for where, one in inside:
        cells[where.block, kinds[where.path, where.expert]].append(one)
    return Grid(
        blocks=sorted({block for block, _kind in cells}),
        kinds=sorted({kind for _block, kind in cells}, key=_reading_order),
        cells={key: Cell(*key, tuple(found)) for key, found in cells.items()},
        outside=[one for where, one in placed if where is None],
    )


def _kinds(places: Iterable[Place]) -> dict[tuple[tuple[str, ...], str], str]:
    """What heads the column of each path: as short as tells it from the others; experts apart while they are few."""
    experts: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for where in places:
        experts[where.path].add(where.expert)
    names = _short(experts)
    apart = sum(len(numbers) for numbers in experts.values()) <= MOST_COLUMNS
    heads = {}
    for path, numbers in experts.items():
        for number in numbers:
            several = f" ×{len(numbers)}" if len(numbers) > 1 else ""
            heads[path, number] = f"{names[path]} {number}".strip() if apart else names[path] + several
    return heads


def _short(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """The last pieces of each path, as many as no other path ends with."""
    found = {}
    known = list(paths)
    for path in known:
        length = next(
            (size for size in range(1, len(path)) if not any(o[-size:] == path[-size:] for o in known if o != path)),
            len(path),
        )
        found[path] = ".".join(path[-length:])
    return found


def _reading_order(kind: str) -> tuple[bool, int, str, int]:
    name, _space, number = kind.partition(" ")
    last = name.rpartition(".")[2]
    at = next((ORDER.index(one) for one in (name, last) if one in ORDER), len(ORDER))
    return (bool(number), at, name, int(number) if number.isdecimal() else 0)


@dataclass(frozen=True)
class Layout:
    """Where the cells of a grid are drawn."""

    grid: Grid
    cell: float
    rows: int
    panels: int

    @classmethod
    def of(cls, shown: Grid, *, cell: float = 0) -> Layout:
        """``cell``: how wide cells have to be at least."""
        count = len(shown.blocks)
        panels = 1 if count <= SINGLE_PANEL else -(-count // PANEL_ROWS)
        widest = max((width_of(kind) for kind in shown.kinds), default=0) + 8
        room = 64 if panels == 1 else 34
        return cls(shown, max(room, cell, min(widest, 110)), -(-count // panels), panels)

    @property
    def panel_width(self) -> float:
        return NUMBERS + self.cell * len(self.grid.kinds) + GAP

    @property
    def width(self) -> float:
        return max(self.panels * self.panel_width - GAP + 4, 420)

    @property
    def bottom(self) -> float:
        return float(HEAD + self.rows * ROW) if self.rows else 0.0

    def at(self, cell: Cell) -> tuple[float, float]:
        """The upper left corner of ``cell``."""
        row, column = self.grid.blocks.index(cell.block), self.grid.kinds.index(cell.kind)
        panel, line = divmod(row, self.rows)
        return panel * self.panel_width + NUMBERS + column * self.cell, HEAD + line * ROW

    def frame(self) -> list[object]:
        """Heads of the columns and numbers of the blocks, in every panel."""
        shapes: list[object] = []
        for panel in range(self.panels):
            left = panel * self.panel_width
            shapes += [
                text(left + NUMBERS + (at + 0.5) * self.cell, HEAD - 7, kind, class_="note", anchor="middle")
                for at, kind in enumerate(self.grid.kinds)
            ]
        for row, block in enumerate(self.grid.blocks):
            panel, line = divmod(row, self.rows)
            x = panel * self.panel_width + NUMBERS - 6
            shapes.append(text(x, HEAD + line * ROW + 12, block, class_="tick", anchor="end"))
        return shapes


def from_figures(entries: Sequence[Mapping[str, object]], measure: str = "relative_error") -> list[Matrix]:
    """Matrices from the lines that an artifact or a step tells of them; lines without a name are none.

    ``measure``: which of a line's figures is the error that a picture shows.
    """
    return [
        Matrix(
            name=str(entry["name"]),
            error=_number(entry.get(measure)),
            coding=_coding(entry),
            size_bytes=_whole(entry.get("bytes")),
            output_error=_number(entry.get("output_error")),
        )
        for entry in entries
        if entry.get("name")
    ]


def _coding(entry: Mapping[str, object]) -> str:
    """How a line says that its matrix is stored: in a word, or by its bits alone.

    Of a matrix that uses another's weight only the other's block is named: its kind is the same.
    """
    bits = _number(entry.get("bits"))
    words = str(entry.get("coding") or (_("%(bits)s bits") % {"bits": f"{bits:g}"} if bits else ""))
    return ANCHOR.sub(_block_of, words)


def stands_on(coding: str) -> bool:
    """Whether a matrix that is stored so uses another's weight."""
    return ANCHOR.search(coding) is not None


def _block_of(quoted: re.Match[str]) -> str:
    where = place(quoted[1])
    return f"on block {where.block}" if where else quoted[0]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None
