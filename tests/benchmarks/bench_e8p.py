"""The E8P codebook on a CPU core, in CPU seconds on one thread: tables, nearest points, and the twin of the kernel.

    python -m tests.benchmarks.bench_e8p [--rounds 40]

Adds a line per figure to ``results.csv`` and exits 1 when a figure misses its bound. Each figure is the best of its
rounds, and what it is compared with takes turns with it.

- *tables*: all that decoding needs, made from nothing in a process of its own.
- *nearest*: codes and points of Gaussian vectors of width 0.9, in calls of 576 and of 98,304 vectors, and over the time
  of the same search through all 65,536 points by a product of matrices.
- *rounding*: both stages of 3 and 4 bits, over one search.
- *one row*: ``y = x W_hat^T`` of 4096 x 4096 code words by the twin, over a dense fp32 product.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from compression_worker.making.threads import one_thread_per_operation
from compression_worker.methods.quip_sharp.codebook import RHO, E8PRounder
from compression_worker.methods.quip_sharp.nearest import nearest
from kernels.e8p_matmul.codebook import decode
from kernels.e8p_matmul.reference import E8PWeight, decode_matrix, e8p_matmul
from tests.benchmarks.bench_bitdelta import record as record_row

TABLES_MS, NEAREST_US = 50, 2
MANY, FEW, ALL = 98_304, 576, 256
TABLES = """
import time
import kernels.e8p_matmul.codebook as codebook
start = time.process_time()
codebook.quarters(), codebook.second_quarters()
print(time.process_time() - start)
"""
record = partial(record_row, benchmark="e8p")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    with one_thread_per_operation():
        kept = [bench_tables(), *bench_nearest(rounds)]
        bench_rounding(rounds)
        bench_twin(rounds)
    return 0 if all(kept) else 1


def bench_tables() -> bool:
    made = [
        float(subprocess.run([sys.executable, "-c", TABLES], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    return record("tables, from nothing", 1e3 * min(made), "ms", TABLES_MS)


def bench_nearest(rounds: int) -> list[bool]:
    x = 0.9 * torch.randn((MANY, 8), generator=torch.Generator().manual_seed(0))
    points = decode(torch.arange(1 << 16)).T.contiguous()
    offset = -points.square().sum(0) / 2
    many, through_all = best(rounds, lambda: nearest(x), lambda: torch.addmm(offset, x[:ALL], points).argmax(1))
    (few,) = best(50 * rounds, lambda: nearest(x[:FEW]))
    each = many / MANY
    record("nearest, through all points over ours", through_all / ALL / each, "times")
    return [
        record(f"nearest, in calls of {MANY}", 1e6 * each, "us a vector", NEAREST_US),
        record(f"nearest, in calls of {FEW}", 1e6 * few / FEW, "us a vector", NEAREST_US),
    ]


def bench_rounding(rounds: int) -> None:
    x = torch.randn((MANY, 8), generator=torch.Generator().manual_seed(0))
    one, three, four = best(rounds, *(partial(E8PRounder(bits), x * RHO[bits]) for bits in (2, 3, 4)))
    record("rounding, 3 bits over 2", three / one, "times")
    record("rounding, 4 bits over 2", four / one, "times")


def bench_twin(rounds: int) -> None:
    size = 4096
    codes, _ = nearest(0.9 * torch.randn((size * size // 128, 8), generator=torch.Generator().manual_seed(0)))
    weight = E8PWeight(codes.to(torch.int16).repeat(16)[torch.randperm(size * size // 8)].view(size, size // 8))
    x, dense = torch.randn(1, size), decode_matrix(weight)
    ours, theirs = best(rounds, lambda: e8p_matmul(x, weight), lambda: x @ dense.T)
    record(f"one row, {size} x {size}, twin over dense fp32", ours / theirs, "times")


def best(rounds: int, *works: Callable[[], object]) -> list[float]:
    """The least CPU seconds of each piece of work over rounds in which they take turns."""
    least = [float("inf")] * len(works)
    for _ in range(rounds):
        for index, work in enumerate(works):
            start = time.process_time()
            work()
            least[index] = min(least[index], time.process_time() - start)
    return least


if __name__ == "__main__":
    sys.exit(main())
