"""Experts of a mixture in scale distillation: all matrices of a stack, each with scales of its own.

The model in memory reads one parameter ``(E, R, K)`` for all ``E`` experts of a layer. Seen as ``(E * R, K)`` it is the
matrices of the experts one under another. The merged stack is kept for the backward pass: it costs four bytes a weight
of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from compression_worker.architecture import Architecture
from compression_worker.experts import Slice
from compression_worker.methods.bitdelta.matrices import CodedMatrix, Matrix


class StackedLinear:
    """One matrix of a stack in both roles. ``scales`` is None while the model answers as teacher."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.scales: torch.Tensor | None = None

    def merged(self) -> torch.Tensor:
        """The student's matrix ``(N, K)``, differentiable in the scales."""
        weight: torch.Tensor = CodedMatrix.apply(self.matrix.base, self.matrix.signs, self.scales, self.matrix.coding)
        return weight


class DistilledStack:
    """Puts the teacher's or the student's weights in the place of one stacked parameter, before each forward pass."""

    def __init__(
        self, owner: torch.nn.Module, parameter: str, slices: tuple[Slice, ...], matrices: Mapping[str, Matrix]
    ) -> None:
        ordered = sorted(slices, key=lambda one: one.first)
        self.linears = {one.name: StackedLinear(matrices[one.name]) for one in ordered}
        self._parameter = parameter
        self._full: torch.Tensor = getattr(owner, parameter).data
        delattr(owner, parameter)
        owner.register_forward_pre_hook(self)

    def __call__(self, owner: torch.nn.Module, args: Any) -> None:
        weights = self._full
        if all(linear.scales is not None for linear in self.linears.values()):
            merged = torch.cat([linear.merged() for linear in self.linears.values()])
            weights = merged.to(self._full.dtype).view(self._full.shape)
        setattr(owner, self._parameter, weights)


def stacked_linears(model: Any, architecture: Architecture, matrices: Mapping[str, Matrix]) -> dict[str, StackedLinear]:
    """Prepare every stack of ``model``; its matrices by name."""
    found: dict[str, StackedLinear] = {}
    for stack, slices in architecture.stacks.items():
        path, _, parameter = stack.rpartition(".")
        found |= DistilledStack(model.get_submodule(path), parameter, slices, matrices).linears
    return found
