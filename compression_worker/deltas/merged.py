"""From base and artifact back to weights, by tiles or whole: ``W = W_b + D_hat``.

What all delta artifacts share is read here; how a method's own kind of line becomes tiles is said by its
:class:`Coder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from types import TracebackType
from typing import Protocol, Self

import torch

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json
from compression_worker.deltas.rows import RowsReader
from compression_worker.tensors import DTYPES, Spec, TensorFile, TensorFiles, checkpoint_files, raw_bytes


class Coder(Protocol):
    """How one kind of line becomes weights."""

    def tiles(self, name: str, entry: Json, base: TensorFile) -> Iterator[torch.Tensor]:
        """fp32 tiles of whole rows of ``W_b + D_hat`` as stored, from the first row to the last."""


class Merged:
    """The tensors of the compressed model, made when asked for. A context manager: it holds files open."""

    def __init__(self, base: Checkpoint, artifact: Artifact, layout: Json, coders: Mapping[str, Coder]) -> None:
        if artifact.manifest["layout"] != layout:
            raise CompressionError(
                "unknown_format", "the artifact's codes have a layout that this version does not know"
            )
        self.artifact = artifact
        self.table: Json = artifact.manifest["tensors"]
        self._base = checkpoint_files(base)
        self._own = TensorFiles({name: artifact.paths[e["file"]] for name, e in self.table.items() if "file" in e})
        self._coders = coders

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.__exit__(kind, error, trace)
        self._own.__exit__(kind, error, trace)

    def specs(self) -> dict[str, Spec]:
        """Name -> dtype and shape of each tensor of the variant."""
        return self._specs

    @cached_property
    def _specs(self) -> dict[str, Spec]:
        return {name: Spec(entry["dtype"], tuple(entry["shape"])) for name, entry in self.table.items()}

    def data(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in the variant's dtype, a tile at a time."""
        entry = self.table[name]
        if entry["kind"] in ("raw", "base"):
            return self._file(name).chunks(name)
        dtype = DTYPES[entry["dtype"]]
        return (raw_bytes(tile.to(dtype).contiguous()) for tile in self._tiles(name))

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor; what is coded is summed in fp32 and rounded once to ``dtype``."""
        entry = self.table[name]
        if entry["kind"] in ("raw", "base"):
            return self._file(name).tensor(name).to(dtype)
        whole = torch.empty(entry["shape"], dtype=dtype)
        row = 0
        for tile in self._tiles(name):
            whole[row : row + len(tile)] = tile
            row += len(tile)
        return whole

    def base_tensor(self, name: str) -> torch.Tensor:
        """The base's weight of a coded linear."""
        self._check_base(name)
        return self._base.file(name).tensor(name)

    def _file(self, name: str) -> TensorFile:
        return (self._own if self.table[name]["kind"] == "raw" else self._base).file(name)

    def _check_base(self, name: str) -> None:
        if list(self._base.spec(name).shape) != self.table[name]["shape"]:
            raise CompressionError("base_mismatch", f"'{name}' has another shape in the base than in the artifact")

    def _tiles(self, name: str) -> Iterator[torch.Tensor]:
        entry = self.table[name]
        if entry["kind"] == "rows":
            return RowsReader(self._own.file(name)).tiles(name, entry, self._base.file(name))
        self._check_base(name)
        return self._coders[entry["kind"]].tiles(name, entry, self._base.file(name))
