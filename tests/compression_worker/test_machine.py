"""What a machine says it has; what cannot be read is unknown and never guessed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from compression_worker import machine
from compression_worker.machine import forget_peak, peak_bytes, this_machine


@pytest.fixture(autouse=True)
def _ask_again() -> None:
    this_machine.cache_clear()


def tool(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ``nvidia-smi`` that answers as ``script`` says."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_memory_is_the_machines_or_the_containers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree: 1 kB\n")
    monkeypatch.setattr(machine, "MEMINFO", meminfo)
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (limit,))
    assert this_machine().memory_bytes == 16_384_000_000
    this_machine.cache_clear()
    limit.write_text("4000000000\n")
    assert this_machine().memory_bytes == 4_000_000_000
    this_machine.cache_clear()
    limit.write_text("max\n")
    assert this_machine().memory_bytes == 16_384_000_000
    this_machine.cache_clear()
    meminfo.unlink()
    assert this_machine().memory_bytes is None


def test_the_limit_of_a_step_is_none_when_there_is_none() -> None:
    assert this_machine().memory_limit_bytes is None
    assert this_machine(512).memory_limit_bytes == 512 << 20


def test_a_gpu_is_named_with_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "echo '81559, NVIDIA H100 80GB HBM3'; echo '81559, the second'", monkeypatch)
    found = this_machine()
    assert (found.gpu_name, found.gpu_memory_bytes) == ("NVIDIA H100 80GB HBM3", 81559 << 20)


@pytest.mark.parametrize("script", ["exit 9", "echo nonsense", "true"])
def test_a_tool_that_fails_leaves_the_drivers_word(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, script, monkeypatch)
    monkeypatch.setattr(machine, "NVIDIA_FOLDER", tmp_path / "gpus")
    assert this_machine().gpu_name == ""
    this_machine.cache_clear()
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (tmp_path / "gpus" / "0000:01:00.0" / "information").write_text("Model: \t NVIDIA A2\nIRQ: 3\n")
    assert (this_machine().gpu_name, this_machine().gpu_memory_bytes) == ("NVIDIA A2", None)


def test_a_peak_is_forgotten_before_the_next_step() -> None:
    forget_peak()
    before = peak_bytes()
    block = bytearray(120_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_bytes() - before > 90_000_000
    del block
    forget_peak()
    assert peak_bytes() - before < 60_000_000
