"""The operations: for each a reference, a fast kernel, shapes to test and a tolerance per dtype; and the choice.

``DELTAWORKS_KERNELS`` is ``reference``, ``triton`` or ``auto`` (the kernel on CUDA, the reference elsewhere).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

CHOICES = ("reference", "triton", "auto")


@dataclass(frozen=True)
class Op:
    """One operation. ``shapes`` are ``(M, N, K)``; ``tolerances`` map a dtype's name to ``(relative, absolute)``."""

    reference: str
    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    tolerances: Mapping[str, tuple[float, float]]


OPS: dict[str, Op] = {
    "binary_matmul": Op(
        reference="kernels.binary_matmul.reference:binary_matmul",
        kernel="kernels.binary_matmul.kernel:binary_matmul",
        # One odd, one with a tail of one bit, one that needs several blocks each way.
        shapes=((1, 1, 32), (3, 7, 33), (5, 1, 65), (17, 65, 63), (20, 96, 160)),
        tolerances={"float32": (1e-5, 1e-5), "float16": (2e-3, 2e-3), "bfloat16": (2e-2, 2e-2)},
    ),
}


def choose(name: str, device: str) -> Callable[..., Any]:
    """The function for operation ``name`` on ``device`` (``cpu``, ``cuda`` or ``cuda:0``)."""
    op, choice = OPS[name], os.environ.get("DELTAWORKS_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"DELTAWORKS_KERNELS is '{choice}'; it may be one of {', '.join(CHOICES)}")
    fast = choice == "triton" or (choice == "auto" and device.startswith("cuda"))
    return load(op.kernel if fast else op.reference)


def load(path: str) -> Callable[..., Any]:
    """The function at ``"module:name"``."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
