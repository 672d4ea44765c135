"""What a matrix may be coded as when a target decides: from nothing at all to eight masks."""

from __future__ import annotations

from compression_worker.architecture import Linear
from compression_worker.methods.bitdelta.coding import Coding

OPTIONS = (
    Coding(masks=0),
    Coding(masks=0, rank=4),
    Coding(masks=0, rank=16),
    Coding(),
    Coding(scale="row"),
    Coding(scale="column"),
    Coding(scale="group", group_size=128),
    Coding(scale="group", group_size=64),
    Coding(scale="group", group_size=32),
    Coding(scale="group", group_size=16),
    Coding(scale="row", rank=8),
    Coding(scale="group", group_size=64, rank=16),
    Coding(scale="row", masks=2),
    Coding(scale="group", group_size=64, masks=2),
    Coding(scale="group", group_size=32, masks=2),
    Coding(scale="row", masks=3),
    Coding(scale="group", group_size=64, masks=3),
    Coding(scale="group", group_size=64, masks=4),
    Coding(scale="group", group_size=64, masks=6),
    Coding(scale="group", group_size=64, masks=8),
)


def fitted(linear: Linear, option: int) -> Coding:
    """Option number ``option`` with a rank and a group that the matrix has."""
    return OPTIONS[option].fitting(linear.outputs, linear.inputs)
