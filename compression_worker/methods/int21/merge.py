"""From an artifact back to weights: ``W = W^ + (alpha / r) B A``, or the packed base with adapters beside it."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from compression_worker.adapters import WEIGHTS_FILE, lora_names
from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError
from compression_worker.making.beneath import implementation
from compression_worker.making.loading import dense_model
from compression_worker.making.reading import ArtifactTensors
from compression_worker.methods.int21 import packed_base as base_method
from compression_worker.methods.int21.layout import PACKED_BASE
from compression_worker.tensors import TensorFile, TensorFiles


class Adapter:
    """The low-rank factors of an artifact. A context manager: it holds their file open."""

    def __init__(self, artifact: Artifact) -> None:
        layout = artifact.manifest["layout"]
        self.scale = layout["alpha"] / layout["rank"]
        path = artifact.paths[WEIGHTS_FILE]
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
        if said.get(PACKED_BASE) != layout["packed_base"]:
            raise CompressionError(
                "base_mismatch",
                f"'{WEIGHTS_FILE}' was trained on another packed base than the one beside it: take both from one place",
            )
        self._file = TensorFile(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def factors(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``A (r, K)`` and ``B (N, r)`` in fp32 of the linear at ``path`` of the model in memory."""
        first, second = (self._file.tensor(name).to(torch.float32) for name in lora_names(path))
        return first, second

    def all(self) -> dict[str, torch.Tensor]:
        """Every factor by the name that PEFT gives it, as stored."""
        return {name: self._file.tensor(name) for name in self._file.entries}


class CorrectedTensors(ArtifactTensors):
    """The tensors of an artifact of INT2.1: those of its base, and on each adapted linear what the adapter adds."""

    def __init__(self, artifact: Artifact) -> None:
        beneath = base_method.beneath(artifact)
        super().__init__(artifact, artifact.manifest["layout"], TensorFiles({}))
        self._base: ArtifactTensors = self._stack.enter_context(implementation(beneath).open_merged(None, beneath))
        self._adapter = self._stack.enter_context(Adapter(artifact))
        self._adapted = base_method.adapted(artifact)

    def verbatim(self, name: str) -> TensorFile | None:
        return self._base.verbatim(name)

    def tiles_of(self, name: str) -> Iterator[torch.Tensor]:
        tiles = self._base.tiles_of(name)
        if name not in self._adapted:
            yield from tiles
            return
        a, b = self._adapter.factors(self._adapted[name])
        left, right = (a.T, b.T) if self.table[name].get("transposed") else (b, a)
        row = 0
        for tile in tiles:
            # Added in memory of its own: a method may keep the tile for the next matrix of its stack.
            yield torch.addmm(tile, left[row : row + len(tile)], right, alpha=self._adapter.scale)
            row += len(tile)


def open_merged(base: object, artifact: Artifact) -> CorrectedTensors:
    """The tensors of the corrected model, for a restore."""
    return CorrectedTensors(artifact)


def load_model(
    base: object, artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """Dense on a CPU, with the adapters merged once; packed with adapters beside on a GPU."""
    if device.startswith("cuda"):
        return load_packed(artifact, device, dtype)
    with CorrectedTensors(artifact) as tensors:
        model: torch.nn.Module = dense_model(tensors, dtype)
    return model.to(device).eval().requires_grad_(False)


def load_packed(artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The packed base with the adapters on it, as PEFT's layers."""
    from compression_worker.quantization import lora

    beneath = base_method.beneath(artifact)
    model: Any = implementation(beneath).load_packed(beneath, device, dtype)
    sides = base_method.sides(artifact)
    layout = artifact.manifest["layout"]
    with Adapter(artifact) as stored:
        lora.attach(model, sides, rank=layout["rank"], alpha=layout["alpha"])
        lora.put(model, sides, stored.all())
    loaded: torch.nn.Module = model.eval().requires_grad_(False)
    return loaded
