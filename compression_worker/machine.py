"""What this machine has, and what a process really took of it: read from /proc and nvidia-smi. No torch.

A figure that cannot be read is None, which means unknown; nothing here guesses.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
NVIDIA_FOLDER = Path("/proc/driver/nvidia/gpus")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits")
NVIDIA_SMI_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Memory of the machine (or of the container that limits it), of a step, and of its first GPU."""

    memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    gpu_name: str = ""


@cache
def this_machine(memory_limit_mb: int = 0) -> Machine:
    """This machine, asked once. ``memory_limit_mb`` is the limit of a computing child, 0 for none."""
    name, gpu_memory = _gpu()
    return Machine(
        memory_bytes=_memory(),
        memory_limit_bytes=memory_limit_mb << 20 if memory_limit_mb else None,
        gpu_memory_bytes=gpu_memory,
        gpu_name=name,
    )


def _memory() -> int | None:
    """What the kernel has, or less where the container may take less."""
    limits = [limit for limit in (_meminfo("MemTotal"), *map(_number, CGROUP_LIMITS)) if limit]
    return min(limits) if limits else None


def _meminfo(field: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    """The number in a file of the kernel; None for ``max`` and where there is no such file."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _gpu() -> tuple[str, int | None]:
    """Name and memory of the first GPU; the name alone where only the driver's folder tells it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        told = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True)
        megabytes, _, name = told.stdout.splitlines()[0].partition(",")
        return name.strip(), int(megabytes) << 20
    with contextlib.suppress(OSError, StopIteration):
        for line in (next(NVIDIA_FOLDER.iterdir()) / "information").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                return value.strip(), None
    return "", None


def forget_peak() -> None:
    """From here on :func:`peak_bytes` counts anew, where the kernel allows that.

    What a process inherits of its parent's peak is forgotten with it, which ``getrusage`` would count for ever.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process held at once since :func:`forget_peak`."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
