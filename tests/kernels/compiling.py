"""Compile the kernels for a GPU that is not here: ``python -m tests.kernels.compiling 90`` (compute capability 9.0).

The interpreter runs what no GPU would compile. Here the launching functions run as they are, on CPU tensors, and each
launch compiles down to machine code instead, for the operands, tiles and flags it would have had. Prints a line for each
kernel: its name, bytes of shared memory, and instructions that store there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.binary_matmul.kernel import binary_matmul
from kernels.binary_matmul.operands import segments_of
from kernels.dequant_matmul.kernel import dequant_matmul
from kernels.dequant_matmul.operands import PackedWeight
from kernels.e8p_matmul.kernel import e8p_matmul
from kernels.e8p_matmul.reference import E8PWeight
from kernels.group_mask.kernel import group_mask
from kernels.group_mask.reference import kept_per_row
from kernels.hadamard.factors import plan
from kernels.hadamard.kernel import hadamard
from kernels.packing import code_words, words_for
from kernels.sign_pack.kernel import sign_pack_rows
from kernels.sparse_delta_matmul.kernel import sparse_delta_matmul
from kernels.sparse_delta_matmul.reference import SparseDelta

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}


class AbsentGPU:
    """What Triton asks a driver while it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return self._target


def main() -> int:
    capability = int(sys.argv[1])
    driver.set_active(AbsentGPU(capability))

    def compiled(function: Any, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            found = function.run(*arguments, grid=grid, warmup=True, **options)
            shared = found.metadata.shared
            if shared > SHARED_BYTES[capability] or not found.asm["cubin"]:
                raise RuntimeError(f"{found.name} asks for {shared} bytes of shared memory")
            stores = found.asm["ptx"].count("st.shared") + found.asm["ptx"].count("stmatrix")
            sys.stdout.write(f"{found.name} {shared} {stores}\n")

        return launch

    JITFunction.__getitem__ = compiled
    group_mask(2**63 + 1, 1, 8, 1000, 300, 8)
    sign_pack_rows(torch.zeros((64, 300), dtype=torch.bfloat16), torch.zeros((64, 300)))
    sparse(torch.bfloat16, tokens=1, group_size=16, bits=4)
    sparse(torch.float16, tokens=17, group_size=300, bits=3)
    binary(torch.bfloat16, tokens=8, rows=256, group_size=2048)
    binary(torch.float16, tokens=8, rows=1, group_size=1)
    binary(torch.bfloat16, tokens=65, rows=256, group_size=64, invariant=False)
    hadamard(torch.zeros((9, 4096), dtype=torch.bfloat16), plan(4096), torch.ones(4096))
    hadamard(torch.zeros((9, 14336)), plan(14336), torch.ones(14336), transpose=True)
    # Each number of tables with either shape of tile, and each dtype.
    for dtype, rows, bits in (
        (torch.float16, 1, 2),
        (torch.bfloat16, 65, 2),
        (torch.float16, 65, 3),
        (torch.bfloat16, 1, 4),
    ):
        e8p(dtype, rows=rows, bits=bits)
    dequant(torch.bfloat16, tokens=8, group_size=128, bits=3)
    dequant(torch.float16, tokens=65, group_size=40, bits=4)
    return 0


def e8p(dtype: torch.dtype, *, rows: int, bits: int) -> None:
    first = torch.zeros((256, 4096 // 8), dtype=torch.int16)
    second = {3: first.to(torch.uint8), 4: first}.get(bits)
    x = torch.zeros((rows, 4096), dtype=dtype, requires_grad=True)
    e8p_matmul(x, E8PWeight(first, second)).backward(torch.zeros((rows, 256), dtype=dtype))


def dequant(dtype: torch.dtype, *, tokens: int, group_size: int, bits: int) -> None:
    qweight = torch.zeros((1024 * bits // 32, 256), dtype=torch.int32)
    groups = -(-1024 // group_size)
    qzeros = torch.zeros((groups, 256 * bits // 32), dtype=torch.int32)
    scales, g_idx = torch.zeros((groups, 256), dtype=torch.float16), torch.zeros(1024, dtype=torch.int32)
    weight = PackedWeight(qweight, qzeros, scales, g_idx, bits, group_size)
    dequant_matmul(torch.zeros((tokens, 1024), dtype=dtype, requires_grad=True), weight).sum().backward()


def sparse(dtype: torch.dtype, *, tokens: int, group_size: int, bits: int) -> None:
    words = torch.zeros((64, code_words(kept_per_row(600, group_size, 8), bits)), dtype=torch.int32)
    delta = SparseDelta(words, bits, 0.1, 3, 5, 7, 600, group_size, 8)
    x = torch.zeros((tokens, 600), dtype=dtype, requires_grad=True)
    sparse_delta_matmul(x, delta, torch.zeros((64, 600), dtype=dtype)).sum().backward()


def binary(dtype: torch.dtype, *, tokens: int, rows: int, group_size: int, invariant: bool | None = None) -> None:
    x = torch.zeros((tokens, 2048), dtype=dtype, requires_grad=True)
    packed = torch.zeros((3, 2, words_for(2048), 256), dtype=torch.int32)
    scale = torch.ones((3, 2, rows, 2048 // group_size), requires_grad=True)
    segments = segments_of(torch.zeros(tokens, dtype=torch.int32), 3)
    weight, bias = torch.zeros((256, 2048), dtype=dtype), torch.zeros((4, 256), dtype=dtype)
    y = binary_matmul(
        x,
        packed,
        scale,
        weight=weight,
        bias=bias,
        segments=segments,
        group_size=group_size,
        invariant=invariant,
    )
    y.sum().backward()


if __name__ == "__main__":
    sys.exit(main())
