"""Second moments of what goes into a weight and of what an error of its output costs, and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compression_worker.tensors import Spec, TensorFile, raw_bytes


@dataclass
class Moments:
    """Second moments of one weight ``(N, K)`` as ``outputs (N)`` and ``inputs (K)``, means over tokens."""

    outputs: torch.Tensor
    inputs: torch.Tensor


def moments_file(moments: dict[str, Moments]) -> dict[str, tuple[Spec, list[memoryview]]]:
    """As tensors ``name#outputs`` and ``name#inputs`` of a safetensors file."""
    vectors = {}
    for name, one in moments.items():
        for side, vector in (("outputs", one.outputs), ("inputs", one.inputs)):
            flat = vector.cpu().to(torch.float32).contiguous()
            vectors[f"{name}#{side}"] = (Spec("F32", (len(flat),)), [raw_bytes(flat)])
    return vectors


def read_moments(file: TensorFile, name: str) -> Moments | None:
    """What :func:`moments_file` wrote of ``name``; None where it was not seen."""
    if f"{name}#outputs" not in file.entries:
        return None
    return Moments(file.tensor(f"{name}#outputs"), file.tensor(f"{name}#inputs"))
