"""The rows of ours: how each artifact is made, at which reductions, and whose groups it takes."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from compression_worker.contracts import Json
from tests.benchmarks.quantizers.making import Row


@dataclass(frozen=True, kw_only=True)
class SharingRow(Row):
    """``groups_of``: an earlier row whose followers, anchors and rank this one has; so that they differ in one thing.

    ``reductions``: where it is made; everywhere if empty.
    """

    groups_of: str = ""
    reductions: tuple[float, ...] = ()

    def made_at(self, reduction: float) -> bool:
        return not self.reductions or any(abs(one - reduction) < 1e-9 for one in self.reductions)

    def among(self, sharing: Json | None, usual: dict[str, Any]) -> SharingRow:
        """With ``usual`` settings where it has none of its own, and with the groups of what ``sharing`` tells of."""
        own = {setting.partition("=")[0] for setting in self.set}
        if sharing is not None:
            ranks = {str(block): 0 for block in sharing.get("left_out", [])} | sharing.get("group_ranks", {})
            groups = (
                f"{anchor}:{','.join(map(str, some))}" + (f"@{rank}" if rank is not None else "")
                for anchor, followers in sharing["groups"].items()
                for rank, some in groupby(followers, key=lambda one: ranks.get(str(one)))
            )
            usual = {**usual, "groups": ";".join(groups), "rank": sharing["rank"]}
        return replace(self, set=(*self.set, *(f"{name}={value}" for name, value in usual.items() if name not in own)))


def listed(path: Path) -> Sequence[SharingRow]:
    """The rows of a file."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["rows"]
    return [SharingRow(**row | {"set": tuple(row["set"])}) for row in rows]
