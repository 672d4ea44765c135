"""The kernels on a CUDA device, against its own copy bandwidth and cuBLAS in the same run.

    python -m tests.benchmarks.bench_kernels [--rounds 50] [--sizes 4096 8192] [--batches 1 2 4 8 16 32]
        [--dimensions 4096 8192 14336 11008]

Runs the kernel tests on the device first (no time is reported on a red gate) and adds a line per figure to
``results.csv``. Exits 1 when a figure misses its bound, and 2, with nothing written, where there is no CUDA device.

- *copy*: bytes read and written per second by a device copy of 1 GiB; every other figure is a share of what this allows.
- *sign_pack*: bytes that the pass must move (both matrices in bf16, one bit a weight, two sums a row) over its time, as
  a share of the copy bandwidth.
- *binary_matmul, B tenants*: time of B separate bf16 models (B cuBLAS products of one token, each with a weight of its
  own) over the time of one call for B tenants with one token each, K = N; divided by the roofline B / (1 + B/16), which
  is what the bytes allow. Each round uses other weights, so that no cache answers for the memory.
- *sparse_delta_matmul*: time of base and delta in one call over that of the base alone by cuBLAS, and the share of the
  delta's dense bf16 form that its codes occupy.
- *e8p_matmul, one row*: bytes of the code words, of x and of y over the time of a call, as a share of the copy
  bandwidth; and the time of the same product of a bf16 matrix by cuBLAS over it. Each round reads other codes.
- *hadamard*: bytes that the pass must move (x read and y written in bf16, and the signs) over its time, as a share of
  the copy bandwidth.
- *dequant_matmul, b bits*: for one row and for 16, bytes of the packed matrix (codes, zeros, scales), x and y over the
  time, as a share of the copy bandwidth; for 512 rows, time over that of the dense bf16 product by cuBLAS.
- *relative error*: norm of the difference from a product in float64, over its norm.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from kernels.binary_matmul.kernel import binary_matmul
from kernels.binary_matmul.operands import Segments, segments_of
from kernels.dequant_matmul.kernel import dequant_matmul
from kernels.dequant_matmul.layout import BITS
from kernels.dequant_matmul.operands import PackedWeight, packed_weight
from kernels.dequant_matmul.reference import dequantize
from kernels.e8p_matmul.kernel import e8p_matmul
from kernels.e8p_matmul.reference import E8PWeight, decode_matrix
from kernels.group_mask.reference import kept_per_row
from kernels.hadamard import reference as hadamard_reference
from kernels.hadamard.factors import plan
from kernels.hadamard.kernel import hadamard
from kernels.packing import code_words, unpack_signs, words_for
from kernels.sign_pack.kernel import sign_pack_rows
from kernels.sparse_delta_matmul.kernel import sparse_delta_matmul
from kernels.sparse_delta_matmul.reference import SparseDelta, dense_delta
from tests.benchmarks.bench_bitdelta import record as record_row

PROJECT = Path(__file__).parents[2]
COPY_BYTES = 1 << 30
SIGN_PACK_SHARE = 0.8
HADAMARD_SHARE = 0.8
HADAMARD_NUMBERS = 1 << 26
DEQUANT_SHARE = 0.7
ROOFLINE_SHARE = 0.7
E8P_SHARE = 0.6
E8P_BYTES = 1 << 30
"""Code words held at once, for the same reason as :data:`RESIDENT_BYTES`."""
E8P_SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))
"""Outputs and inputs: an attention matrix and a feed-forward one of a model of 8 billion weights, and one of 70."""
RELATIVE_ERROR = 1e-2
WARM_UP = 5
RESIDENT_BYTES = 8 << 30
"""Weights held at once: many times any cache, so that a round finds none of its own there."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[4096, 8192, 14336, 11008])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("There is no CUDA device here: nothing was measured and no row was written.\n")
        return 2
    gate()
    passed = []
    copied = copy_bandwidth(args.rounds)
    record(f"copy, {torch.cuda.get_device_name()}", copied / 1e12, "TB/s, read and written")
    for size in args.sizes:
        passed.append(bench_sign_pack(size, args.rounds, copied))
        passed += [bench_binary_matmul(size, batch, args.rounds) for batch in args.batches]
        passed += bench_sparse_delta_matmul(size, args.rounds)
        for bits in BITS:
            passed += bench_dequant_matmul(size, bits, args.rounds, copied)
    for dimension in args.dimensions:
        passed += bench_hadamard(dimension, args.rounds, copied)
    for outputs, inputs in E8P_SHAPES:
        for bits in (2, 3, 4):
            passed += bench_e8p_matmul(outputs, inputs, bits, args.rounds, copied)
    return 0 if all(passed) else 1


def gate() -> None:
    """Stop unless the kernels are right on this device; a machine with a GPU may lack what the other tests start."""
    alone = ["-c", os.devnull, "--rootdir", ".", "--confcutdir", "tests/kernels", "-p", "no:django"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *alone, "tests/kernels"]
    subprocess.run(command, cwd=PROJECT, check=True, env=os.environ | {"TRITON_INTERPRET": "0"})


def record(figure: str, value: float, unit: str, bound: float | None = None, *, least: bool = False) -> bool:
    """A row of the results; with ``least`` the bound is one from below, kept as the missing part."""
    if bound is None or not least:
        return record_row(figure, value, unit, bound, benchmark="kernels")
    record_row(figure, value, unit, benchmark="kernels")
    return record_row(f"{figure}: short of {bound:.2g} by", max(0.0, bound - value), unit, 0.0, benchmark="kernels")


def seconds(works: list[Callable[[], object]], rounds: int) -> float:
    """Median seconds of a piece of work on the device; ``works`` are the same work on other memory, taken in turn."""
    for turn in range(WARM_UP):
        works[turn % len(works)]()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for turn, (start, stop) in enumerate(marks):
        start.record()
        works[turn % len(works)]()
        stop.record()
    torch.cuda.synchronize()
    return float(torch.tensor([start.elapsed_time(stop) / 1e3 for start, stop in marks]).median())


def captured(work: Callable[[], object]) -> Callable[[], object]:
    """``work`` as a CUDA graph: launches cost nothing, as in a server, and what cannot be captured fails here."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def copy_bandwidth(rounds: int) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds([partial(target.copy_, source)], rounds)


def bench_sign_pack(size: int, rounds: int, copied: float) -> bool:
    copies = max(1, RESIDENT_BYTES // (4 * size * size))
    pairs = [(random(size, size), random(size, size)) for _ in range(min(copies, 8))]
    taken = seconds([captured(partial(sign_pack_rows, base, finetuned)) for base, finetuned in pairs], rounds)
    moved = 2 * 2 * size * size + 4 * words_for(size) * size + 2 * 8 * size
    return record(
        f"sign_pack, {size} x {size}: share of copy bandwidth",
        moved / taken / copied,
        "ratio",
        SIGN_PACK_SHARE,
        least=True,
    )


def bench_binary_matmul(size: int, batch: int, rounds: int) -> bool:
    """B tenants on one base against B models; then the error of the same call."""
    copies = max(2, min(8, RESIDENT_BYTES // (batch * 2 * size * size)))
    x = random(batch, size)
    models = [[random(size, size) for _ in range(batch)] for _ in range(copies)]
    separate = seconds([captured(partial(separately, x, weights)) for weights in models], rounds)
    segments = segments_of(torch.arange(batch, device="cuda"), batch)
    stacks = [signs(batch, size) for _ in range(copies)]
    scale = torch.rand((batch, 1, size, 1), device="cuda") * 0.01
    calls = [
        captured(partial(together, x, packed, scale, weights[0], segments))
        for packed, weights in zip(stacks, models, strict=True)
    ]
    speed_up = separate / seconds(calls, rounds)
    roofline = batch / (1 + batch / 16)
    record(f"binary_matmul, {size} x {size}, {batch} tenants: over separate models", speed_up, "times")
    y = together(x, stacks[0], scale, models[0][0], segments).double()
    expected = torch.stack(
        [
            x[tenant].double()
            @ (
                models[0][0].double()
                + scale[tenant, 0].double() * unpack_signs(stacks[0][tenant, 0], size, torch.float64)
            ).T
            for tenant in range(batch)
        ]
    )
    share = record(
        f"binary_matmul, {size} x {size}, {batch} tenants: share of the roofline",
        speed_up / roofline,
        "ratio",
        ROOFLINE_SHARE,
        least=True,
    )
    return share & record(
        f"binary_matmul, {size} x {size}, {batch} tenants: relative error", error(y, expected), "ratio", RELATIVE_ERROR
    )


def bench_sparse_delta_matmul(size: int, rounds: int) -> list[bool]:
    """Ratio 8, 4 bits, group 64, one token and 64."""
    words = torch.randint(
        -(2**31), 2**31 - 1, (size, code_words(kept_per_row(size, 64, 8), 4)), dtype=torch.int32, device="cuda"
    )
    delta = SparseDelta(words, 4, 0.001, 8, 1, 0, size, 64, 8)
    bases = [random(size, size) for _ in range(4)]
    dense = dense_delta(delta, torch.float64)
    passed = [
        record(f"sparse_delta_matmul, {size} x {size}: codes over dense", words.nbytes / bases[0].nbytes, "ratio")
    ]
    for tokens in (1, 64):
        x = random(tokens, size)
        alone = seconds([captured(partial(torch.nn.functional.linear, x, base)) for base in bases], rounds)
        fused = seconds([captured(partial(sparse_delta_matmul, x, delta, base)) for base in bases], rounds)
        record(f"sparse_delta_matmul, {size} x {size}, {tokens} tokens: over the base alone", fused / alone, "ratio")
        expected = x.double() @ (bases[0].double() + dense).T
        found = error(sparse_delta_matmul(x, delta, bases[0]).double(), expected)
        passed.append(
            record(
                f"sparse_delta_matmul, {size} x {size}, {tokens} tokens: relative error", found, "ratio", RELATIVE_ERROR
            )
        )
    return passed


def bench_e8p_matmul(outputs: int, inputs: int, bits: int, rounds: int, copied: float) -> list[bool]:
    """One row, then the error of the same call, then 16 rows beside cuBLAS."""
    name, size = f"e8p_matmul, {outputs} x {inputs}, {bits} bits", outputs * inputs * bits // 8
    weights = [e8p_weight(outputs, inputs, bits) for _ in range(max(2, min(128, E8P_BYTES // size)))]
    bases = [random(outputs, inputs) for _ in range(4)]
    passed = []
    for rows in (1, 16):
        x = random(rows, inputs)
        taken = seconds([captured(partial(e8p_matmul, x, weight)) for weight in weights], rounds)
        dense = seconds([captured(partial(torch.nn.functional.linear, x, base)) for base in bases], rounds)
        record(f"{name}, {rows} rows: over bf16 by cuBLAS", dense / taken, "times")
        if rows == 1:
            share = (size + 2 * (inputs + outputs)) / taken / copied
            passed.append(record(f"{name}, one row: share of copy bandwidth", share, "ratio", E8P_SHARE, least=True))
        expected = x.double() @ decode_matrix(weights[0], torch.float64).T
        found = error(e8p_matmul(x, weights[0]).double(), expected)
        passed.append(record(f"{name}, {rows} rows: relative error", found, "ratio", RELATIVE_ERROR))
    return passed


def e8p_weight(outputs: int, inputs: int, bits: int) -> E8PWeight:
    """Random code words, which meet in the tables' banks no less often than those of a model."""
    first, second = (
        torch.randint(-(1 << 15), 1 << 15, (outputs, inputs // 8), device="cuda").to(torch.int16) for _ in range(2)
    )
    planes = {2: None, 3: second.to(torch.uint8), 4: second}
    return E8PWeight(first, planes[bits], {2: 1.0, 3: 2.04, 4: 3.45}[bits], 0.01)


def bench_hadamard(dimension: int, rounds: int, copied: float) -> list[bool]:
    """Rows of 128 MB with fused signs, the forward direction; then the error of some of them."""
    chosen, rows = plan(dimension), HADAMARD_NUMBERS // dimension
    signs = torch.randint(0, 2, (dimension,), device="cuda").float() * 2 - 1
    inputs = [random(rows, dimension) for _ in range(4)]
    taken = seconds([captured(partial(hadamard, x, chosen, signs)) for x in inputs], rounds)
    moved = 2 * 2 * rows * dimension + 4 * dimension
    few = inputs[0][:16]
    expected = hadamard_reference.hadamard(few.double(), chosen, signs.double())
    name = f"hadamard, {dimension} ({chosen.kind} {'x'.join(map(str, (*chosen.factors, chosen.sylvester)))})"
    share = moved / taken / copied
    return [
        record(f"{name}: share of copy bandwidth", share, "ratio", HADAMARD_SHARE, least=True),
        record(
            f"{name}: relative error", error(hadamard(few, chosen, signs).double(), expected), "ratio", RELATIVE_ERROR
        ),
    ]


def bench_dequant_matmul(size: int, bits: int, rounds: int, copied: float) -> list[bool]:
    """Group 128 in order: one row, 16 and 512; then the error of the same call."""
    copies = max(2, min(32, RESIDENT_BYTES // (size * size)))
    weights = [packed(size, bits) for _ in range(copies)]
    dense = dequantize(*tensors(weights[0]), dtype=torch.float64)
    name, passed = f"dequant_matmul, {size} x {size}, {bits} bits", []
    for tokens in (1, 16, 512):
        x, rows = random(tokens, size), f"{tokens} row{'s' * (tokens > 1)}"
        taken = seconds([captured(partial(dequant_matmul, x, weight)) for weight in weights], rounds)
        if tokens > 16:
            models = [random(size, size) for _ in range(4)]
            alone = seconds([captured(partial(torch.nn.functional.linear, x, model)) for model in models], rounds)
            record(f"{name}, {rows}: over the dense product", taken / alone, "ratio")
        else:
            moved = sum(tensor.nbytes for tensor in tensors(weights[0])[:3]) + 2 * x.nbytes
            bound = DEQUANT_SHARE if tokens == 1 else None
            share = moved / taken / copied
            passed.append(
                record(f"{name}, {rows}: share of copy bandwidth", share, "ratio", bound, least=bound is not None)
            )
        found = error(dequant_matmul(x, weights[0]).double(), x.double() @ dense.T)
        passed.append(record(f"{name}, {rows}: relative error", found, "ratio", RELATIVE_ERROR))
    return passed


def packed(size: int, bits: int, group_size: int = 128) -> PackedWeight:
    """A matrix of random codes and zeros: any words are some."""
    groups = size // group_size
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        for shape in ((size * bits // 32, size), (groups, size * bits // 32))
    )
    scales = (torch.rand((groups, size), device="cuda") * 0.01).half()
    g_idx = (torch.arange(size, device="cuda") // group_size).to(torch.int32)
    return packed_weight(qweight, qzeros, scales, g_idx, bits)


def tensors(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    return weight.qweight, weight.qzeros, weight.scales, weight.g_idx, weight.bits


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def signs(batch: int, size: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (batch, 1, words_for(size), size), dtype=torch.int32, device="cuda")


def separately(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.nn.functional.linear(x[tenant : tenant + 1], weight) for tenant, weight in enumerate(weights)]


def together(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, segments: Segments
) -> torch.Tensor:
    return binary_matmul(x, packed, scale, weight=weight, segments=segments)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main())
