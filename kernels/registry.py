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
    """One operation. ``shapes`` are those to test, as the operation's line says; ``tolerances`` map a dtype's name to
    ``(relative, absolute)``, and an operation without them agrees bit for bit."""

    reference: str
    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    tolerances: Mapping[str, tuple[float, float]]


OPS: dict[str, Op] = {
    "binary_matmul": Op(
        reference="kernels.binary_matmul.reference:binary_matmul",
        kernel="kernels.binary_matmul.kernel:binary_matmul",
        # (M, N, K). One odd, one with a tail of one bit, one that needs several blocks each way.
        shapes=((1, 1, 32), (3, 7, 33), (5, 1, 65), (17, 65, 63), (20, 96, 160)),
        tolerances={"float32": (1e-5, 1e-5), "float16": (2e-3, 2e-3), "bfloat16": (2e-2, 2e-2)},
    ),
    "e8p_matmul": Op(
        reference="kernels.e8p_matmul.reference:e8p_matmul",
        kernel="kernels.e8p_matmul.kernel:e8p_matmul",
        # (M, N, K, bits). One code word, a row that ends inside a tile, spans of one row, several blocks each way.
        shapes=((1, 1, 8, 2), (3, 70, 88, 3), (17, 33, 72, 4), (5, 3, 264, 2), (20, 130, 40, 2)),
        tolerances={"float32": (1e-5, 1e-5), "float16": (2e-3, 2e-3), "bfloat16": (2e-2, 2e-2)},
    ),
    "sign_pack": Op(
        reference="kernels.sign_pack.reference:sign_pack_rows",
        kernel="kernels.sign_pack.kernel:sign_pack_rows",
        # (N, K). One element, tails of one bit and of all but one, several blocks each way.
        shapes=((1, 1), (7, 33), (1, 32), (5, 63), (3, 65), (33, 128), (40, 300)),
        tolerances={"float32": (1e-6, 0.0), "float16": (1e-6, 0.0), "bfloat16": (1e-6, 0.0)},
    ),
    "group_mask": Op(
        reference="kernels.group_mask.reference:group_mask",
        kernel="kernels.group_mask.kernel:group_mask",
        # (rows, K, group size, ratio). Short last groups, groups no multiple of the ratio, one larger than the row.
        shapes=(
            (3, 32, 16, 8),
            (5, 33, 16, 8),
            (2, 7, 16, 4),
            (4, 45, 10, 4),
            (3, 64, 1, 1),
            (1, 1, 4, 4),
            (6, 100, 100, 32),
            (3, 300, 300, 8),
            (2, 2100, 2048, 32),
            (9, 40, 64, 8),
        ),
        tolerances={},
    ),
    "hadamard": Op(
        reference="kernels.hadamard.reference:hadamard",
        kernel="kernels.hadamard.kernel:hadamard",
        # (rows, n). Orders below a tile, two pieces, Paley I and II alone and before Sylvester, Fourier, the identity.
        shapes=((1, 1), (5, 2), (3, 7), (70, 64), (3, 512), (9, 12), (5, 36), (3, 640), (5, 1536), (2, 46)),
        tolerances={"float32": (1e-5, 1e-5), "float16": (2e-3, 2e-3), "bfloat16": (2e-2, 2e-2)},
    ),
    "sparse_delta_matmul": Op(
        reference="kernels.sparse_delta_matmul.reference:sparse_delta_matmul",
        kernel="kernels.sparse_delta_matmul.kernel:sparse_delta_matmul",
        # (M, N, K, group size, ratio, bits). Groups inside a tile, groups over several, short last groups of each.
        shapes=(
            (1, 1, 16, 16, 8, 4),
            (3, 7, 33, 16, 8, 3),
            (17, 3, 40, 1, 1, 8),
            (2, 5, 90, 20, 3, 7),
            (3, 4, 7, 16, 8, 1),
            (2, 3, 133, 100, 8, 4),
            (3, 5, 270, 200, 8, 4),
            (2, 33, 140, 140, 32, 2),
        ),
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
