"""Lossless escrow of a fine-tune against its base: bytes and speed beside other lossless ways, in one run.

    python -m tests.benchmarks.bench_escrow --base FOLDER --variant FOLDER

Runs the escrow's tests first (no figure is reported on a red gate). Every way codes the same weights tensor by tensor on
one core, and every way's bytes are decoded and compared with the weights. MB/s: 10^6 bytes of weights for a second of
processor time of this process. Adds a line per figure to ``results.csv``; exits 1 unless the escrow's codes are at least
1.15 times smaller than those of XOR, byte split and zstd -3.

- *escrow*: ordered-integer difference in byte planes, ANS by the base's exponent (``compression_worker/escrow/coding.py``)
- *xor split zstd -3*: bit patterns of both XORed, low and high bytes apart, zstd level 3
- *exponent zstd -1*: the escrow's planes and order, each run coded by zstd level 1 in place of ANS
- *planes deflate*: ordered-integer difference in byte planes, zlib level 6
- *zstd -3*: the weights alone
- *zstd patch*: the weights with those of the base as a dictionary of the same content, as ``zstd --patch-from`` does
- *whole escrow*: all of it, with every file of the checkpoint, as ``python -m compression_worker escrow`` makes it, the
  proof that it restores included; and the peak memory of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from compression_worker import commands
from compression_worker.checkpoints import Checkpoint, attach_folder
from compression_worker.escrow import coding
from compression_worker.escrow.files import WeightFiles, tensor_file
from compression_worker.store import Store

PROJECT = Path(__file__).parents[2]
GOAL = 1.15
LEVEL = 3
PEER = "xor split zstd -3"
Pair = tuple[str, memoryview, memoryview]


@dataclass
class Tally:
    """What one way came to."""

    coded: int = 0
    encoding: float = 0.0
    decoding: float = 0.0
    source: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--variant", type=Path, required=True)
    parser.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.whole:
        return whole(args.base, args.variant, args.whole)
    gate()
    tallies = {name: Tally() for name in WAYS}
    for pair in pairs(args.base, args.variant):
        for name, (encode, decode) in WAYS.items():
            measure(tallies[name], encode, decode, pair)
    peer = tallies[PEER].coded
    for name, tally in tallies.items():
        words = f"MB of {tally.source / 1e6:.1f}, ratio {tally.source / tally.coded:.3f}"
        noted(f"{name}: codes", tally.coded / 1e6, f"{words}, {peer / tally.coded:.3f} x {PEER}")
        noted(f"{name}: encode", tally.source / tally.encoding / 1e6, "MB/s a core")
        noted(f"{name}: decode", tally.source / tally.decoding / 1e6, "MB/s a core")
    kept = noted(f"{PEER} / escrow", peer / tallies["escrow"].coded, f"ratio (at least {GOAL})") >= GOAL
    measure_whole(args.base, args.variant)
    return 0 if kept else 1


def gate() -> None:
    """Stop unless what is measured is right."""
    tests = ["tests/compression_worker/test_escrow.py", "tests/compression_worker/test_escrow_coding.py"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--no-header", *tests], cwd=PROJECT, check=True)


def noted(figure: str, value: float, unit: str) -> float:
    from tests.benchmarks.bench_bitdelta import record  # here: it loads torch, which the measured process has not

    record(figure, value, unit, benchmark="escrow")
    return value


def pairs(base: Path, variant: Path) -> Iterator[Pair]:
    """The tensors that both have in one shape and dtype."""
    with tempfile.TemporaryDirectory() as folder, WeightFiles() as files:
        store = Store(folder, durable=False)
        ours, theirs = (Checkpoint.open(store, attach_folder(store, one)) for one in (base, variant))
        for name, tensor in theirs.manifest["tensors"].items():
            other = ours.manifest["tensors"].get(name, {})
            if all(tensor[key] == other.get(key) for key in ("shape", "dtype")):
                both = (tensor_file(files, one, name) for one in (ours, theirs))
                one, two = (file.read(name, 0, file.spans[name][1] - file.spans[name][0]) for file in both)
                yield tensor["dtype"], one, two


def measure(tally: Tally, encode: Callable[..., Any], decode: Callable[..., Any], pair: Pair) -> None:
    dtype, base, variant = pair
    started = time.process_time()
    code = encode(dtype, base, variant)
    coded = time.process_time()
    found = decode(code, dtype, base, len(variant))
    tally.decoding += time.process_time() - coded
    tally.encoding += coded - started
    tally.coded += sum(map(len, code))
    tally.source += len(variant)
    if bytes(found) != bytes(variant):
        raise SystemExit("what was decoded is not what was coded: no figure counts")


def escrow_encode(dtype: str, base: memoryview, variant: memoryview) -> list[bytes]:
    ours, theirs = coding.patterns(base, dtype), coding.patterns(variant, dtype)
    starts = range(0, theirs.size, coding.CHUNK_ELEMENTS)
    cuts = [slice(start, start + coding.CHUNK_ELEMENTS) for start in starts]
    return [coding.encode(theirs[cut], ours[cut], dtype) for cut in cuts]


def escrow_decode(code: list[bytes], dtype: str, base: memoryview, size: int) -> bytes:
    ours = coding.patterns(base, dtype)
    found = []
    for at, one in enumerate(code):
        part = ours[at * coding.CHUNK_ELEMENTS : (at + 1) * coding.CHUNK_ELEMENTS]
        found.append(coding.decode(memoryview(one), part.size, part, dtype).tobytes())
    return b"".join(found)


def xor_encode(dtype: str, base: memoryview, variant: memoryview) -> list[bytes]:
    mixed = np.frombuffer(base, np.uint8) ^ np.frombuffer(variant, np.uint8)
    width = coding.LAYOUTS[dtype].width
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    return [compressor.compress(mixed[at::width].tobytes()) for at in range(width)]


def xor_decode(code: list[bytes], dtype: str, base: memoryview, size: int) -> bytes:
    mixed = np.empty(size, np.uint8)
    for at, plane in enumerate(code):
        mixed[at :: len(code)] = np.frombuffer(zstandard.ZstdDecompressor().decompress(plane), np.uint8)
    return (mixed ^ np.frombuffer(base, np.uint8)).tobytes()


def planes_encode(dtype: str, base: memoryview, variant: memoryview) -> list[bytes]:
    layout = coding.LAYOUTS[dtype]
    folded = coding.folded(coding.patterns(variant, dtype), coding.patterns(base, dtype), layout)
    planes = folded.view(np.uint8).reshape(-1, layout.width)
    return [zlib.compress(planes[:, at].tobytes(), 6) for at in range(layout.width)]


def planes_decode(code: list[bytes], dtype: str, base: memoryview, size: int) -> bytes:
    layout = coding.LAYOUTS[dtype]
    planes = np.stack([np.frombuffer(zlib.decompress(plane), np.uint8) for plane in code], axis=1)
    folded = np.ascontiguousarray(planes).reshape(-1).view(layout.unsigned)
    return coding.unfolded(folded, coding.patterns(base, dtype), layout).tobytes()


def runs_encode(dtype: str, base: memoryview, variant: memoryview) -> list[bytes]:
    layout, ours = coding.LAYOUTS[dtype], coding.patterns(base, dtype)
    order, counts = coding.by_exponent(ours, layout)
    sorted_planes = coding.folded(coding.patterns(variant, dtype), ours, layout)[order].view(np.uint8)
    planes = sorted_planes.reshape(-1, layout.width)
    compressor, ends = zstandard.ZstdCompressor(level=1), np.cumsum(counts)[:-1]
    return [
        compressor.compress(run.tobytes()) for at in range(layout.width) for run in np.split(planes[:, at].copy(), ends)
    ]


def runs_decode(code: list[bytes], dtype: str, base: memoryview, size: int) -> bytes:
    layout, ours = coding.LAYOUTS[dtype], coding.patterns(base, dtype)
    order, counts = coding.by_exponent(ours, layout)
    runs = [zstandard.ZstdDecompressor().decompress(run) for run in code]
    planes = np.empty((ours.size, layout.width), np.uint8)
    for at in range(layout.width):
        plane = b"".join(runs[at * len(counts) : (at + 1) * len(counts)])
        planes[order, at] = np.frombuffer(plane, np.uint8)
    return coding.unfolded(planes.reshape(-1).view(layout.unsigned), ours, layout).tobytes()


def zstd_encode(dtype: str, base: memoryview, variant: memoryview) -> list[bytes]:
    return [zstandard.ZstdCompressor(level=LEVEL).compress(variant)]


def zstd_decode(code: list[bytes], dtype: str, base: memoryview, size: int) -> bytes:
    return zstandard.ZstdDecompressor().decompress(code[0])


def patch_encode(dtype: str, base: memoryview, variant: memoryview) -> list[bytes]:
    dictionary = zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    window = min(zstandard.WINDOWLOG_MAX, max(20, (2 * len(base)).bit_length()))
    settings = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=window, enable_ldm=True, source_size=len(variant), dict_size=len(base)
    )
    return [zstandard.ZstdCompressor(dict_data=dictionary, compression_params=settings).compress(variant)]


def patch_decode(code: list[bytes], dtype: str, base: memoryview, size: int) -> bytes:
    dictionary = zstandard.ZstdCompressionDict(bytes(base), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 31).decompress(code[0])


WAYS: dict[str, tuple[Callable[..., list[bytes]], Callable[..., bytes]]] = {
    "escrow": (escrow_encode, escrow_decode),
    PEER: (xor_encode, xor_decode),
    "exponent zstd -1": (runs_encode, runs_decode),
    "planes deflate": (planes_encode, planes_decode),
    "zstd -3": (zstd_encode, zstd_decode),
    "zstd patch": (patch_encode, patch_decode),
}


def measure_whole(base: Path, variant: Path) -> None:
    """The command itself in a process of its own, and the way back."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.bench_escrow", "--base", base, "--variant", variant]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*map(str, command), "--whole", folder], cwd=PROJECT, check=True, stdout=subprocess.PIPE, env=environment
        )
    found = json.loads(done.stdout)
    noted("whole escrow", found["bytes"] / 1e6, f"MB of {found['source'] / 1e6:.1f}, true ratio {found['ratio']:.3f}")
    noted("whole escrow, with proof", found["encoding"], "processor seconds")
    noted("whole escrow, restored", found["decoding"], "processor seconds")
    noted("whole escrow, peak memory", found["peak"] / 1e6, "MB, of a process that holds no model")


def whole(base: Path, variant: Path, folder: Path) -> int:
    """Make an escrow in ``folder``, restore it, compare every file; tell the parent how it went."""
    silent: Callable[..., None] = lambda *args: None  # noqa: E731
    started = time.process_time()
    made = commands.escrow(base=base, model=variant, out=folder / "escrow", watch=silent)
    encoded = time.process_time()
    commands.restore(folder / "escrow", base=base, out=folder / "back", watch=silent)
    decoded = time.process_time()
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    for path in (folder / "back").iterdir():
        subprocess.run(["cmp", path, variant / path.name], check=True)
    answer = {"bytes": made["artifact_bytes"], "source": made["source_bytes"], "ratio": made["true_ratio"]}
    times = {"encoding": encoded - started, "decoding": decoded - encoded, "peak": 1024 * int(peak.split()[1])}
    sys.stdout.write(json.dumps(answer | times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
