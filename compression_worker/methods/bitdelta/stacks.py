"""Experts of a mixture in scale distillation: all matrices of a stack, each with its own scale.

The model in memory reads one parameter ``(E, R, K)`` for all ``E`` experts of a layer. Seen as ``(E * R, K)`` it is
``W = W_b + scale[row] * S``, where a row's scale is that of its matrix; the gradient of a scale is ``<dL/dW, S>`` over
the rows of its matrix. The merged stack is kept for the backward pass: it costs four bytes a weight of the experts.
"""

from __future__ import annotations

from typing import Any

import torch

from compression_worker.architecture import Architecture
from compression_worker.experts import Slice


class SignedStack(torch.autograd.Function):
    """base ``(R, K)``, signs ``(R, K)`` of +-1 in any dtype, scales ``(R,)`` -> ``base + scales * signs``."""

    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(signs)
        return torch.addcmul(base.to(scales.dtype), signs.to(scales.dtype), scales.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        (signs,) = ctx.saved_tensors
        return None, None, (gradient * signs.to(gradient.dtype)).sum(dim=1)


class StackedLinear:
    """One matrix of a stack in both roles. ``scale`` is None while the model answers as teacher."""

    def __init__(self) -> None:
        self.scale: torch.Tensor | None = None


class DistilledStack:
    """Puts the teacher's or the student's weights in the place of one stacked parameter, before each forward pass."""

    def __init__(
        self,
        owner: torch.nn.Module,
        parameter: str,
        slices: tuple[Slice, ...],
        pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        ordered = sorted(slices, key=lambda one: one.first)
        self.linears = {one.name: StackedLinear() for one in ordered}
        self._parameter = parameter
        self._full: torch.Tensor = getattr(owner, parameter).data
        delattr(owner, parameter)
        taken = [pairs.pop(one.name) for one in ordered]
        self._base, self._signs = (torch.cat([pair[side] for pair in taken]) for side in (0, 1))
        counts = torch.tensor([one.rows for one in ordered])
        self._matrix_of_row = torch.repeat_interleave(torch.arange(len(ordered)), counts).to(self._full.device)
        owner.register_forward_pre_hook(self)

    def __call__(self, owner: torch.nn.Module, args: Any) -> None:
        scales = [linear.scale for linear in self.linears.values() if linear.scale is not None]
        weights = self._full
        if scales:
            rows = torch.stack(scales).to(self._full.dtype).index_select(0, self._matrix_of_row)
            weights = SignedStack.apply(self._base, self._signs, rows).view(self._full.shape)
        setattr(owner, self._parameter, weights)


def stacked_linears(
    model: Any, architecture: Architecture, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, StackedLinear]:
    """Prepare every stack of ``model``; its matrices by name. Takes their base and signs out of ``pairs``."""
    found: dict[str, StackedLinear] = {}
    for stack, slices in architecture.stacks.items():
        path, _, parameter = stack.rpartition(".")
        found |= DistilledStack(model.get_submodule(path), parameter, slices, pairs).linears
    return found
