"""What an escrow and the way back from it will need, from a checkpoint's totals alone. No torch, no numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compression_worker.contracts import Json
from compression_worker.preflight import Estimate, Model, StepLoad

GROUP_BYTES = 512 << 20
"""Weights of one encode step: some ten seconds of work, lost at most when a worker dies."""
MOST_SHARE = 0.5
"""Of the weights' bytes, that a fine-tune's codes come to at most; small steps come to a seventh."""


def escrow_estimate(model: Model) -> Estimate:
    """Every weight is read, coded and decoded again; the codes are written once."""
    codes = round(MOST_SHARE * model.weight_bytes)
    groups = max(1, math.ceil(model.weight_bytes / GROUP_BYTES))
    weights = float(model.parameters)
    steps = (
        StepLoad(kind="escrow.plan", count=1, units=1.0),
        StepLoad(kind="escrow.encode", count=groups, units=weights),
        StepLoad(kind="escrow.assemble", count=1, units=float(model.size_bytes)),
    )
    return Estimate(
        parts=({"name": "codes", "bytes": codes}, {"name": "side files", "bytes": model.side_bytes}),
        source_bytes=model.weight_bytes,
        steps=steps,
        sizes={"source_bytes": float(model.size_bytes)},
        exact=False,
    )


def restore_estimate(model: Model) -> Estimate:
    """The weights are written as they were."""
    load = StepLoad(kind="escrow.restore", count=1, units=float(model.size_bytes))
    return Estimate(
        parts=({"name": "weights", "bytes": model.weight_bytes},),
        source_bytes=model.size_bytes,
        steps=(load,),
        sizes={"source_bytes": float(model.size_bytes)},
    )


def encode_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Weights coded."""
    return float(params["weights"])
