"""How DeltaDQ lies on disk.

Survivors' codes of block ``i`` are in ``codes-<i>.safetensors``, a uint8 tensor per linear: a stream of ``k``-bit codes
in scan order (or bf16 values), or a zstandard frame of them where that is smaller. The grid of a linear is two numbers,
``scale`` and ``zero``, in the fp32 vectors of ``grids.safetensors``; a linear knows its place there and its number
among the mask's tensors. Positions are not stored: the manifest's seed and layout say how they are made.
"""

from __future__ import annotations

from collections.abc import Mapping

from compression_worker.architecture import Linear
from compression_worker.contracts import Json
from compression_worker.making.table import codes_file, sides_of

GRIDS_FILE = "grids.safetensors"
SCALES, ZEROS = "scales", "zeros"
LAYOUT: Json = {
    "name": "survivors-in-scan-order",
    "version": 1,
    "generator": "philox4x32-10",
    "counter": ["block", "group", "row", "tensor"],
    "key": "seed",
    "rule": "the ceil(size / alpha) smallest keys of a group survive, ties by the lower index",
    "lowest_bit_first": True,
}


def sparse_entry(linear: Linear, dtype: str, place: int, line: Json) -> Json:
    """The manifest's line of a linear; ``place`` is its grid's and its number among the mask's tensors."""
    entry = {
        "kind": "sparse",
        "file": codes_file(linear.block),
        "dtype": dtype,
        "shape": list(linear.shape),
        "place": place,
        "alpha": line["alpha"],
        "group_size": line["group_size"],
        "bits": line["bits"],
        "coding": line["coding"],
        "bytes": line["bytes"],
        "sha256": line["sha256"],
    }
    return entry | {"transposed": True} if linear.transposed else entry


def weigh(entry: Json) -> tuple[Mapping[str, int], int]:
    """Bytes by part of a line of kind ``sparse``, and the weights it stands for."""
    outputs, inputs = sides_of(entry)
    return {"codes": entry["bytes"], "scales": 8}, outputs * inputs
