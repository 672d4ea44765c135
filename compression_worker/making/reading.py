"""An artifact's tensors, made when asked for: the part that does not depend on how a method codes its linears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Self

import torch

from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError, Json
from compression_worker.tensors import DTYPES, Spec, TensorFile, TensorFiles, raw_bytes


class ArtifactTensors:
    """The tensors of a compressed model. A context manager: it holds files open.

    ``stored`` names where the bytes of each tensor lie that is in a file of the artifact, by the name in that file.
    A method says in :meth:`tiles` how its own kinds of line become weights.
    """

    def __init__(self, artifact: Artifact, layout: Json, stored: TensorFiles) -> None:
        if artifact.manifest["layout"] != layout:
            raise CompressionError(
                "unknown_format", "the artifact's codes have a layout that this version does not know"
            )
        self.artifact = artifact
        self.table: Json = artifact.manifest["tensors"]
        self._own = stored
        self._stack = ExitStack()
        self._stack.enter_context(stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def specs(self) -> dict[str, Spec]:
        """Name -> dtype and shape of each tensor of the model."""
        return self._specs

    @cached_property
    def _specs(self) -> dict[str, Spec]:
        return {name: Spec(entry["dtype"], tuple(entry["shape"])) for name, entry in self.table.items()}

    def data(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in the model's dtype, a tile at a time."""
        if whole := self.verbatim(name):
            return whole.chunks(name)
        dtype = DTYPES[self.table[name]["dtype"]]
        return (raw_bytes(tile.to(dtype).contiguous()) for tile in self.tiles_of(name))

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor; what is coded is computed in fp32 and rounded once to ``dtype``."""
        if whole := self.verbatim(name):
            return whole.tensor(name).to(dtype)
        made = torch.empty(self.table[name]["shape"], dtype=dtype)
        row = 0
        for tile in self.tiles_of(name):
            made[row : row + len(tile)] = tile
            row += len(tile)
        return made

    def placeholder(self, name: str) -> torch.Tensor:
        """What stands for a coded linear's weight in a model whose packed form takes its place: zeros of no memory."""
        entry = self.table[name]
        return torch.zeros((), dtype=DTYPES[entry["dtype"]]).expand(entry["shape"])

    def verbatim(self, name: str) -> TensorFile | None:
        """The file that holds the tensor as it is; None for one that has to be computed."""
        return self._own.file(name) if self.table[name]["kind"] == "raw" else None

    def tiles_of(self, name: str) -> Iterator[torch.Tensor]:
        """fp32 tiles of whole rows of a coded tensor as stored, from the first row to the last."""
        raise NotImplementedError
