"""What goes into a weight and what an error of its output costs: second moments and samples, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compression_worker.tensors import Spec, TensorFile, raw_bytes


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


def moments_file(moments: Mapping[str, Moments]) -> dict[str, tuple[Spec, list[memoryview]]]:
    """As tensors ``name#outputs`` and ``name#inputs`` of a safetensors file."""
    vectors = {}
    for name, one in moments.items():
        for side, vector in (("outputs", one.outputs), ("inputs", one.inputs)):
            flat = vector.cpu().to(torch.float32).contiguous()
            vectors[f"{name}#{side}"] = (Spec("F32", (len(flat),)), [raw_bytes(flat)])
    return vectors


def samples_file(samples: Mapping[str, Samples]) -> dict[str, tuple[Spec, list[memoryview]]]:
    """As tensors ``name#x`` and ``name#g`` of a safetensors file."""
    stored = {}
    for name, one in samples.items():
        for side, tensor in (("x", one.x), ("g", one.g)):
            stored[f"{name}#{side}"] = (Spec("BF16", tuple(tensor.shape)), [raw_bytes(tensor.contiguous())])
    return stored


def read_moments(file: TensorFile, name: str) -> Moments | None:
    """What :func:`moments_file` wrote of ``name``; None where it was not seen."""
    if f"{name}#outputs" not in file.entries:
        return None
    return Moments(file.tensor(f"{name}#outputs"), file.tensor(f"{name}#inputs"))


def read_inputs(file: TensorFile, name: str) -> torch.Tensor:
    """The inputs alone of what :func:`samples_file` wrote of ``name``, fp32 ``(W * T, K)``."""
    return file.tensor(f"{name}#x").flatten(0, 1).to(torch.float32)


def read_samples_of(file: TensorFile, name: str, tokens: int) -> Samples:
    """What :func:`samples_file` wrote of ``name``."""
    return Samples(file.tensor(f"{name}#x"), file.tensor(f"{name}#g"), tokens)
