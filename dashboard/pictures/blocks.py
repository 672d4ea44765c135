"""The blocks of a model side by side, in as many rows as they need: what pictures of whole blocks stand on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dashboard.pictures.svg import text

CELL, MOST_IN_ROW = 28, 30


@dataclass(frozen=True)
class Strip:
    """Where each block of a model with ``blocks`` stands. ``left``: room before the first; ``height``: of a row."""

    blocks: int
    left: float
    height: float

    @property
    def rows(self) -> int:
        return -(-self.blocks // MOST_IN_ROW)

    @property
    def in_row(self) -> int:
        """Rows are as even as they can be."""
        return -(-self.blocks // self.rows)

    @property
    def width(self) -> float:
        return max(self.left + self.in_row * CELL + 4, 420)

    @property
    def bottom(self) -> float:
        return self.rows * self.height

    def row(self, block: int) -> int:
        return block // self.in_row

    def at(self, block: int) -> tuple[float, float]:
        """The upper left corner of ``block``'s place."""
        return self.left + block % self.in_row * CELL, self.row(block) * self.height

    def numbers(self, y: float) -> Iterator[object]:
        """The number of each block, ``y`` below the top of its row."""
        for block in range(self.blocks):
            x, top = self.at(block)
            yield text(x + (CELL - 2) / 2, top + y, block, class_="tick", anchor="middle")
