"""The whole model, of which some blocks can use the weights of another: what is measured, and what learns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compression_worker.checkpoints import Checkpoint, load_model
from compression_worker.methods.deltallm.matrices import Shareable, SharedMatrix
from compression_worker.methods.deltallm.shared import Follower, SharedLinear, Switch
from compression_worker.quantization.divergence import Divergence, divergence
from compression_worker.quantization.teacher import TopLogits, computing_dtype

Factors = tuple[torch.Tensor, torch.Tensor]
"""``A (r, K)`` and ``B (N, r)``."""


@dataclass
class Student:
    """``model`` with followers put in; ``switches`` say for each block and kind of module which way it goes."""

    model: Any
    shareable: Shareable
    device: str
    switches: dict[tuple[int, str], Switch] = field(default_factory=dict)
    followers: dict[str, Follower] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, shareable: Shareable, device: str) -> Student:
        """The checkpoint's own weights, nothing shared yet."""
        model = load_model(checkpoint, device=device, dtype=computing_dtype(device)).requires_grad_(False)
        return cls(model, shareable, device)

    def linear(self, matrix: SharedMatrix) -> Any:
        """The module that holds the weight of ``matrix``, also where a follower stands in its place by now."""
        found = self.model.get_submodule(matrix.path)
        return found.original if isinstance(found, Follower) else found

    def weight(self, matrix: SharedMatrix) -> torch.Tensor:
        """``W (N, K)`` in fp32."""
        weight = self.linear(matrix).weight.detach().to(torch.float32)
        return weight.T if matrix.linear.transposed else weight

    def put(self, block: int, anchor: int, factors: Mapping[str, Factors]) -> None:
        """Have ``block`` follow ``anchor``, with the factors of each of its weights by name; its way is the new one."""
        for follower, theirs in self.shareable.pairs({block: anchor}):
            switch = self.switches.setdefault((block, follower.kind), Switch())
            original = self.linear(follower)
            a, b = (one.to(self.device, torch.float32) for one in factors[follower.name])
            shared = SharedLinear(self.linear(theirs), a, b, original.bias)
            self.followers[follower.name] = Follower(original, shared, switch)
            parent, _, child = follower.path.rpartition(".")
            setattr(self.model.get_submodule(parent), child, self.followers[follower.name])

    def share(self, blocks: Collection[int]) -> None:
        """The modules of ``blocks`` go the new way, all others as they were."""
        for (block, _), switch in self.switches.items():
            switch.new = block in blocks

    @property
    def factors(self) -> dict[str, torch.nn.Parameter]:
        """All factors by name, A before B of each matrix."""
        found = {}
        for name, follower in self.followers.items():
            first, second = keys(name)
            found[first], found[second] = follower.shared.A, follower.shared.B
        return found

    def judged(self, windows: torch.Tensor, teacher: TopLogits | None, **weights: float) -> Divergence:
        """The loss of ``windows (B, T)``; ``teacher`` is what it answered there."""
        windows = windows.to(self.device)
        return divergence(self.model(windows, use_cache=False).logits, teacher, windows, **weights)


def keys(name: str) -> tuple[str, str]:
    """The names of ``A`` and ``B`` of the weight ``name``. No weight of a checkpoint has such a name."""
    return f"{name}#A", f"{name}#B"
