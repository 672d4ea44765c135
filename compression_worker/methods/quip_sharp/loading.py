"""A QuIP# artifact as a model in memory: dense, or with its linears left in code words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compression_worker.architecture import describe
from compression_worker.artifact import Artifact
from compression_worker.making.loading import dense_model, pack_modules
from compression_worker.making.table import sides_of
from compression_worker.methods.quip_sharp.layout import MATRIX
from compression_worker.methods.quip_sharp.merge import LatticeTensors
from compression_worker.methods.quip_sharp.packed import PackedLinear, StackProduct


def load_model(
    base: object, artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """Dense on a CPU, decoded once; in code words on a GPU."""
    if device.startswith("cuda"):
        return load_packed(artifact, device, dtype)
    with LatticeTensors(artifact) as made:
        model: torch.nn.Module = dense_model(made, dtype)
    return model.to(device).eval().requires_grad_(False)


def load_packed(artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model with its coded linears in code words; the experts of mixtures, one stack in memory, are dense."""
    with LatticeTensors(artifact) as made:
        names = packable(made)
        model = dense_model(made, dtype, leave=names.__contains__)
        pack(model, made, names)
    return model.to(device).eval().requires_grad_(False)


def pack(model: Any, made: LatticeTensors, names: dict[str, str]) -> None:
    """Put packed linears in the place of those of ``names`` (name -> name in memory), which own a bias or none."""
    parts = dict(packed_parts(made, names))

    def packed(name: str, linear: Any) -> PackedLinear:
        entry, product = made.table[name], parts[made.table[name]["stack"]]
        rows, is_owner = sides_of(entry)[0], entry["stack"] == name
        return PackedLinear(product, entry["first"], rows, linear.bias, owner=is_owner)

    pack_modules(model, names, packed)


def packed_parts(made: LatticeTensors, names: dict[str, str]) -> Iterator[tuple[str, StackProduct]]:
    """The products of the stacks that ``names`` belong to."""
    for stack in made.stacks():
        if stack in names:
            yield stack, StackProduct(made.stack(stack))


def packable(made: LatticeTensors) -> dict[str, str]:
    """Name -> name in memory of the coded linears that are modules of their own."""
    architecture = describe(made.artifact.config).renamed_for(made.table)
    stacked = architecture.stacked()
    return {
        name: architecture.memory.get(name, name)
        for name, entry in made.table.items()
        if entry["kind"] == "lattice" and entry["coding"] == MATRIX and name not in stacked
    }
