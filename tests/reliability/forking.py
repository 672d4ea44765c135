"""Processes by fork from one that has everything imported: what costs seconds to start is there in milliseconds.

The sweep and the soak kill processes hundreds of times. What runs in a forked process is the product's own code; only
the interpreter's start and its imports are saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compression_worker import faults
from compression_worker.launcher import Launcher, child_environment
from compression_worker.runner import run_child

PR_SET_PDEATHSIG = 1
BROKE = 70


class Forked:
    """A forked process that runs ``function``, with what the product uses of :class:`subprocess.Popen`."""

    def __init__(self, function: Callable[[], object], *, log: Path | None = None, pipes: bool = False) -> None:
        self.returncode: int | None = None
        self.stdin = self.stdout = self.stderr = None
        ends = [os.pipe() for _ in range(3)] if pipes else []
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(function, parent, log, ends)
        self.args = [getattr(function, "__name__", "forked")]
        if pipes:
            for end in (ends[0][0], ends[1][1], ends[2][1]):
                os.close(end)
            self.stdin = os.fdopen(ends[0][1], "wb", buffering=0)
            self.stdout = os.fdopen(ends[1][0], "rb", buffering=0)
            self.stderr = os.fdopen(ends[2][0], "rb", buffering=0)

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        over = threading.Event()
        waited = 0.0
        while self.poll() is None:
            if timeout is not None and waited >= timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            over.wait(0.01)
            waited += 0.01
        return self.returncode or 0

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def _become(function: Callable[[], object], parent: int, log: Path | None, ends: list[tuple[int, int]]) -> None:
    """The forked side: a session of its own, bound to its parent, its streams redirected; never returns."""
    code = BROKE
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if ends:
            for target, end in enumerate((ends[0][0], ends[1][1], ends[2][1])):
                os.dup2(end, target)
            for pair in ends:
                for end in pair:
                    os.close(end)
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
        function()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # nothing of the parent's is tidied up here: its connections are its own


def forked_launcher(store: Path, roots: Mapping[str, Path], device: str = "cpu") -> Launcher:
    """A launcher whose children are forked from this process, which has torch already, and run the product's loop."""

    def start(command: list[str], env: dict[str, str], memory_limit: int) -> Any:
        return Forked(lambda: _compute(store, roots, device, env), pipes=True)

    return Launcher(["forked"], child_environment(os.environ), start=start)  # type: ignore[arg-type]


def _compute(store: Path, roots: Mapping[str, Path], device: str, env: Mapping[str, str]) -> None:
    """The child of ``python -m compression_worker step``, in a process that is already there."""
    os.environ.clear()
    os.environ.update(env)
    sys.stdin, sys.stderr = os.fdopen(0, "r"), os.fdopen(2, "w", buffering=1)
    faults.arm(*faults.armed_from(os.environ))
    run_child(store, roots, device)
