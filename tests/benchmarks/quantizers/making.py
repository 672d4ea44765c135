"""Each form in a process of its own: what it costs is what the operating system counted for that process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

PROJECT = Path(__file__).parents[3]
EVERY_SECONDS = 0.2
ROWS = Path(__file__).with_name("rows.toml")


class Refused(Exception):
    """A form that could not be made; the message is the last line of its process."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One artifact of ours. ``bits``: with whom it is compared."""

    name: str
    bits: int
    method: str
    set: tuple[str, ...]

    def with_calibration(self, samples: int) -> Row:
        """The same with ``samples`` windows of 512 tokens to calibrate on, where the row does not say its own number."""
        own = {setting.partition("=")[0] for setting in self.set}
        usual = {"samples": samples, "length": 512}
        return replace(self, set=(*self.set, *(f"{name}={value}" for name, value in usual.items() if name not in own)))


@dataclass(frozen=True)
class Cost:
    """Processor seconds, wall seconds and peak bytes of a process."""

    processor: float
    wall: float
    peak: int


def listed(path: Path, more: tuple[str, ...]) -> list[Row]:
    """The rows of a file; ``more`` settings go to each that has a calibration."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["rows"]
    return [Row(**row | {"set": (*row["set"], *more)}) for row in rows]


def pairs(path: Path) -> list[tuple[str, str]]:
    """Names of rows that are compared with each other, as a file lists them."""
    found = tomllib.loads(path.read_text(encoding="utf-8")).get("pairs", [])
    return [(pair["first"], pair["second"]) for pair in found]


def make(row: Row, model: Path, text: Path, out: Path, device: str = "cpu") -> Cost:
    """Run ``compress`` for a row."""
    command = ["-m", "compression_worker", "compress", row.method, "--json", "--device", device]
    command += ["--model", str(model.absolute()), "--out", str(out.absolute()), "--data", str(text.absolute())]
    return run([*command, *(part for setting in row.set for part in ("--set", setting))])


def kept(row: Row, model: Path, text: Path, folder: Path, device: str = "cpu") -> tuple[Path, Cost]:
    """The artifact of a row in ``folder``, made unless it is there, and what making it cost.

    Settings, model, text and device name it, whatever the row is called.
    """
    made_of = [row.method, *row.set, str(model.absolute()), str(text.absolute()), device]
    out = folder / f"{row.method}-{hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]}"
    said = folder / f"{out.name}.json"
    if not said.exists():
        cost = make(row, model, text, out, device)
        said.write_text(json.dumps({"row": asdict(row), **asdict(cost)}, indent=2))
    found = json.loads(said.read_text())
    return out, Cost(**{name: found[name] for name in ("processor", "wall", "peak")})


def make_peer(
    name: str, bits: int, group: int, model: Path, text: Path, out: Path, tokens: int, *, python: str = sys.executable
) -> Cost:
    """Run one peer in ``python``, which writes dense weights and how large they are packed."""
    command = ["-m", "tests.benchmarks.quantizers.peers", name, "--bits", str(bits), "--group", str(group)]
    command += ["--model", str(model.absolute()), "--text", str(text.absolute()), "--out", str(out.absolute())]
    return run([*command, "--tokens", str(tokens)], python)


def run(arguments: list[str], python: str = sys.executable) -> Cost:
    """A Python process, and what it and its children cost."""
    started = time.monotonic()
    process = subprocess.Popen(
        [python, *arguments], cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with Watched(process.pid) as watched:
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = [line for line in said.strip().splitlines() if line.strip()]
        raise Refused(lines[-1] if lines else f"exit {process.returncode}")
    return Cost(used.ru_utime + used.ru_stime, time.monotonic() - started, watched.peak)


class Watched:
    """The high-water mark of a process, looked at until the block ends: getrusage also counts what its parent held."""

    def __init__(self, process: int) -> None:
        self.peak = 0
        self._status = Path(f"/proc/{process}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            with contextlib.suppress(OSError):
                found = [line for line in self._status.read_text().splitlines() if line.startswith("VmHWM")]
                self.peak = max([self.peak, *(1024 * int(line.split()[1]) for line in found)])
