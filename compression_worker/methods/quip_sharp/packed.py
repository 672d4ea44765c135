"""Linears that stay in code words: ``y = scale * s_out * Q_out (Wt_hat (Q_in^T (s_in * x))) + bias``.

The matrices of a stack share one product, which is made when the first of them is asked about an input and kept until
the last one has taken its rows of it. QuIP#, arXiv 2402.04396, section 3.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from compression_worker.methods.quip_sharp.merge import StoredStack
from compression_worker.methods.quip_sharp.quantize import code_words
from kernels.registry import choose


class StackProduct(torch.nn.Module):
    """``x (..., K)`` -> ``(..., N)`` of all matrices of a stack, without biases; differentiable in x."""

    def __init__(self, stack: StoredStack) -> None:
        super().__init__()
        self._bits, self._rotation, self._takers = stack.bits, stack.rotation, len(stack.names)
        s_in, s_out = stack.signs
        ones = torch.ones(stack.rotation.input_plan.n - len(s_in))
        self.register_buffer("first", stack.planes[0], persistent=False)
        self.register_buffer("second", stack.planes[1] if stack.bits > 2 else None, persistent=False)
        self.register_buffer("signs_in", torch.cat([s_in, ones]), persistent=False)
        self.register_buffer("scales_out", s_out * stack.row_scales(), persistent=False)
        self._kept: tuple[Callable[[], Any], int, torch.Tensor] | None = None
        self._taken = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        transform = choose("hadamard", x.device.type)
        wide = torch.nn.functional.pad(x, (0, self._rotation.input_plan.n - self._rotation.inputs))
        turned = transform(wide.to(torch.float32), self._rotation.input_plan, self.signs_in)
        words = code_words((self.first, self.second), self._bits)
        product = choose("e8p_matmul", x.device.type)(turned.to(x.dtype).flatten(0, -2), words)
        back = transform(product.to(torch.float32), self._rotation.output_plan, None, True)
        y = back[:, : self._rotation.outputs] * self.scales_out
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`forward`; made once for all matrices of the stack that are given the same ``x``."""
        if self._takers == 1:
            return self(x)
        version = 0 if x.is_inference() else x._version
        if self._kept is None or self._kept[0]() is not x or self._kept[1] != version:
            self._kept, self._taken = (weakref.ref(x), version, self(x)), 0
        y = self._kept[2]
        self._taken += 1
        if self._taken == self._takers:
            self._kept = None
        return y


class PackedLinear(torch.nn.Module):
    """One matrix of a stack: rows ``first`` to ``first + rows`` of the product, plus the bias."""

    def __init__(self, product: StackProduct, first: int, rows: int, bias: torch.Tensor | None, *, owner: bool) -> None:
        super().__init__()
        self.out_features = rows
        self.bias = None if bias is None else torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._rows = slice(first, first + rows)
        if owner:
            self.stack = product
        # In a tuple it is no child: one module moves the buffers that all of them read.
        self._product = (product,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._product[0].shared(x)[..., self._rows]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}"
