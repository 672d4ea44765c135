"""A linear that keeps no weight: its anchor's product, a difference of few bytes, and a bias.

``W_a`` is the anchor's own, dense or packed: it lies in memory once, it is no part of this module's state, and it moves
with the anchor alone. DeltaLLM, arXiv:2501.18596.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn.functional import linear

from compression_worker.methods.deltallm.differences import Pieces, difference


class SharedLinear(torch.nn.Module):
    """Uses the weight of ``anchor``, a linear of any kind, and adds a difference and a bias of its own."""

    def __init__(self, anchor: Any, pieces: Pieces, bias: torch.Tensor | None) -> None:
        super().__init__()
        # In a tuple it is no child: no second name for its weight, and nothing to move twice.
        self._anchor = (anchor,)
        self.difference = difference(pieces)
        self.bias = bias if bias is None or isinstance(bias, torch.nn.Parameter) else torch.nn.Parameter(bias)

    @property
    def anchor(self) -> Any:
        return self._anchor[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.difference.is_nothing:
            y = x.new_zeros((*x.shape[:-1], len(self.difference.B)))
        else:
            y = self.difference(x, without_bias(self.anchor, x))
        return y if self.bias is None else y + self.bias


class Switch:
    """Which way the followers of one module go: ``new`` is the shared one."""

    def __init__(self) -> None:
        self.new = True


class Follower(torch.nn.Module):
    """A linear that can still be what it was, as long as a model learns to do without it.

    Until ``switch.new`` it computes what ``original`` does, to the bit.
    """

    def __init__(self, original: Any, shared: SharedLinear, switch: Switch) -> None:
        super().__init__()
        self.shared = shared
        self.switch = switch
        self._original: tuple[Any, ...] = (original,)

    @property
    def original(self) -> Any:
        return self._original[0]

    def forget(self) -> None:
        """Be the shared linear alone."""
        self._original = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.shared(x) if self.switch.new else self.original(x)
        return y


def without_bias(module: Any, x: torch.Tensor) -> torch.Tensor:
    """``x W^T`` of a linear of any kind."""
    if isinstance(module, torch.nn.Linear):
        return linear(x, module.weight)
    if (weight := getattr(module, "weight", None)) is not None:  # transformers' Conv1D keeps it as (K, N)
        return linear(x, weight.T)
    if module.bias is None:
        found: torch.Tensor = module(x)
        return found
    bare = copy.copy(module)
    bare._parameters = {**module._parameters, "bias": None}
    found = bare(x)
    return found
