"""The model that scale distillation trains: it answers as teacher (full weights) or as student (base and signs).

Student linear: ``y = x W_b^T + scale * (x S^T) + bias``. Exact gradients, with ``G = dL/dy``:
``dL/dx = G W_b + scale * G S`` and ``dL/dscale = <G, x S^T>``; where a mask has several scales, each takes the sum of
``(G^T x) * S`` over the weights that share it. Norms and biases are the variant's in both roles and are shared, and so
are embeddings and head unless they are coded by row; only scales have a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.architecture import Architecture
from compression_worker.distillation import Batch, logit_loss
from compression_worker.making.loading import module_path
from compression_worker.methods.bitdelta.matrices import Matrix
from compression_worker.methods.bitdelta.stacks import StackedLinear, stacked_linears


class DistilledLinear(torch.nn.Module):
    """A block linear in both roles. ``scales`` is None while the module answers as teacher."""

    def __init__(self, full: torch.Tensor, bias: torch.Tensor | None, matrix: Matrix) -> None:
        super().__init__()
        self.full, self.bias, self.matrix = full, bias, matrix
        self.scales: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scales is None:
            return torch.nn.functional.linear(x, self.full, self.bias)
        y = self.matrix.product(x, self.scales)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Swap:
    """A parameter that is coded by row: what it holds for the teacher and for the student."""

    parameter: torch.nn.Parameter
    full: torch.Tensor
    coded: torch.Tensor


class Student:
    """The variant's model with a :class:`DistilledLinear` for each of ``matrices``, in the order of the scales."""

    def __init__(
        self,
        model: Any,
        matrices: Mapping[str, Matrix],
        counts: Sequence[int],
        rows: Mapping[str, torch.Tensor],
        architecture: Architecture,
    ) -> None:
        """``counts``: scales of each matrix. ``rows``: name -> the tensor as it comes back from its coded rows.

        ``architecture`` is that of the checkpoint, whose names the matrices have.
        """
        self._model = model.requires_grad_(False)
        self._counts = list(counts)
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        own = architecture.memory
        self._swaps = [_swap(parameters, own.get(name, name), coded) for name, coded in rows.items()]
        stacked = stacked_linears(model, architecture, matrices)
        self._linears: list[DistilledLinear | StackedLinear] = []
        for name, matrix in matrices.items():
            if name in stacked:
                self._linears.append(stacked[name])
                continue
            path = module_path(own.get(name, name), modules, model.base_model_prefix)
            parent, _, child = path.rpartition(".")
            linear = modules[path]
            # GPT-2 keeps weights as (K, N); here all are (N, K).
            full = linear.weight.data if isinstance(linear, torch.nn.Linear) else linear.weight.data.T
            replacement = DistilledLinear(full, None if linear.bias is None else linear.bias.data, matrix)
            setattr(modules[parent], child, replacement)
            self._linears.append(replacement)

    def teacher_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        for linear in self._linears:
            linear.scales = None
        for swap in self._swaps:
            swap.parameter.data = swap.full
        with torch.no_grad():
            return self._logits(tokens)

    def student_logits(self, tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        for linear, own in zip(self._linears, scales.split(self._counts), strict=True):
            linear.scales = own
        for swap in self._swaps:
            swap.parameter.data = swap.coded
        return self._logits(tokens)

    def loss(self, scales: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The squared difference of student and teacher logits on ``batch``, differentiable in ``scales``."""
        teacher = self.teacher_logits(batch.tokens)
        return logit_loss(self.student_logits(batch.tokens, scales), teacher, batch.real)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(tokens, use_cache=False).logits
        return logits


def _swap(parameters: Mapping[str, torch.nn.Parameter], name: str, coded: torch.Tensor) -> Swap:
    parameter = parameters[name]
    return Swap(parameter, parameter.data, coded.to(parameter.device, parameter.dtype))
