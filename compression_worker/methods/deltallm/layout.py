"""How DeltaLLM lies on disk: what is stored as it is, and the factors of each follower. No torch.

``deltas.safetensors`` holds ``<weight>#A (r, K)`` and ``<weight>#B (N, r)`` of each weight that is not stored; its line
in the table is of kind ``shared`` and names the ``anchor`` whose weight it uses. The weight in the checkpoint's own
orientation is ``W_anchor + B A``, transposed where the checkpoint keeps it so.
"""

from __future__ import annotations

from collections.abc import Mapping

from compression_worker.contracts import Json
from compression_worker.making.table import sides_of

DELTAS_FILE = "deltas.safetensors"
QUANT_METHOD = "deltaworks_deltallm"
"""The name by which transformers knows how to load the artifact's folder."""
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
NAME, VERSION = "shared-layers", 1


def layout() -> Json:
    """What the manifest says of the layout."""
    return {"name": NAME, "version": VERSION, "rule": "W = W_anchor + B A"}


def delta_parameters(entry: Json) -> int:
    """``r (N + K)`` of a line of kind ``shared``."""
    return int(entry["rank"]) * sum(sides_of(entry))


def weigh(entry: Json) -> tuple[Mapping[str, int], int]:
    """Bytes by part of a line of kind ``shared``, and the weights it stands for."""
    outputs, inputs = sides_of(entry)
    return {"deltas": ITEM_BYTES[entry["delta_dtype"]] * delta_parameters(entry)}, outputs * inputs
