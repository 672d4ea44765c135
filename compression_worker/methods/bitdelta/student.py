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

from compression_worker.deltas.loading import module_path
from compression_worker.distillation import Batch, logit_loss
from compression_worker.methods.bitdelta.coding import Coding, expand, gather


class SignedLinear(torch.autograd.Function):
    """x ``(..., K)``, base ``(N, K)``, signs ``(N, K)`` of +-1 in any dtype, scale one element -> ``(..., N)``.

    Base and signs need no gradient. The merged matrix is made again in the backward pass: it costs one pass over the
    weights, and keeping it would cost a second model.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: torch.Tensor, signs: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, base, signs, scale)
        return x @ merged(base, signs, scale, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        x, base, signs, scale = ctx.saved_tensors
        to_x = gradient @ merged(base, signs, scale, x.dtype) if ctx.needs_input_grad[0] else None
        to_scale = None
        if ctx.needs_input_grad[3]:
            delta = x.reshape(-1, x.shape[-1]) @ signs.to(x.dtype).T
            to_scale = (gradient.reshape(delta.shape) * delta).sum().reshape(scale.shape).to(scale.dtype)
        return to_x, None, None, to_scale


def merged(base: torch.Tensor, signs: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``W_b + scale * S`` in ``dtype``."""
    return base.to(dtype, copy=True).addcmul_(signs.to(dtype), scale.to(dtype))


class CodedLinear(torch.autograd.Function):
    """As :class:`SignedLinear` for a finer coding: signs ``(masks, N, K)``, scales ``(masks * values)``."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor, coding: Coding
    ) -> torch.Tensor:
        ctx.save_for_backward(x, base, signs, scales)
        ctx.coding = coding
        return x @ stacked(base, signs, scales, coding, x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None, None]:
        x, base, signs, scales = ctx.saved_tensors
        to_x = gradient @ stacked(base, signs, scales, ctx.coding, x.dtype) if ctx.needs_input_grad[0] else None
        to_scales = None
        if ctx.needs_input_grad[3]:
            to_weight = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            parts = [gather(to_weight * mask.to(to_weight.dtype), ctx.coding) for mask in signs]
            to_scales = torch.cat(parts).to(scales.dtype) if parts else torch.zeros_like(scales)
        return to_x, None, None, to_scales, None


def stacked(
    base: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor, coding: Coding, dtype: torch.dtype
) -> torch.Tensor:
    """``W_b + sum_i scale_i * S_i`` in ``dtype``."""
    whole = base.to(dtype, copy=True)
    for mask, scale in zip(signs, scales.to(dtype).view(len(signs), -1), strict=True):
        whole.addcmul_(mask.to(dtype), expand(scale, coding, *base.shape))
    return whole


@dataclass(frozen=True)
class Matrix:
    """What a linear is built from: base ``(N, K)`` with the low-rank part in it, signs ``(masks, N, K)`` int8."""

    base: torch.Tensor
    signs: torch.Tensor
    coding: Coding

    def product(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """``x (..., K)`` times the coded matrix, differentiable in x and scales."""
        if self.coding.plain:
            y: torch.Tensor = SignedLinear.apply(x, self.base, self.signs[0], scales.view(()))
        else:
            y = CodedLinear.apply(x, self.base, self.signs, scales, self.coding)
        return y


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
        self, model: Any, matrices: Mapping[str, Matrix], counts: Sequence[int], rows: Mapping[str, torch.Tensor]
    ) -> None:
        """``counts``: scales of each matrix. ``rows``: name -> the tensor as it comes back from its coded rows."""
        self._model = model.requires_grad_(False)
        self._counts = list(counts)
        modules = dict(model.named_modules())
        parameters = dict(model.named_parameters())
        self._swaps = [_swap(parameters, name, coded, model.base_model_prefix) for name, coded in rows.items()]
        self._linears = []
        for name, matrix in matrices.items():
            path = module_path(name, modules, model.base_model_prefix)
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


def _swap(parameters: Mapping[str, torch.nn.Parameter], name: str, coded: torch.Tensor, prefix: str) -> Swap:
    parameter = parameters[name if name in parameters else f"{prefix}.{name}"]
    return Swap(parameter, parameter.data, coded.to(parameter.device, parameter.dtype))
