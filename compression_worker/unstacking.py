"""A mixture that was saved with its experts stacked, taken in with a matrix for each expert.

``save_pretrained(..., save_original_format=False)`` writes what is in memory: one tensor ``(experts, rows, K)`` for a
kind of matrix. Each expert lies in it as a run of whole rows, so the weights keep their order and their bytes; only
names, shapes and places in the header change, to those that ``save_pretrained`` gives by default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from compression_worker import gate
from compression_worker.contracts import CompressionError, Json
from compression_worker.gate import TensorEntry
from compression_worker.intake import Shard

if TYPE_CHECKING:
    from compression_worker.experts import Slice  # which needs torch


def unstacked(shards: list[Shard], config: Json) -> list[Shard]:
    """``shards`` with a matrix for each expert; the same where no experts are stacked, which needs no torch to see."""
    if not any(len(tensor.shape) == 3 for shard in shards for tensor in shard.tensors):
        return shards
    from compression_worker.architecture import describe

    try:
        architecture = describe(config)
    except CompressionError:
        return shards  # an import takes what it does not understand as it is
    names = {tensor.name for shard in shards for tensor in shard.tensors}
    if not names & architecture.stacks.keys():
        return shards
    disk = {own: name for name, own in architecture.memory.items()}
    changed = [_with_tensors(shard, list(_matrices(shard, architecture.stacks, disk))) for shard in shards]
    found: set[str] = set()
    for name in (tensor.name for shard in changed for tensor in shard.tensors):
        if name in found:
            raise CompressionError(
                "duplicate_tensor", f"'{name}' is there as a matrix and in a stack of experts: keep one of them"
            )
        found.add(name)
    return changed


def index_of(shards: list[Shard]) -> bytes:
    """The index of ``shards``."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    size = sum(shard.tensors[-1].end for shard in shards)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2, sort_keys=True).encode()


def _matrices(shard: Shard, stacks: Mapping[str, tuple[Slice, ...]], disk: Mapping[str, str]) -> Iterator[TensorEntry]:
    for tensor in shard.tensors:
        slices = sorted(stacks.get(tensor.name, ()), key=lambda one: one.first)
        if not slices:
            yield replace(tensor, name=disk.get(tensor.name, tensor.name))
            continue
        rows = sum(one.rows for one in slices)
        if len(tensor.shape) != 3 or tensor.shape[0] * tensor.shape[1] != rows:
            raise CompressionError(
                "shape_mismatch",
                f"the experts in '{tensor.name}' of '{shard.name}' are {list(tensor.shape)}, which is not what "
                "config.json promises: copy the checkpoint again",
            )
        row_bytes = tensor.shape[2] * gate.ITEM_SIZE[tensor.dtype]
        for one in slices:
            begin = tensor.begin + one.first * row_bytes
            yield TensorEntry(one.name, tensor.dtype, (one.rows, tensor.shape[2]), begin, begin + one.rows * row_bytes)


def _with_tensors(shard: Shard, tensors: list[TensorEntry]) -> Shard:
    header: Json = {"__metadata__": {"format": "pt"}}
    for one in tensors:
        header[one.name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": [one.begin, one.end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return replace(shard, header=len(text).to_bytes(8, "little") + text, tensors=tensors, start=shard.data_start)
