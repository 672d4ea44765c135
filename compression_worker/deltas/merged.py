"""From base and artifact back to weights, by tiles or whole: ``W = W_b + D_hat``.

What all delta artifacts share is read here; how a method's own kind of line becomes tiles is said by its
:class:`Coder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json
from compression_worker.deltas.rows import RowsReader
from compression_worker.making.reading import ArtifactTensors
from compression_worker.tensors import TensorFile, TensorFiles, checkpoint_files


class Coder(Protocol):
    """How one kind of line becomes weights."""

    def tiles(self, name: str, entry: Json, base: TensorFile) -> Iterator[torch.Tensor]:
        """fp32 tiles of whole rows of ``W_b + D_hat`` as stored, from the first row to the last."""


class Merged(ArtifactTensors):
    """The tensors of a variant that is kept as its base and a compressed delta."""

    def __init__(self, base: Checkpoint, artifact: Artifact, layout: Json, coders: Mapping[str, Coder]) -> None:
        table = artifact.manifest["tensors"]
        stored = TensorFiles({name: artifact.paths[e["file"]] for name, e in table.items() if "file" in e})
        super().__init__(artifact, layout, stored)
        self._base = self._stack.enter_context(checkpoint_files(base))
        self._coders = coders

    def placeholder(self, name: str) -> torch.Tensor:
        """The base's weight, on which the packed delta is added."""
        self._check_base(name)
        return self._base.file(name).tensor(name)

    def verbatim(self, name: str) -> TensorFile | None:
        return self._base.file(name) if self.table[name]["kind"] == "base" else super().verbatim(name)

    def tiles_of(self, name: str) -> Iterator[torch.Tensor]:
        entry = self.table[name]
        if entry["kind"] == "rows":
            return RowsReader(self._own.file(name)).tiles(name, entry, self._base.file(name))
        self._check_base(name)
        return self._coders[entry["kind"]].tiles(name, entry, self._base.file(name))

    def _check_base(self, name: str) -> None:
        if list(self._base.spec(name).shape) != self.table[name]["shape"]:
            raise CompressionError("base_mismatch", f"'{name}' has another shape in the base than in the artifact")
