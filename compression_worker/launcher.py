"""Start, feed and watch a warm child that computes steps, and kill it when it must go.

One child per :class:`Launcher`, one step at a time, JSON lines in and out. The parent never computes and never
imports torch, so neither a held lock nor a stuck device nor a full memory can silence it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from compression_worker.contracts import Json, StepSpec
from compression_worker.faults import failpoint

TICK_SECONDS = 0.5
READ_BYTES = 1 << 16
MAX_LINE_BYTES = 64 << 20
PR_SET_PDEATHSIG = 1
PASSED_ON = (
    "CUDA_",
    "FAULT",
    "DELTAWORKS_KERNELS",
    "HOME",
    "LANG",
    "LC_",
    "LD_LIBRARY_PATH",
    "MKL_",
    "NVIDIA_",
    "OMP_",
    "PATH",
    "PYTHON",
    "TMPDIR",
    "TORCH",
    "TRITON_",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
)
"""Beginnings of the environment variables that a child gets: it holds no password of a database or a broker."""

Kind = Literal["done", "failed", "blocked", "damaged", "errored", "killed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one step ended.

    done: ``output`` is the digest of its StepOutput. failed: the job says no (``code``, ``message``). blocked: it
    waits for something (``code`` is the reason, such as ``disk``). damaged: ``inputs`` names outputs of earlier steps
    that are no longer whole. errored: the code broke; ``detail`` holds the
    traceback. killed: a signal ended the child, not ours. cancelled: ``tick`` asked for it.
    """

    kind: Kind
    output: str = ""
    data: Json = field(default_factory=dict)
    steps: tuple[Json, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    reused: bool = False
    code: str = ""
    message: str = ""
    detail: str = ""
    signal: int = 0
    inputs: tuple[str, ...] = ()


def child_command(
    store: str | Path, import_roots: Mapping[str, Path] | None = None, device: str = "auto", cache: str = ""
) -> list[str]:
    """The command line of a child that computes steps against ``store`` (an address of ``store.open_store``)."""
    command = [sys.executable, "-m", "compression_worker", "step", "--store", str(store), "--device", device]
    if cache:
        command += ["--cache", cache]
    for name, path in (import_roots or {}).items():
        command += ["--import-root", f"{name}={path}"]
    return command


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What of ``environ`` a child may see, and what keeps its libraries quiet and offline."""
    # Keys of a bucket only where the store is one: nothing else that a child does needs them.
    passed_on = (*PASSED_ON, "AWS_") if environ.get("ARTIFACT_ROOT", "").startswith("s3://") else PASSED_ON
    kept = {name: value for name, value in environ.items() if name.startswith(passed_on)}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def start_child(command: list[str], env: dict[str, str], memory_limit: int) -> subprocess.Popen[bytes]:
    """A child in a process group of its own that dies with the calling thread; ``memory_limit`` in bytes, 0: none."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        bufsize=0,
        start_new_session=True,
        preexec_fn=_bind_to_parent(os.getpid(), memory_limit),
    )


class Launcher:
    """Runs steps in a child that stays warm between them.

    ``env`` None means :func:`child_environment` of this process. ``memory_limit_mb`` limits the child's address space
    (0: no limit; a CUDA device reserves far more than it uses, so leave it 0 there). The child dies with the *thread*
    that started it, as Linux defines a parent's death: call :meth:`run` from a thread that stays. ``start`` is how a
    child comes to be.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        memory_limit_mb: int = 0,
        start: Callable[[list[str], dict[str, str], int], subprocess.Popen[bytes]] = start_child,
    ) -> None:
        self._command = list(command)
        self._env = dict(child_environment(os.environ) if env is None else env)
        self._memory_limit = memory_limit_mb << 20
        self._start = start
        self._child: _Child | None = None

    @property
    def pid(self) -> int:
        """The warm child's process id, 0 when there is none."""
        child = self._child  # a watching thread may ask while run() replaces it
        return child.process.pid if child and child.process.poll() is None else 0

    def run(
        self,
        spec: StepSpec,
        *,
        cached: str = "",
        on_event: Callable[[Json], None] = lambda event: None,
        tick: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Compute ``spec`` in the child; ``cached`` is an output digest to answer with when it still verifies.

        ``on_event`` gets each progress and log line. ``tick`` is called at least each second; True kills the child
        at once. An exception out of either kills the child, too.
        """
        line = json.dumps({"spec": spec.to_json(), "cached": cached}).encode() + b"\n"
        outcome = None
        try:
            outcome = self._ready_child().exchange(line, on_event, tick)
        finally:
            # A child is reused only after an answer that leaves it sound.
            if outcome is None or outcome.kind not in ("done", "failed", "blocked", "damaged"):
                self._kill()
        return outcome

    def close(self) -> None:
        """Let the child end, and kill it when it does not within two seconds."""
        if self._child:
            self._child.end(patience=2.0)
            self._child = None

    def _ready_child(self) -> _Child:
        if self._child and self._child.process.poll() is not None:
            self._kill()
        if self._child is None:
            failpoint("launch.start")
            self._child = _Child(self._start(self._command, self._env, self._memory_limit))
        return self._child

    def _kill(self) -> None:
        if self._child:
            self._child.end(patience=0.0)
            self._child = None


class _Child:
    """One child process and its pipes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._last_words: deque[bytes] = deque(maxlen=200)
        self._selector = selectors.DefaultSelector()
        for pipe in (self._in, self._out, self._err):
            os.set_blocking(pipe.fileno(), False)
        self._selector.register(self._out, selectors.EVENT_READ, self._read_answer)
        self._selector.register(self._err, selectors.EVENT_READ, self._read_words)
        self._unread = bytearray()
        self._ended = False

    @property
    def _in(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def _out(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def _err(self) -> IO[bytes]:
        assert self.process.stderr is not None
        return self.process.stderr

    def exchange(self, line: bytes, on_event: Callable[[Json], None], tick: Callable[[], bool]) -> Outcome:
        """Write one line; read until its answer, the child's end, or a tick that says stop."""
        pending = memoryview(line)
        next_tick = time.monotonic()
        failpoint("launch.sent")
        while True:
            if time.monotonic() >= next_tick:
                if tick():
                    return Outcome(kind="cancelled", message="killed on request")
                next_tick = time.monotonic() + TICK_SECONDS
            # Seen dead before it is read once more: what it started may hold its pipes open for ever.
            is_dead = self.process.poll() is not None
            pending = self._write(pending)
            heard = self._wait(0.05 if pending or is_dead else max(0.0, next_tick - time.monotonic()))
            while (newline := self._unread.find(b"\n")) >= 0:
                answer = self._take_line(newline)
                if outcome := _outcome(answer, on_event):
                    return outcome
            if len(self._unread) > MAX_LINE_BYTES:
                return Outcome(kind="errored", message="the child wrote a line without an end", detail=self._tail())
            if self._ended or (is_dead and not heard):
                return self._how_it_ended()

    def end(self, *, patience: float) -> None:
        """Close the pipes and see the whole process group gone."""
        self._selector.close()
        with contextlib.suppress(OSError):
            self._in.close()
        if patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        # The group, also after the child's own end: what it started must not outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._out.close()
        self._err.close()

    def _write(self, pending: memoryview) -> memoryview:
        if pending:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                return pending[os.write(self._in.fileno(), pending) :]
        return pending

    def _wait(self, seconds: float) -> bool:
        """Read what there is, or what comes within ``seconds``; whether there was something."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            key.data()
        return bool(ready)

    def _read_answer(self) -> None:
        if data := os.read(self._out.fileno(), READ_BYTES):
            self._unread += data
        else:
            self._selector.unregister(self._out)
            self._ended = True

    def _read_words(self) -> None:
        if data := os.read(self._err.fileno(), READ_BYTES):
            self._last_words.extend(data.splitlines())
        else:
            self._selector.unregister(self._err)

    def _take_line(self, newline: int) -> bytes:
        line = bytes(self._unread[:newline])
        del self._unread[: newline + 1]
        return line

    def _how_it_ended(self) -> Outcome:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        self._wait(0.0)
        status = self.process.poll()
        if status is not None and status < 0:
            name = f"signal {-status} ({signal.strsignal(-status)})"
            return Outcome(
                kind="killed",
                signal=-status,
                message=f"the computing process was ended by {name}",
                detail=self._tail(),
            )
        return Outcome(
            kind="errored",
            message=f"the computing process ended without an answer (exit status {status})",
            detail=self._tail(),
        )

    def _tail(self) -> str:
        return b"\n".join(self._last_words).decode(errors="replace")


def _outcome(line: bytes, on_event: Callable[[Json], None]) -> Outcome | None:
    """The outcome that ``line`` says, or None for a progress or log line, which goes to ``on_event``."""
    try:
        answer = json.loads(line)
        kind = answer["type"]
        if kind == "result":
            parts = {key: answer[key] for key in ("output", "data", "measured", "reused")}
            return Outcome(kind="done", steps=tuple(answer["steps"]), **parts)
        if kind == "failed":
            return Outcome(kind="failed", code=answer["code"], message=answer["message"])
        if kind == "blocked":
            return Outcome(kind="blocked", code=answer["reason"], message=answer["message"])
        if kind == "damaged":
            return Outcome(kind="damaged", inputs=tuple(answer["inputs"]), message=answer["message"])
        if kind == "errored":
            code = answer.get("code", "")
            return Outcome(kind="errored", code=code, message=answer["message"], detail=answer["traceback"])
    except (ValueError, KeyError, TypeError) as error:
        return Outcome(kind="errored", message=f"the child's answer cannot be read: {error}", detail=repr(line[:500]))
    on_event(answer)
    return None


def _bind_to_parent(parent: int, memory_limit: int) -> Callable[[], None]:
    """What runs in the child before its program: die with the parent, stay under the limit."""
    # Loaded before the fork: between fork and exec only system calls are safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def bind() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)
        if memory_limit:
            resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))

    return bind
