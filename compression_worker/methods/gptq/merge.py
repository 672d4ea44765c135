"""From an artifact back to weights, dense or packed: ``W^ = scale * (code - zero)``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from compression_worker.artifact import Artifact
from compression_worker.making.loading import dense_model, pack_modules
from compression_worker.making.reading import ArtifactTensors
from compression_worker.making.table import sides_of
from compression_worker.methods.gptq.layout import LAYOUT, PIECES, padded, stem
from compression_worker.tensors import TensorFiles
from kernels.dequant_matmul.layout import pack_zeros, unpack_zeros
from kernels.dequant_matmul.operands import PackedWeight, packed_weight
from kernels.dequant_matmul.reference import dequantize
from kernels.registry import choose

TILE_ROWS = 4096


class GridTensors(ArtifactTensors):
    """The tensors of a GPTQ artifact."""

    def __init__(self, artifact: Artifact) -> None:
        places: dict[str, Path] = {}
        for name, entry in artifact.manifest["tensors"].items():
            if entry["kind"] == "grid":
                places |= {f"{stem(name)}.{piece}": artifact.paths[entry["file"]] for piece in PIECES}
            elif "file" in entry:
                places[name] = artifact.paths[entry["file"]]
        super().__init__(artifact, LAYOUT, TensorFiles(places))
        self._less = int(artifact.manifest["config"]["checkpoint_format"] == "gptq")

    def packed(self, name: str) -> PackedWeight:
        """The four tensors of a linear, zeros as they are; its sides are padded to multiples of 32."""
        bits = self.table[name]["bits"]
        made = {piece: self._own.file(f"{stem(name)}.{piece}").tensor(f"{stem(name)}.{piece}") for piece in PIECES}
        if self._less:
            zeros = unpack_zeros(made["qzeros"], bits).to(torch.int32)
            made["qzeros"] = pack_zeros((zeros + self._less) & ((1 << bits) - 1), bits)
        return packed_weight(made["qweight"], made["qzeros"], made["scales"], made["g_idx"], bits)

    def tiles_of(self, name: str) -> Iterator[torch.Tensor]:
        entry = self.table[name]
        outputs, inputs = sides_of(entry)
        weight = self.packed(name)
        pieces = (weight.qweight, weight.qzeros, weight.scales, weight.g_idx)
        if entry.get("transposed"):
            yield dequantize(*pieces, weight.bits)[:outputs, :inputs].T
            return
        for row in range(0, outputs, TILE_ROWS):
            yield dequantize(*pieces, weight.bits, slice(row, min(outputs, row + TILE_ROWS)))[:, :inputs]


class PackedLinear(torch.nn.Module):
    """``y (..., N) = x (..., K) W^^T + bias`` from packed codes; differentiable in ``x`` with nothing dense kept."""

    def __init__(self, weight: PackedWeight, outputs: int, inputs: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.bits, self.group_size = weight.bits, weight.group_size
        for name in PIECES:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False) if bias is not None else None

    @property
    def packed(self) -> PackedWeight:
        pieces = {name: getattr(self, name) for name in PIECES}
        return PackedWeight(**pieces, bits=self.bits, group_size=self.group_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = padded(self.in_features)
        if wide != self.in_features:
            x = torch.nn.functional.pad(x, (0, wide - self.in_features))
        y = choose("dequant_matmul", str(x.device))(x, self.packed)[..., : self.out_features]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def load_model(
    base: object, artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """Dense on a CPU, made once; packed on a GPU."""
    if device.startswith("cuda"):
        return load_packed(artifact, device, dtype)
    with GridTensors(artifact) as tensors:
        model: torch.nn.Module = dense_model(tensors, dtype)
    return model.to(device).eval().requires_grad_(False)


def load_packed(artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model with its coded linears left packed; those that are no module of their own are dense."""
    with GridTensors(artifact) as tensors:
        names = _packable(artifact, tensors)
        model = dense_model(tensors, dtype, leave=lambda name: name in names)

        def packed(name: str, linear: torch.nn.Module) -> torch.nn.Module:
            outputs, inputs = sides_of(tensors.table[name])
            return PackedLinear(tensors.packed(name), outputs, inputs, linear.bias)

        pack_modules(model, names, packed)
    return model.to(device).eval().requires_grad_(False)


def _packable(artifact: Artifact, tensors: GridTensors) -> dict[str, str]:
    """Name -> name in memory of the coded linears that are modules; experts in a stack are not."""
    from compression_worker.architecture import describe

    architecture = describe(artifact.config).renamed_for(tensors.table)
    stacked = architecture.stacked()
    return {
        name: architecture.memory.get(name, name)
        for name, entry in tensors.table.items()
        if entry["kind"] == "grid" and name not in stacked
    }
