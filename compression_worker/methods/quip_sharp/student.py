"""Coded linears inside a model, with sign vectors that can be trained: ``y = s_out * M (s_in * x) + bias``.

``M = scale_i Q_out Wt_hat Q_in^T`` stays as it is and is made once, so that training costs a plain product and two
element-wise ones. The gradients are those of the plain composition; code words have none. QuIP#, arXiv 2402.04396,
appendix D. Experts of a mixture lie in one stacked parameter, which is put together again before each forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from compression_worker.architecture import Architecture, Linear
from compression_worker.experts import Slice
from compression_worker.making.loading import module_path
from compression_worker.methods.quip_sharp.layout import SIGNS_IN, SIGNS_OUT, key
from compression_worker.methods.quip_sharp.stacks import Stack


class TrainedStack:
    """``matrix (N, K)``: M of all matrices of a stack. ``s_in (K,)`` and ``s_out (N,)`` are trained."""

    def __init__(self, matrix: torch.Tensor, signs: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.matrix = matrix
        self.s_in, self.s_out = (torch.nn.Parameter(sign.detach().to(matrix.device).clone()) for sign in signs)

    def product(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """``x (..., K)`` times the matrix in ``rows``."""
        return torch.nn.functional.linear(x * self.s_in, self.matrix[rows]) * self.s_out[rows]

    def weight(self, rows: slice) -> torch.Tensor:
        """``(N_i, K)``, differentiable in the sign vectors."""
        return self.matrix[rows] * self.s_in * self.s_out[rows, None]


class SignedLinear(torch.nn.Module):
    """One matrix of a stack in the place of a linear."""

    def __init__(self, stack: TrainedStack, rows: slice, bias: Any) -> None:
        super().__init__()
        self._stack, self._rows, self.bias = stack, rows, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._stack.product(x, self._rows)
        return y if self.bias is None else y + self.bias


class StackedExperts:
    """The stacked parameter of some experts: each matrix a parameter of its own, or one of a coded stack."""

    def __init__(self, owner: torch.nn.Module, name: str, slices: tuple[Slice, ...]) -> None:
        full: torch.Tensor = getattr(owner, name).data
        rows = full.view(-1, full.shape[-1])
        ordered = sorted(slices, key=lambda one: one.first)
        self.weights = {
            one.name: torch.nn.Parameter(rows[one.first : one.first + one.rows].clone(), requires_grad=False)
            for one in ordered
        }
        self._made: dict[str, Callable[[], torch.Tensor]] = {}
        self._name, self._shape, self._order = name, full.shape, [one.name for one in ordered]
        delattr(owner, name)
        owner.register_forward_pre_hook(self)

    def put(self, name: str, made: Callable[[], torch.Tensor]) -> None:
        """From now on matrix ``name`` is what ``made`` gives."""
        del self.weights[name]
        self._made[name] = made

    def __call__(self, owner: torch.nn.Module, args: Any) -> None:
        found = [self.weights[name] if name in self.weights else self._made[name]() for name in self._order]
        setattr(owner, self._name, torch.cat(found).view(self._shape))


class Student:
    """A model, or one block of it, whose linears are coded one stack after another."""

    def __init__(self, model: Any, architecture: Architecture, linears: tuple[Linear, ...]) -> None:
        """``linears`` are those that may be coded; experts among them are taken out of their stacked parameter."""
        self._model, self._memory = model, architecture.memory
        self._modules: dict[str, Any] = dict(model.named_modules())
        self.stacks: dict[str, TrainedStack] = {}
        names = {linear.name for linear in linears}
        self._experts: dict[str, StackedExperts] = {}
        for parameter, slices in architecture.stacks.items():
            if names >= {one.name for one in slices}:
                owner, _, child = parameter.rpartition(".")
                made = StackedExperts(self._modules[owner], child, slices)
                self._experts |= dict.fromkeys((one.name for one in slices), made)

    def weight(self, linear: Linear) -> torch.nn.Parameter:
        """The parameter of a linear that is not coded yet; that of a transposed one is ``(K, N)``."""
        if linear.name in self._experts:
            return self._experts[linear.name].weights[linear.name]
        weight: torch.nn.Parameter = self._modules[self._path(linear)].weight
        return weight

    def put(
        self, stack: Stack, turned: torch.Tensor, scales: torch.Tensor, signs: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Code the matrices of ``stack``: ``turned (N, K)`` in units of the codebook, ``scales`` of each matrix."""
        rows = torch.tensor([linear.outputs for linear in stack.linears])
        by_row = scales.cpu().repeat_interleave(rows).to(turned.device)
        trained = self.stacks[stack.name] = TrainedStack(turned * by_row[:, None], signs)
        first = 0
        for linear in stack.linears:
            own = slice(first, first + linear.outputs)
            first += linear.outputs
            if linear.name in self._experts:
                self._experts[linear.name].put(linear.name, lambda own=own: trained.weight(own))  # type: ignore[misc]
                continue
            path = self._path(linear)
            parent, _, child = path.rpartition(".")
            setattr(self._model.get_submodule(parent), child, SignedLinear(trained, own, self._modules[path].bias))

    def signs(self) -> dict[str, torch.nn.Parameter]:
        """The sign vectors of all coded stacks, by the names that they have on disk."""
        found: dict[str, torch.nn.Parameter] = {}
        for name, stack in self.stacks.items():
            found |= {key(name, SIGNS_IN): stack.s_in, key(name, SIGNS_OUT): stack.s_out}
        return found

    def _path(self, linear: Linear) -> str:
        own = self._memory.get(linear.name, linear.name)
        return module_path(own, self._modules, self._model.base_model_prefix)


def named_parameters(model: Any, architecture: Architecture, part: str) -> Mapping[str, torch.nn.Parameter]:
    """The parameters of ``model`` of one part, by the names that they have in the checkpoint."""
    stored = {own: name for name, own in architecture.memory.items()}
    return {
        stored.get(own, own): parameter
        for own, parameter in model.named_parameters()
        if architecture.parts.get(stored.get(own, own)) == part
    }
