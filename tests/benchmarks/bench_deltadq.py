"""DeltaDQ's extraction against reading both checkpoints, and restores of both methods against writing what they write.

    python -m tests.benchmarks.bench_deltadq [--rounds 3]

One synthetic pair with the shapes of a 135M model; the packing and mask tests run first. Rounds alternate and the
fastest of each are compared. *Writing* is the restored folder's bytes from memory to a new file on the same disk,
synchronised as a restore is. Adds a line per figure to ``results.csv``; exits 1 when a figure misses its bound.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from compression_worker import artifact as artifacts
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import Json
from compression_worker.runner import prepare_torch
from compression_worker.store import Store
from tests.benchmarks import bench_bitdelta
from tests.benchmarks.bench_bitdelta import PROJECT, SMALL, extract, make_pair, planned, seconds_to_read

EXTRACTION, RESTORE = 4.0, 1.5
METHODS: dict[str, Json] = {
    "bitdelta": {"distill_steps": 0},
    "deltadq": {"alpha": 8, "num_bits": 4, "parts": 8, "group_size": 64},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tests = ["tests/kernels/test_packing.py", "tests/kernels/test_group_mask.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--no-header", *tests], cwd=PROJECT, check=True)
    prepare_torch()
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder), SMALL)
        return 0 if all([*measure(Path(folder), args.rounds)]) else 1


def measure(folder: Path, rounds: int) -> Iterator[bool]:
    size = 2 * (folder / "base" / "model.safetensors").stat().st_size
    reading: list[float] = []
    extracting: dict[str, list[float]] = {method: [] for method in METHODS}
    restoring: dict[str, list[float]] = {method: [] for method in METHODS}
    writing: list[float] = []
    for _ in range(rounds):
        reading.append(seconds_to_read(folder))
        for method, config in METHODS.items():
            with tempfile.TemporaryDirectory(dir=folder) as root:
                store = Store(root, durable=False)
                runner, plan = planned(store, folder, method, config)
                started = time.perf_counter()
                output = extract(runner, plan)
                extracting[method].append(time.perf_counter() - started)
                base = Checkpoint.open(store, plan[0].inputs["base"])
                artifact = Artifact.open_store(store, output.data["artifact"])
                started = time.perf_counter()
                artifacts.restore(base, artifact, Path(root, "restored"), lambda done, total, unit: None)
                restoring[method].append(time.perf_counter() - started)
                writing.append(seconds_to_write(Path(root, "restored", "model.safetensors"), Path(root, "copy")))
    note("reading both, held", min(reading), f"s for {size / 1e6:.0f} MB")
    note("writing what is restored", min(writing), f"s for {size / 2e6:.0f} MB")
    note("extraction by deltadq", min(extracting["deltadq"]), f"s, fastest of {rounds}")
    yield note("extraction by deltadq / reading held", min(extracting["deltadq"]) / min(reading), "ratio", EXTRACTION)
    for method, seconds in restoring.items():
        yield note(f"restore of {method} / writing", min(seconds) / min(writing), "ratio", RESTORE)


def seconds_to_write(source: Path, target: Path) -> float:
    """The same bytes, from memory, in pieces of a megabyte, synchronised."""
    data = memoryview(source.read_bytes())
    started = time.perf_counter()
    with target.open("wb") as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def note(figure: str, value: float, unit: str, bound: float | None = None) -> bool:
    return bench_bitdelta.record(figure, value, unit, bound, benchmark="deltadq")


if __name__ == "__main__":
    sys.exit(main())
