"""The whole model, of which some blocks can use the weights of another: what is measured, and what learns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from compression_worker.architecture import blocks_of
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint, load_model
from compression_worker.making.beneath import implementation
from compression_worker.methods.deltallm.differences import Pieces
from compression_worker.methods.deltallm.matrices import Shareable, SharedMatrix
from compression_worker.methods.deltallm.shared import Follower, SharedLinear, Switch
from compression_worker.quantization import lora
from compression_worker.quantization.divergence import Divergence, divergence
from compression_worker.quantization.teacher import TopLogits, computing_dtype

LORA_SCALE = 2
"""What an adapter's product is multiplied with (our reading)."""


@dataclass
class Student:
    """``model`` with followers put in; ``switches`` say for each block and kind of module which way it goes.

    ``adapted``: weights that carry a LoRA adapter, by name -> path of their linear.
    """

    model: Any
    shareable: Shareable
    device: str
    switches: dict[tuple[int, str], Switch] = field(default_factory=dict)
    followers: dict[str, Follower] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: Artifact | None, shareable: Shareable, device: str) -> Student:
        """The checkpoint's own weights, or those of its packed base: dense on a CPU, in codes on a GPU."""
        dtype = computing_dtype(device)
        if base is None:
            model = load_model(checkpoint, device=device, dtype=dtype)
        else:
            model = implementation(base).load_model(None, base, device, dtype)
        return cls(model.requires_grad_(False), shareable, device)

    def linear(self, matrix: SharedMatrix) -> Any:
        """The module that holds the weight of ``matrix``, also where a follower stands in its place by now."""
        found = self.model.get_submodule(matrix.path)
        return found.original if isinstance(found, Follower) else found

    def put(self, block: int, anchor: int, factors: Mapping[str, Pieces]) -> None:
        """Have ``block`` follow ``anchor``, with the factors of each of its weights by name; its way is the new one."""
        for follower, theirs in self.shareable.pairs({block: anchor}):
            switch = self.switches.setdefault((block, follower.kind), Switch())
            original = self.linear(follower)
            shared = SharedLinear(self.linear(theirs), _trainable(factors[follower.name], self.device), original.bias)
            self.followers[follower.name] = Follower(original, shared, switch)
            parent, _, child = follower.path.rpartition(".")
            setattr(self.model.get_submodule(parent), child, self.followers[follower.name])

    def share(self, blocks: Collection[int]) -> None:
        """The modules of ``blocks`` go the new way, all others as they were."""
        for (block, _), switch in self.switches.items():
            switch.new = block in blocks

    @property
    def blocks(self) -> list[int]:
        """The blocks that follow."""
        return sorted({block for block, _ in self.switches})

    def forget(self) -> None:
        """Let go of the weights that followers had: only the new way is left."""
        for follower in self.followers.values():
            follower.forget()

    @property
    def factors(self) -> dict[str, torch.nn.Parameter]:
        """All that learns by name: factors, A before B of each matrix that is not left out, and those of adapters."""
        found = {
            f"{name}#{end}": piece
            for name, follower in self.followers.items()
            for end, piece in follower.shared.difference.pieces().items()
            if not follower.shared.difference.is_nothing
        }
        return found | (lora.factors(self.model, self.adapted.values()) if self.adapted else {})

    def adapt(self, linears: Mapping[str, tuple[str, tuple[int, int]]], rank: int, seed: int) -> None:
        """Put LoRA adapters on ``linears``, name -> path and ``(N, K)``; they do nothing as they begin."""
        sides = dict(linears.values())
        lora.attach(self.model, sides, rank=rank, alpha=LORA_SCALE * rank)
        lora.put(self.model, sides, lora.fresh(sides, rank, seed))
        self.adapted = {name: path for name, (path, _) in linears.items()}

    def hidden(self, windows: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Logits of ``windows (B, T)``, and what comes out of each block that follows ``(B, T, H)``."""
        found: dict[int, torch.Tensor] = {}

        def keep(block: int, out: Any) -> None:
            found[block] = out[0] if isinstance(out, tuple) else out

        handles = [
            self.modules[block].register_forward_hook(lambda module, args, out, at=block: keep(at, out))
            for block in self.blocks
        ]
        try:
            logits = self.model(windows, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits, found

    @property
    def modules(self) -> list[Any]:
        """The transformer blocks."""
        return [block for _, block in blocks_of(self.model)]

    def judged(self, windows: torch.Tensor, teacher: TopLogits | None, **weights: float) -> Divergence:
        """The loss of ``windows (B, T)``; ``teacher`` is what it answered there."""
        windows = windows.to(self.device)
        return divergence(self.model(windows, use_cache=False).logits, teacher, windows, **weights)


def _trainable(pieces: Pieces, device: str) -> Pieces:
    """On the device, everything but packed signs in fp32."""
    return tuple(one.to(device) if one.dtype == torch.int32 else one.to(device, torch.float32) for one in pieces)
