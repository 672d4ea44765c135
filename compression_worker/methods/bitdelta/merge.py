"""From base and artifact back to weights: ``W = W_b + D_hat``, by tiles, whole, or left packed for a kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compression_worker.architecture import describe
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json
from compression_worker.deltas.merged import Merged
from compression_worker.making.loading import dense_model, pack_modules
from compression_worker.making.table import sides_of
from compression_worker.making.threads import ahead
from compression_worker.methods.bitdelta.coding import Coding, decode
from compression_worker.methods.bitdelta.layout import (
    FINE,
    FINER_LAYOUT,
    LAYOUT,
    SCALES,
    SCALES_FILE,
    coding_of,
)
from compression_worker.tensors import TensorFile
from kernels.packing import WORD_BITS, unpack_signs, words_for
from kernels.registry import choose

TILE_ELEMENTS = 1 << 20


class MergedSigns(Merged):
    """The tensors of a BitDelta artifact."""

    def __init__(self, base: Checkpoint, artifact: Artifact) -> None:
        finer = artifact.manifest["layout"].get("version") == FINER_LAYOUT["version"]
        with TensorFile(artifact.paths[SCALES_FILE]) as file:
            self._vectors = {name: file.tensor(name) for name in file.entries}
        super().__init__(base, artifact, FINER_LAYOUT if finer else LAYOUT, {"sign": self})

    def codes(self, name: str) -> torch.Tensor:
        """The packed signs of a block linear: ``(ceil(K/32), N)``, or stacked ``(masks, ceil(K/32), N)``."""
        packed = self._own.file(name).tensor(name)
        entry = self.table[name]
        outputs, inputs = sides_of(entry)
        masks = coding_of(entry).masks
        shape = (words_for(inputs), outputs) if masks == 1 else (masks, words_for(inputs), outputs)
        if tuple(packed.shape) != shape or packed.dtype != torch.int32:
            raise CompressionError("damaged_artifact", f"the codes of '{name}' do not fit its shape")
        return packed

    def scale(self, name: str) -> torch.Tensor:
        """The scales of a block linear: one fp32 element, or ``(masks, values)`` in bf16."""
        entry = self.table[name]
        place, coding = entry["scale"], coding_of(entry)
        if coding.plain:
            return self._vectors[SCALES][place]
        count = coding.values(*sides_of(entry))
        found = self._vectors[FINE][place : place + coding.masks * count] if coding.masks else torch.zeros(0)
        if len(found) != coding.masks * count:
            raise CompressionError("damaged_artifact", f"the scales of '{name}' do not fit its shape")
        return found.view(coding.masks, count)

    def tiles(self, name: str, entry: Json, base: TensorFile) -> Iterator[torch.Tensor]:
        """``W_b + D_hat`` in fp32, some rows at a time."""
        coding = coding_of(entry)
        return self._plain(name, entry, base) if coding.plain else self._finer(name, entry, base, coding)

    def _plain(self, name: str, entry: Json, base: TensorFile) -> Iterator[torch.Tensor]:
        packed, scale = self.codes(name), self.scale(name)

        def merged(rows: range) -> torch.Tensor:
            signs = self._signs(entry, packed, rows, entry["shape"][1])
            return base.rows(name, rows).to(torch.float32).add_(signs.mul_(scale))

        return ahead(merged, _tiles(entry["shape"]))

    def _finer(self, name: str, entry: Json, base: TensorFile, coding: Coding) -> Iterator[torch.Tensor]:
        outputs, inputs = sides_of(entry)
        file = self._own.file(name)
        none = torch.zeros(0)
        left, right = (file.tensor(f"{name}#{side}") if coding.rank else none for side in ("left", "right"))
        packed = self.codes(name).view(coding.masks, words_for(inputs), outputs)
        delta = decode(packed, self.scale(name), left, right, coding, inputs)
        delta = delta.T if entry.get("transposed") else delta
        for rows in _tiles(entry["shape"]):
            yield base.rows(name, rows).to(torch.float32).add_(delta[rows.start : rows.stop])

    def _signs(self, entry: Json, packed: torch.Tensor, rows: range, width: int) -> torch.Tensor:
        if not entry.get("transposed"):
            return unpack_signs(packed[:, rows.start : rows.stop], width)
        words = packed[rows.start // WORD_BITS : words_for(rows.stop)]
        return unpack_signs(words, len(rows)).T.contiguous()


def _tiles(shape: Sequence[int]) -> list[range]:
    """The rows of each tile. Whole words of a transposed matrix lie along its rows: its tiles end where words end."""
    height, width = shape
    step = max(1, TILE_ELEMENTS // width // WORD_BITS) * WORD_BITS
    return [range(start, min(start + step, height)) for start in range(0, height, step)]


class PackedLinear(torch.nn.Module):
    """``y = x W_b^T + sum_i x (scale_i * S_i)^T + bias`` with the signs left packed: a bit a weight and mask.

    ``scale`` is one element, or ``(masks, 1 or N, 1 or ceil(K / group_size))``.
    """

    def __init__(
        self,
        base: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.group_size = group_size
        self.register_buffer("weight", base)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        product = choose("binary_matmul", str(x.device.type))
        y: torch.Tensor = product(
            flat, self.packed, self.scale, weight=self.weight, bias=self.bias, group_size=self.group_size
        )
        return y.view(*x.shape[:-1], -1)


def scale_operand(scale: torch.Tensor, coding: Coding, outputs: int) -> tuple[torch.Tensor, int | None]:
    """The scales of a linear in the shape that the product takes, fp32, and the inputs that share one."""
    if coding.plain:
        return scale, None
    whole = scale.to(torch.float32)
    shapes = {"tensor": (1, 1), "row": (outputs, 1), "column": (1, -1), "group": (outputs, -1)}
    sizes = {"column": 1, "group": coding.group_size}
    return whole.view(coding.masks, *shapes[coding.scale]), sizes.get(coding.scale)


def load_model(
    base: Checkpoint,
    artifact: Artifact,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    packed: bool | None = None,
) -> torch.nn.Module:
    """The compressed model in memory; ``packed`` None merges on a CPU and keeps one bit a weight on CUDA.

    Linears with a low-rank part, or with no mask at all, are merged everywhere.
    """
    keep_packed = device.startswith("cuda") if packed is None else packed
    with MergedSigns(base, artifact) as merged:
        kept = _packable(artifact) if keep_packed else {}
        model = dense_model(merged, dtype, kept.__contains__)
        model.to(device)

        def module(name: str, linear: Any) -> PackedLinear:
            coding = coding_of(merged.table[name])
            scale, group_size = scale_operand(merged.scale(name), coding, linear.weight.shape[0])
            codes = merged.codes(name).to(device)
            codes = codes if coding.plain else codes.view(coding.masks, *codes.shape[-2:])
            bias = None if linear.bias is None else linear.bias.data
            return PackedLinear(linear.weight.data, codes, scale.to(device), bias, group_size)

        pack_modules(model, kept, module)
    return model.eval().requires_grad_(False)


def _packable(artifact: Artifact) -> dict[str, str]:
    """The linears that are masks alone and a module of their own, by the name of the weight in memory.

    A weight that is stored the other way round and the experts of a mixture, which are one stack in memory, are merged.
    """
    table = artifact.manifest["tensors"]
    architecture = describe(artifact.config).renamed_for(table)
    coded = {name for name, entry in table.items() if entry["kind"] == "sign" and not entry.get("transposed")}
    own = {name for name in coded - architecture.stacked() if _is_masks(coding_of(table[name]))}
    return {name: architecture.memory.get(name, name) for name in sorted(own)}


def _is_masks(coding: Coding) -> bool:
    return coding.masks > 0 and not coding.rank
