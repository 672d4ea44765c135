"""What goes into a weight and what an error of its output costs: second moments and samples, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compression_worker.tensors import TensorFile


@dataclass
class Moments:
    """Second moments of one weight ``(N, K)`` as ``outputs (N)`` and ``inputs (K)``, means over tokens."""

    outputs: torch.Tensor
    inputs: torch.Tensor


@dataclass(frozen=True)
class Samples:
    """Inputs ``x (W, T, K)`` and gradients by the output ``g (W, T, N)`` of one linear, bf16; ``tokens`` are real."""

    x: torch.Tensor
    g: torch.Tensor
    tokens: int

    @property
    def rows(self) -> torch.Tensor:
        """All inputs, fp32 ``(W * T, K)``."""
        return self.x.flatten(0, 1).to(torch.float32)

    def cost(self, error: torch.Tensor) -> float:
        """The KL divergence in nats a token that ``error (N, K)`` of the weight is foretold to make."""
        moved = self.rows @ error.T
        by_window = (moved.view(self.g.shape) * self.g.to(torch.float32)).sum(dim=(1, 2), dtype=torch.float64)
        return float(by_window.square().sum()) / (2 * self.tokens)


def moments_tensors(moments: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
    """As fp32 tensors ``name#outputs`` and ``name#inputs`` of a blob."""
    sides = {f"{name}#{side}": getattr(one, side) for name, one in moments.items() for side in ("outputs", "inputs")}
    return {name: vector.cpu().to(torch.float32).contiguous() for name, vector in sides.items()}


def samples_tensors(samples: Mapping[str, Samples]) -> dict[str, torch.Tensor]:
    """As bf16 tensors ``name#x`` and ``name#g`` of a blob."""
    return {f"{name}#{side}": getattr(one, side).contiguous() for name, one in samples.items() for side in ("x", "g")}


def read_moments(file: TensorFile, name: str) -> Moments | None:
    """What :func:`moments_tensors` wrote of ``name``; None where it was not seen."""
    if f"{name}#outputs" not in file.entries:
        return None
    return Moments(file.tensor(f"{name}#outputs"), file.tensor(f"{name}#inputs"))


def read_inputs(file: TensorFile, name: str) -> torch.Tensor:
    """The inputs alone of what :func:`samples_tensors` wrote of ``name``, fp32 ``(W * T, K)``."""
    return file.tensor(f"{name}#x").flatten(0, 1).to(torch.float32)


def read_samples_of(file: TensorFile, name: str, tokens: int) -> Samples:
    """What :func:`samples_tensors` wrote of ``name``."""
    return Samples(file.tensor(f"{name}#x"), file.tensor(f"{name}#g"), tokens)
