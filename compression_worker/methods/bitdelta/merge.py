"""From base and artifact back to weights: ``W = W_b + scale * S``, by tiles, whole, or left packed for a kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from types import TracebackType
from typing import Any

import torch

from compression_worker.architecture import describe, parsed
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json
from compression_worker.methods.bitdelta.layout import LAYOUT, SCALES, SCALES_FILE
from compression_worker.tensors import DTYPES, Spec, TensorFile, TensorFiles, checkpoint_files, raw_bytes
from kernels.packing import WORD_BITS, unpack_signs, words_for
from kernels.registry import choose

TILE_ELEMENTS = 1 << 20


class Merged:
    """The tensors of the compressed model, made when asked for. A context manager: it holds files open."""

    def __init__(self, base: Checkpoint, artifact: Artifact) -> None:
        if artifact.manifest["layout"] != LAYOUT:
            raise CompressionError(
                "unknown_format", "the artifact's codes have a layout that this version does not know"
            )
        self._artifact = artifact
        self.table: Json = artifact.manifest["tensors"]
        self._base = checkpoint_files(base)
        self._own = TensorFiles({name: artifact.paths[e["file"]] for name, e in self.table.items() if "file" in e})
        with TensorFile(artifact.paths[SCALES_FILE]) as file:
            self.scales = file.tensor(SCALES)

    def __enter__(self) -> Merged:
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
        kind = self.table[name]["kind"]
        if kind == "sign":
            dtype = DTYPES[self.table[name]["dtype"]]
            return (raw_bytes(tile.to(dtype)) for tile in self._tiles(name))
        return (self._own if kind == "raw" else self._base).file(name).chunks(name)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor; a block linear is summed in fp32 and rounded once to ``dtype``."""
        entry = self.table[name]
        if entry["kind"] != "sign":
            return (self._own if entry["kind"] == "raw" else self._base).file(name).tensor(name).to(dtype)
        whole = torch.empty(entry["shape"], dtype=dtype)
        row = 0
        for tile in self._tiles(name):
            whole[row : row + len(tile)] = tile
            row += len(tile)
        return whole

    def codes(self, name: str) -> torch.Tensor:
        """The packed signs of a block linear."""
        packed = self._own.file(name).tensor(name)
        rows, width = self.table[name]["shape"]
        outputs, inputs = (width, rows) if self.table[name].get("transposed") else (rows, width)
        if tuple(packed.shape) != (words_for(inputs), outputs) or packed.dtype != torch.int32:
            raise CompressionError("damaged_artifact", f"the codes of '{name}' do not fit its shape")
        return packed

    def base_tensor(self, name: str) -> torch.Tensor:
        """The base's weight of a block linear."""
        self._check_base(name)
        return self._base.file(name).tensor(name)

    def scale(self, name: str) -> torch.Tensor:
        """The scale of a block linear, one fp32 element."""
        return self.scales[self.table[name]["scale"]]

    def _check_base(self, name: str) -> None:
        if list(self._base.spec(name).shape) != self.table[name]["shape"]:
            raise CompressionError("base_mismatch", f"'{name}' has another shape in the base than in the artifact")

    def _tiles(self, name: str) -> Iterator[torch.Tensor]:
        """``W_b + scale * S`` in fp32, some rows at a time."""
        self._check_base(name)
        packed, scale = self.codes(name), self.scale(name)
        height, width = self.table[name]["shape"]
        # Whole words of a transposed matrix lie along its rows, so its tiles end where words end.
        rows = max(1, TILE_ELEMENTS // width // WORD_BITS) * WORD_BITS
        row = 0
        for tile in self._base.file(name).row_tiles(name, rows):
            signs = self._signs(name, packed, row, len(tile), height, width)
            yield tile.to(torch.float32).add_(signs.mul_(scale))
            row += len(tile)

    def _signs(self, name: str, packed: torch.Tensor, row: int, rows: int, height: int, width: int) -> torch.Tensor:
        if not self.table[name].get("transposed"):
            return unpack_signs(packed[:, row : row + rows], width)
        words = packed[row // WORD_BITS : words_for(row + rows)]
        return unpack_signs(words, rows).T.contiguous()


class PackedLinear(torch.nn.Module):
    """``y = x W_b^T + scale * (x S^T) + bias`` with the signs left packed: one bit a weight beside the base's."""

    def __init__(
        self, base: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.register_buffer("weight", base)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale.clone())
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        delta = choose("binary_matmul", str(x.device.type))(flat, self.packed, self.scale)
        return torch.nn.functional.linear(x, self.weight, self.bias) + delta.view(*x.shape[:-1], -1)


def load_model(
    base: Checkpoint,
    artifact: Artifact,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    packed: bool | None = None,
) -> torch.nn.Module:
    """The compressed model in memory; ``packed`` None merges on a CPU and keeps one bit a weight on CUDA."""
    keep_packed = device.startswith("cuda") if packed is None else packed
    with Merged(base, artifact) as merged:
        packs = _packable(artifact) if keep_packed else {}
        weights = {}
        for name, entry in merged.table.items():
            own = dtype or DTYPES[entry["dtype"]]
            weights[name] = merged.base_tensor(name).to(own) if name in packs else merged.tensor(name, own)
        model = _filled(artifact, weights, dtype)
        model.to(device)
        _pack(model, merged, packs, device)
    return model.eval().requires_grad_(False)


def _filled(artifact: Artifact, weights: dict[str, torch.Tensor], dtype: torch.dtype | None) -> Any:
    """The variant's architecture holding ``weights``; refuses a gap, which transformers would fill at random."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = parsed(artifact.config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    own = dtype or max(weights.values(), key=torch.Tensor.numel).dtype
    model, report = kind.from_pretrained(None, config=config, state_dict=weights, dtype=own, output_loading_info=True)
    for part in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[part]):
            raise CompressionError(
                "damaged_artifact",
                f"{kind.__name__} and the artifact disagree on {len(names)} tensors ({names[0]} first)",
            )
    if generation := artifact.side_files().get("generation_config.json"):
        model.generation_config = GenerationConfig.from_dict(json.loads(generation.read_bytes()))
    return model


def _packable(artifact: Artifact) -> dict[str, str]:
    """The coded linears that are a module of their own, by the name that the model in memory has for the weight.

    A weight that is stored the other way round and the experts of a mixture, which are one stack in memory, are merged.
    """
    table = artifact.manifest["tensors"]
    architecture = describe(artifact.config).renamed_for(table)
    coded = {name for name, entry in table.items() if entry["kind"] == "sign" and not entry.get("transposed")}
    return {name: architecture.memory.get(name, name) for name in sorted(coded - architecture.stacked())}


def _pack(model: Any, merged: Merged, packs: dict[str, str], device: str) -> None:
    """Put a :class:`PackedLinear` in the place of each block linear that ``packs`` names."""
    modules = dict(model.named_modules())
    for name, weight in packs.items():
        path = module_path(weight, modules, model.base_model_prefix)
        parent, _, child = path.rpartition(".")
        linear = modules[path]
        codes, scale = merged.codes(name).to(device), merged.scale(name).to(device)
        bias = None if linear.bias is None else linear.bias.data
        setattr(modules[parent], child, PackedLinear(linear.weight.data, codes, scale, bias))


def module_path(tensor: str, modules: dict[str, Any], prefix: str) -> str:
    """The module that owns the weight ``tensor``; some checkpoints leave out the model's prefix."""
    path = tensor.removesuffix(".weight")
    return path if path in modules else f"{prefix}.{path}"
