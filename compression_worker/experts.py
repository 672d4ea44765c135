"""Mixtures of experts: one matrix per expert on disk, all experts of a layer stacked in one parameter in memory.

A checkpoint holds ``experts.0.w1.weight`` and so on; the model that transformers makes of it holds one parameter
``(experts, rows, K)``, often with two kinds of matrices below each other. transformers knows the way in both
directions for every family; it is asked once here, with the row numbers in place of the weights, so that what it
answers is an exact map whatever the family calls its experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Slice:
    """One matrix of a stack: rows ``first`` to ``first + rows`` of the parameter seen as ``(experts * rows, K)``."""

    name: str
    first: int
    rows: int


@dataclass(frozen=True)
class Written:
    """How a model is written to disk: new names of single tensors, and the matrices that each stack falls into."""

    names: dict[str, str]
    stacks: dict[str, tuple[Slice, ...]]


def written(model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> Written:
    """The names under which ``model`` (on any device, the meta device too) lies in a checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    ours = dict(tensors)
    try:
        theirs = revert_weight_conversion(model, ours)
    except (ValueError, RuntimeError, KeyError, AttributeError):
        return Written({}, {})  # a way back that transformers does not know: the names in memory are all there is
    # What is only renamed comes back as the same object; a stack comes back in pieces.
    same = {id(tensor): name for name, tensor in theirs.items()}
    names = {name: same[id(tensor)] for name, tensor in ours.items() if id(tensor) in same}
    stacks = {}
    for name, tensor in ours.items():
        if name not in names and tensor.ndim == 3 and (slices := _slices(model, name, tensor.shape)):
            stacks[name] = slices
    return Written(names, stacks)


def _slices(model: Any, name: str, shape: torch.Size) -> tuple[Slice, ...]:
    """The matrices of one stack in the order of their names; none where it does not fall into whole runs of rows."""
    from transformers.core_model_loading import revert_weight_conversion

    total = shape[0] * shape[1]
    numbers = torch.arange(total, device="cpu").view(shape[0], shape[1], 1)
    try:
        pieces = revert_weight_conversion(model, {name: numbers})
    except (ValueError, RuntimeError, KeyError, AttributeError):
        return ()
    slices = []
    for piece, rows in pieces.items():
        first, count = int(rows.flatten()[0]), len(rows)
        if rows.shape != (count, 1) or not torch.equal(rows.flatten(), torch.arange(first, first + count)):
            return ()
        slices.append(Slice(piece, first, count))
    whole = len(slices) > 1 and sum(one.rows for one in slices) == total
    return tuple(sorted(slices, key=lambda one: _by_number(one.name))) if whole else ()


def _by_number(name: str) -> list[tuple[int, str]]:
    """Expert 2 before expert 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
