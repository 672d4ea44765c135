"""The model that scale distillation trains: it answers as teacher (full weights) or as student (base and signs).

Student linear: ``y = x W_b^T + scale * (x S^T) + bias``. Exact gradients, with ``G = dL/dy``:
``dL/dx = G W_b + scale * G S`` and ``dL/dscale = <G, x S^T>``. Embeddings, norms, head and biases are the variant's in
both roles and are shared; only scales have a gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from compression_worker.architecture import Architecture
from compression_worker.distillation import Batch, logit_loss
from compression_worker.methods.bitdelta.merge import module_path
from compression_worker.methods.bitdelta.stacks import StackedLinear, stacked_linears


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


class DistilledLinear(torch.nn.Module):
    """A block linear in both roles. ``scale`` is None while the module answers as teacher."""

    def __init__(self, full: torch.Tensor, bias: torch.Tensor | None, base: torch.Tensor, signs: torch.Tensor) -> None:
        super().__init__()
        self.full, self.bias, self.base, self.signs = full, bias, base, signs
        self.scale: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale is None:
            return torch.nn.functional.linear(x, self.full, self.bias)
        y: torch.Tensor = SignedLinear.apply(x, self.base, self.signs, self.scale)
        return y if self.bias is None else y + self.bias


class Student:
    """The variant's model with a :class:`DistilledLinear` for each linear in ``names``, in the order of the scales."""

    def __init__(
        self,
        model: Any,
        names: list[str],
        pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
        architecture: Architecture,
    ) -> None:
        """``pairs``: name -> base weight and signs (int8), both ``(N, K)``. ``architecture``: of the checkpoint."""
        self._model = model.requires_grad_(False)
        stacked = stacked_linears(model, architecture, pairs)
        modules = dict(model.named_modules())
        self._linears: list[DistilledLinear | StackedLinear] = []
        for name in names:
            if name in stacked:
                self._linears.append(stacked[name])
                continue
            path = module_path(architecture.memory.get(name, name), modules, model.base_model_prefix)
            parent, _, child = path.rpartition(".")
            linear = modules[path]
            # GPT-2 keeps weights as (K, N); here all are (N, K).
            full = linear.weight.data if isinstance(linear, torch.nn.Linear) else linear.weight.data.T
            replacement = DistilledLinear(full, None if linear.bias is None else linear.bias.data, *pairs[name])
            setattr(modules[parent], child, replacement)
            self._linears.append(replacement)

    def teacher_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        for linear in self._linears:
            linear.scale = None
        with torch.no_grad():
            return self._logits(tokens)

    def student_logits(self, tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        for linear, scale in zip(self._linears, scales.unbind(), strict=True):
            linear.scale = scale
        return self._logits(tokens)

    def loss(self, scales: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The squared difference of student and teacher logits on ``batch``, differentiable in ``scales``."""
        teacher = self.teacher_logits(batch.tokens)
        return logit_loss(self.student_logits(batch.tokens, scales), teacher, batch.real)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(tokens, use_cache=False).logits
        return logits
