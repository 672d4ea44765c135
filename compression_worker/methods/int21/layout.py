"""How the adapter lies on disk: as PEFT writes it, beside the files of the base. No torch.

``adapter_model.safetensors`` holds ``base_model.model.<module>.lora_A.weight (r, K)`` and ``lora_B.weight (N, r)``, and
``adapter_config.json`` what PEFT asks for. Both lie in the artifact's folder, which therefore is a PEFT adapter too.
"""

from __future__ import annotations

from collections.abc import Mapping

from compression_worker.contracts import Json
from compression_worker.making.table import Weigh, sides_of

PACKED_BASE = "packed_base"
"""The key in the metadata of the adapter's file under which the digest of its base stands."""
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def adapter_parameters(entry: Json, rank: int) -> int:
    """``r (N + K)`` of one linear."""
    return rank * sum(sides_of(entry))


def weighing(beneath: Weigh, item_bytes: int) -> Weigh:
    """How a line weighs: as in the base, and its adapter where it has one."""

    def weigh(entry: Json) -> tuple[Mapping[str, int], int]:
        sizes, weights = beneath(entry)
        if rank := entry.get("rank", 0):
            sizes = {**sizes, "adapter": item_bytes * adapter_parameters(entry, rank)}
        return sizes, weights

    return weigh
