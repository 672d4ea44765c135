"""Child processes that never outlive their parent, and the free ports they listen on."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class StartFailed(Exception):
    """A part of the stack did not come up. The message says which, and what its log says."""


def free_port(preferred: int | None = None) -> int:
    """A port of 127.0.0.1 that nobody listens on: ``preferred`` where that is free, else any."""
    for port in (preferred or 0, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise StartFailed("no free port on 127.0.0.1")


def port_open(port: int) -> bool:
    """Whether somebody listens on 127.0.0.1:``port``."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def tied(command: Sequence[str], death_signal: str = "KILL", *, unprivileged: bool = False) -> list[str]:
    """``command``, so that the kernel sends it ``death_signal`` when its parent dies.

    ``unprivileged`` runs it as nobody in a user namespace of its own when we are root, or a user without a name:
    servers that refuse such users then run, and still own the files that we own. A new namespace clears the
    parent-death signal, so that setpriv comes last.
    """
    bound = ["setpriv", "--pdeathsig", death_signal, *command] if shutil.which("setpriv") else list(command)
    if unprivileged and (os.geteuid() == 0 or not _has_a_name(os.geteuid())):
        bound = ["unshare", "--user", "--map-user=65534", "--map-group=65534", *bound]
    return bound


def _has_a_name(user: int) -> bool:
    try:
        return bool(pwd.getpwuid(user).pw_name)
    except KeyError:
        return False


def start(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start ``command`` in a process group of its own, its output appended to ``log``."""
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send ``number`` to the whole process group of ``process``, whether its leader still lives or not."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def stop(process: subprocess.Popen[bytes], number: signal.Signals = signal.SIGTERM, *, seconds: float = 10) -> None:
    """Ask ``process`` to stop with ``number``; after ``seconds`` kill its whole group."""
    if process.poll() is None:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    signal_group(process, signal.SIGKILL)
    process.wait()


def wait_for(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], *, what: str, log: Path, seconds: float
) -> None:
    """Wait until ``ready()``; raises :class:`StartFailed` with the log's last lines when it ends or takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            raise StartFailed(f"{what} ended with code {process.returncode}:\n{last_lines(log)}")
        if time.monotonic() > deadline:
            raise StartFailed(f"{what} is not ready after {seconds:.0f} s:\n{last_lines(log)}")
        time.sleep(0.05)


def last_lines(log: Path, count: int = 12) -> str:
    """The last lines of ``log``, for an error message."""
    if not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
