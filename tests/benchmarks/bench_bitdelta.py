"""BitDelta's extraction: time against reading both checkpoints, peak memory, and bytes against their prediction.

    python -m tests.benchmarks.bench_bitdelta [--rounds 5] [--layers 22]

Makes synthetic pairs with the shapes of a 135M and of a 1.1B model (two times 2.2 GB), runs the packing tests first (no
time is reported on a red gate), and adds a line per figure to ``results.csv``. Exits 1 when a figure misses its bound.

- *extraction / reading*: seconds for the layer, rest and assemble steps and for the artifact's folder, synchronised to
  disk as ``compress`` does it, divided by the seconds that safetensors needs to bring all tensors of both checkpoints
  into memory, from the page cache, in the same process. Rounds alternate; the fastest of each are compared, since
  what others do on the machine only adds.
- *peak memory*: of a fresh process that plans and extracts the large pair, against 4 x the largest tensor in fp32 +
  400 MB.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from compression_worker.architecture import describe
from compression_worker.artifact import write_folder
from compression_worker.checkpoints import attach_folder
from compression_worker.contracts import Json, PlannedStep, StepOutput, StepSpec
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.methods.bitdelta.layout import predict
from compression_worker.runner import Runner, prepare_torch, resolve_inputs
from compression_worker.store import Store
from compression_worker.tensors import Spec, raw_bytes, write_file
from tests.tiny import tiny_config, write_json, write_tokenizer

RESULTS = Path(__file__).with_name("results.csv")
PROJECT = Path(__file__).parents[2]
READ_RATIO = 2.0
PREDICTION = 0.01
MEMORY_SLACK = 400 * 10**6
BLOCK = 1 << 22
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9} | {
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32} | {
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LARGE["num_hidden_layers"], help="blocks of the large pair")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return report_peak(args.peak_of)
    gate()
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder, "small"), Path(folder, "large")
        make_pair(small, SMALL)
        passed = [*time_extraction(small, args.rounds)]
        make_pair(large, LARGE | {"num_hidden_layers": args.layers})
        passed += measure_peak(large)
    return 0 if all(passed) else 1


def gate() -> None:
    """Stop unless the packing is right."""
    tests = ["tests/kernels/test_packing.py", "tests/compression_worker/test_ledger.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--no-header", *tests], cwd=PROJECT, check=True)


def make_pair(folder: Path, sizes: dict[str, int]) -> None:
    """Base and variant in bf16 from one random block, written tensor by tensor: the values do not matter, sizes do."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(BLOCK, generator=generator)).bfloat16()
    delta = 0.0005 * torch.randn(BLOCK, generator=generator)
    for name, block in (("base", base), ("variant", (base + delta).bfloat16())):
        config = tiny_config() | sizes
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", config)
        write_tokenizer(folder / name, 288)
        specs = {key: Spec("BF16", shape) for key, shape in sorted(describe(config).shapes.items())}
        with (folder / name / "model.safetensors").open("wb") as file:
            write_file(file, {key: (spec, repeated(block, spec.size)) for key, spec in specs.items()}, {"format": "pt"})


def repeated(block: torch.Tensor, size: int) -> Iterator[memoryview]:
    raw = raw_bytes(block)
    for start in range(0, size, len(raw)):
        yield raw[: min(len(raw), size - start)]


def time_extraction(folder: Path, rounds: int) -> Iterator[bool]:
    """Read and extract in turn; then compare the artifact's bytes with the ledger's prediction."""
    prepare_torch()
    reading, passing, extracting = [], [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            store = Store(root, durable=False)
            runner, plan = planned(store, folder)
            reading.append(seconds_to_read(folder))
            passing.append(seconds_to_read(folder, hold=False))
            started = time.perf_counter()
            output = extract(runner, plan)
            write_folder(Path(root, "artifact"), store, output.blobs)
            extracting.append(time.perf_counter() - started)
    read, passed, extracted = min(reading), min(passing), min(extracting)
    size = 2 * (folder / "base" / "model.safetensors").stat().st_size
    record("reading both, held", read, f"s for {size / 1e6:.0f} MB; median {statistics.median(reading):.3f}")
    record("reading both, passing", passed, f"s for {size / 1e6:.0f} MB; median {statistics.median(passing):.3f}")
    record("extraction", extracted, f"s, fastest of {rounds}; median {statistics.median(extracting):.3f}")
    yield record("extraction / reading held", extracted / read, "ratio", READ_RATIO)
    yield record("extraction / reading passing", extracted / passed, "ratio", READ_RATIO)
    config = json.loads((folder / "variant" / "config.json").read_text())
    # The vocabulary is the base's own and lies with it.
    names = ("config.json", "tokenizer_config.json")
    side = {name: (folder / "variant" / name).stat().st_size for name in names}
    wanted = sum(part["bytes"] for part in predict(config, BitDeltaConfig(distill_steps=0), side_files=side))
    real = output.data["artifact_bytes"]
    record("artifact", real, f"bytes, true ratio {output.data['true_ratio']:.2f}")
    yield record("predicted / real bytes - 1", abs(wanted / real - 1), "ratio", PREDICTION)


def planned(
    store: Store, folder: Path, method: str = "bitdelta", config: Json | None = None
) -> tuple[Runner, tuple[PlannedStep, ...]]:
    inputs = {name: attach_folder(store, folder / name) for name in ("base", "variant")}
    spec = StepSpec(kind=f"{method}.plan", params={"config": config or {"distill_steps": 0}}, inputs=inputs)
    runner = Runner(store=store, device="cpu")
    return runner, runner.compute(spec, lambda event: None)[1].steps


def extract(runner: Runner, plan: tuple[PlannedStep, ...]) -> StepOutput:
    digests: list[str] = []
    for step in plan:
        inputs = resolve_inputs(step.inputs, digests)
        spec = StepSpec(kind=step.kind, params=step.params, inputs=inputs, seed=step.seed)
        digest, output, _ = runner.compute(spec, lambda event: None)
        digests.append(digest)
    return output


def seconds_to_read(folder: Path, *, hold: bool = True) -> float:
    """Both checkpoints copied into memory of this process; ``get_tensor`` alone would only map the file."""
    started = time.perf_counter()
    held = []
    for name in ("base", "variant"):
        with safe_open(folder / name / "model.safetensors", framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(key).clone()
                held += [tensor] if hold else []
    return time.perf_counter() - started


def measure_peak(folder: Path) -> Iterator[bool]:
    """Plan and extract the large pair in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_bitdelta", "--peak-of", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)
    shapes = describe(json.loads((folder / "variant" / "config.json").read_text())).shapes.values()
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes)
    size = 2 * (folder / "base" / "model.safetensors").stat().st_size
    record("process before extraction", found["before"] / 1e6, "MB, with torch and transformers loaded")
    yield record(
        f"peak memory, pair of {size / 1e9:.1f} GB", found["peak"] / 1e6, "MB", (4 * largest + MEMORY_SLACK) / 1e6
    )


def report_peak(folder: Path) -> int:
    prepare_torch()
    with tempfile.TemporaryDirectory(dir=folder) as root:
        runner, plan = planned(Store(root), folder)
        before = peak_bytes()
        extract(runner, plan)
    sys.stdout.write(json.dumps({"before": before, "peak": peak_bytes()}))
    return 0


def peak_bytes() -> int:
    """The high-water mark of this program alone: getrusage also counts what its parent had when it was started."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def record(figure: str, value: float, unit: str, bound: float | None = None, benchmark: str = "bitdelta") -> bool:
    """Print a figure and add it to the results; whether it keeps its bound."""
    kept = bound is None or value <= bound
    shown = "" if bound is None else f" (bound {bound:.4g}: {'kept' if kept else 'MISSED'})"
    sys.stdout.write(f"{figure}: {value:.4g} {unit}{shown}\n")
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(["date", "machine", "benchmark", "figure", "value", "unit", "bound"])
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        writer.writerow(
            [today, machine(), benchmark, figure, f"{value:.4g}", unit, "" if bound is None else f"{bound:.4g}"]
        )
    return kept


def machine() -> str:
    """What computes here, without a name: the processor and how many cores of it, and the GPU where there is one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
