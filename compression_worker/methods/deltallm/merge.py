"""From an artifact back to weights, ``W_l = W_a + B A``, or to a model that keeps each anchor's weight once.

A scaled anchor counts by its ``c``; see :mod:`compression_worker.methods.deltallm.differences`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compression_worker.architecture import describe
from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError
from compression_worker.making.beneath import as_base, implementation
from compression_worker.making.loading import dense_model, module_path, pack_modules
from compression_worker.making.reading import ArtifactTensors
from compression_worker.methods.deltallm.differences import Pieces, dense
from compression_worker.methods.deltallm.layout import is_known, keys
from compression_worker.methods.deltallm.shared import SharedLinear
from compression_worker.tensors import TensorFiles


class SharedTensors(ArtifactTensors):
    """The tensors of an artifact of DeltaLLM; what is not shared is read as the base's method reads it, if any."""

    def __init__(self, artifact: Artifact) -> None:
        said, places = artifact.manifest["layout"], dict[str, Path]()
        if not is_known(said):
            raise CompressionError(
                "unknown_format", "the artifact shares layers in a way that this version does not know"
            )
        for name, entry in artifact.manifest["tensors"].items():
            path = artifact.paths[entry["file"]]
            places |= dict.fromkeys(keys(name, entry["form"]), path) if entry["kind"] == "shared" else {name: path}
        super().__init__(artifact, said, TensorFiles(places))
        self._base: ArtifactTensors | None = None
        if beneath := base_of_artifact(artifact):
            self._base = self._stack.enter_context(implementation(beneath).open_merged(None, beneath))

    def pieces(self, name: str) -> Pieces:
        """What is stored of a shared weight."""
        return tuple(self._own.file(key).tensor(key) for key in keys(name, self.table[name]["form"]))

    def tiles_of(self, name: str) -> Iterator[torch.Tensor]:
        entry = self.table[name]
        if entry["kind"] != "shared":
            assert self._base is not None
            yield from self._base.tiles_of(name)
            return
        anchor = self.tensor(entry["anchor"], torch.float32)
        if entry.get("transposed"):
            yield dense(self.pieces(name), anchor.T).T
        else:
            yield dense(self.pieces(name), anchor)


def base_of_artifact(artifact: Artifact) -> Artifact | None:
    """The packed base as an artifact of its own method, which lacks the shared weights; None where there is none."""
    return as_base(artifact, artifact.manifest["tensors"]) if artifact.manifest["layout"]["base"] else None


def open_merged(base: object, artifact: Artifact) -> SharedTensors:
    """The tensors of the compressed model, for a restore."""
    return SharedTensors(artifact)


def load_model(
    base: object,
    artifact: Artifact,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    dense: bool = False,
) -> torch.nn.Module:
    """The model with one copy of each anchor in memory; a packed base is decoded on a CPU and stays in codes on a GPU.

    ``dense`` makes every follower's weight once instead: as large as the model was, and without the low-rank products.
    """
    if not dense:
        return _shared(artifact, device, dtype, packed=device.startswith("cuda"))
    with SharedTensors(artifact) as made:
        model: torch.nn.Module = dense_model(made, dtype, shared=True)
    return model.to(device).eval().requires_grad_(False)


def load_packed(artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model whose followers use their anchors' weights, which stay in codes where there is a packed base."""
    return _shared(artifact, device, dtype, packed=True)


def _shared(artifact: Artifact, device: str, dtype: torch.dtype | None, *, packed: bool) -> torch.nn.Module:
    beneath = base_of_artifact(artifact)
    with SharedTensors(artifact) as made:
        if beneath is None:
            model: Any = dense_model(made, dtype)
        elif packed:
            model = implementation(beneath).load_packed(beneath, "cpu", dtype)
        else:
            model = implementation(beneath).load_model(None, beneath, "cpu", dtype)
        share(model, made)
    loaded: torch.nn.Module = model.to(device).eval().requires_grad_(False)
    return loaded


def share(model: Any, made: SharedTensors) -> None:
    """Put linears that use their anchor's weight in the place of the followers'."""
    memory = describe(made.artifact.config).renamed_for(made.table).memory
    modules = dict(model.named_modules())
    names = {name: memory.get(name, name) for name, entry in made.table.items() if entry["kind"] == "shared"}

    def shared(name: str, linear: Any) -> SharedLinear:
        anchor = made.table[name]["anchor"]
        path = module_path(memory.get(anchor, anchor), modules, model.base_model_prefix)
        return SharedLinear(modules[path], made.pieces(name), linear.bias)

    pack_modules(model, names, shared)
