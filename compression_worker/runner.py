"""Running steps: the child's loop behind ``python -m compression_worker step``, and a whole plan in one process.

A step is pure: its output is stored by digest and depends on nothing but its specification, so the loop may answer
with an earlier output as long as every byte of that still verifies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from compression_worker import catalog, faults, machine
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput, StepSpec
from compression_worker.faults import failpoint
from compression_worker.store import STORE_AWAY, NoRoom, Store, StoreAway, open_store

TORCH_FREE = frozenset({"checkpoint.import", "escrow.plan", "escrow.encode", "escrow.assemble", "escrow.restore"})
PROGRESS_SECONDS = 0.2

Emit = Callable[[Json], None]


class DamagedInputs(CompressionError):
    """What a step reads no longer matches its digest; ``names`` says which inputs. Steps can make outputs again."""

    def __init__(self, names: list[str]) -> None:
        super().__init__("damaged_blob", f"no longer whole: {', '.join(names)}")
        self.names = names


@dataclass(kw_only=True)
class Runner:
    """Computes steps against one store. ``device`` is cpu, cuda or auto (cuda where there is one)."""

    store: Store
    import_roots: Mapping[str, Path] = field(default_factory=dict)
    device: str = "auto"

    def answer(self, spec: StepSpec, cached: str, emit: Emit) -> Json:
        """Compute ``spec``; the message that tells its result or why there is none. Never raises for a bad step."""
        try:
            return self._result(spec, cached, emit)
        except DamagedInputs as error:
            return {"type": "damaged", "inputs": error.names, "message": error.message}
        except CompressionError as error:
            return {"type": "failed", "code": error.code, "message": error.message}
        except NoRoom as error:
            return {"type": "blocked", "reason": "disk", "message": str(error)}
        except StoreAway as error:
            return _errored(error) | {"code": STORE_AWAY}
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return {"type": "blocked", "reason": "disk", "message": str(error)}
            return _errored(error)
        except Exception as error:  # whatever broke, the parent must hear it with its traceback
            return _errored(error)

    def compute(self, spec: StepSpec, emit: Emit) -> tuple[str, StepOutput, dict[str, float]]:
        """Compute ``spec`` and store its output: the output's digest, the output, what was measured. Raises."""
        measured: dict[str, float] = {}
        started = time.monotonic()
        function = _step_function(spec.kind)
        context = StepContext(
            store=self.store,
            spec=spec,
            progress=_Progress(emit),
            log=lambda text, level: emit({"type": "log", "level": level, "text": text}),
            measure=lambda name, value: measured.update({name: float(value)}),
            import_roots=self.import_roots,
            device="cpu" if spec.kind in TORCH_FREE else resolve_device(self.device),
        )
        if damaged := self._damaged_inputs(spec):
            raise DamagedInputs(damaged)
        machine.forget_peak()
        forget_gpu_peak(context.device)
        failpoint("child.compute")
        output = function(context)
        failpoint("child.computed")
        digest = self.store.write_bytes(output.to_bytes())
        failpoint("child.stored")
        measured.setdefault("seconds", time.monotonic() - started)
        # A step that was shared among processes has measured theirs.
        measured["peak_memory_bytes"] = measured.get("peak_memory_bytes", 0.0) + float(machine.peak_bytes())
        measured = gpu_peak(context.device) | measured
        return digest, output, measured

    def _result(self, spec: StepSpec, cached: str, emit: Emit) -> Json:
        if cached and (output := self._verified(cached, emit)):
            return _result(cached, output, {}, reused=True)
        digest, output, measured = self.compute(spec, emit)
        return _result(digest, output, measured, reused=False)

    def _damaged_inputs(self, spec: StepSpec) -> list[str]:
        """The inputs that a disk has changed since they were written: nothing is computed from those."""
        damaged = []
        for name, digest in spec.inputs.items():
            try:
                raw = self.store.read_bytes(digest)
                if StepOutput.is_one(raw):
                    self._verify_blobs(StepOutput.from_bytes(raw))
            except CompressionError:
                damaged.append(name)
        return damaged

    def _verify_blobs(self, output: StepOutput) -> None:
        for blob in output.blobs.values():
            self.store.verify(blob)

    def _verified(self, digest: str, emit: Emit) -> StepOutput | None:
        """The earlier output, when it and each of its blobs still hash to their names."""
        failpoint("child.reuse")
        try:
            output = StepOutput.from_bytes(self.store.read_bytes(digest))
            self._verify_blobs(output)
        except CompressionError as error:
            emit({"type": "log", "level": "warning", "text": f"cannot reuse an earlier output: {error.message}"})
            return None
        return output


def run_child(store: str, import_roots: Mapping[str, Path], device: str, cache: str = "") -> int:
    """Answer step lines from standard input until it ends. Takes standard output for the protocol alone."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints would break the protocol
    sys.stdout = sys.stderr
    runner = Runner(store=open_store(store, cache), import_roots=import_roots, device=device)
    # A parent that is gone wants no answer.
    with contextlib.suppress(BrokenPipeError):
        serve_lines(runner, sys.stdin.buffer, answers)
    return 0


def serve_lines(runner: Runner, lines: Iterable[bytes], answers: BinaryIO) -> None:
    """One answer per line of ``lines``, with the progress and log lines of its step before it."""

    def emit(message: Json) -> None:
        raw = memoryview(json.dumps(message).encode() + b"\n")
        while raw:
            raw = raw[answers.write(raw) :]

    # A child has no database: its parent loses the connection for it.
    faults.drop_database = lambda: emit({"type": "fault", "action": "drop_db"})
    failpoint("child.ready")
    for line in lines:
        failpoint("child.received")
        try:
            message = json.loads(line)
            spec = StepSpec.from_json(message["spec"])
            if spec.kind in catalog.STEPS.keys() - TORCH_FREE:
                prepare_torch()
        except (ValueError, KeyError, TypeError, ImportError) as error:
            emit(_errored(error))
            continue
        answer = runner.answer(spec, message.get("cached", ""), emit)
        failpoint("child.answer")
        emit(answer)


def run_plan(
    store: Store,
    first: PlannedStep | StepSpec,
    on_event: Emit = lambda event: None,
    *,
    import_roots: Mapping[str, Path] | None = None,
    device: str = "auto",
) -> StepOutput:
    """Compute a plan and all its steps in this process; the last step's output (the plan's own if it asks for none).

    ``on_event`` gets the child's progress and log messages, and ``{"type": "step", "name", "group", "index",
    "total"}`` before each step. Raises what the steps raise. Call :func:`prepare_torch` first for the bytes that a
    child would make.
    """
    runner = Runner(store=store, import_roots=import_roots or {}, device=device)
    spec = first if isinstance(first, StepSpec) else _spec(first, [])
    _, output, _ = runner.compute(spec, on_event)
    planned, digests = output.steps, list[str]()
    for index, step in enumerate(planned):
        on_event({"type": "step", "name": step.name, "group": step.group, "index": index, "total": len(planned)})
        digest, output, _ = runner.compute(_spec(step, digests), on_event)
        digests.append(digest)
    return output


def resolve_inputs(inputs: Mapping[str, str], outputs: Sequence[str]) -> dict[str, str]:
    """``inputs`` with each ``"@3"`` replaced by the output digest of the plan's fourth step."""
    return {name: outputs[int(value[1:])] if value.startswith("@") else value for name, value in inputs.items()}


def prepare_torch() -> None:
    """Make torch compute the same bytes each time on one machine: a fixed number of threads, deterministic kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Threads that wait spin by default; where others want the cores too, that costs most of the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Determinism mode also fills new memory with NaN to show errors; here it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False


def forget_gpu_peak(device: str) -> None:
    """From here on :func:`gpu_peak` counts anew."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()


def gpu_peak(device: str) -> dict[str, float]:
    """The most GPU memory that a step held at once; nothing for one that computed on the CPU: so the two differ."""
    if not device.startswith("cuda"):
        return {}
    import torch

    peak = float(torch.cuda.max_memory_allocated())
    return {"gpu_peak_memory_bytes": peak} if peak else {}


def resolve_device(device: str) -> str:
    """``cuda`` or ``cpu`` for ``auto``; the others stay as they are."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Progress:
    """Passes on the first and the last progress of a count, and few in between."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._next = 0.0

    def __call__(self, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if now >= self._next or done >= total:
            self._next = now + PROGRESS_SECONDS
            self._emit({"type": "progress", "done": done, "total": total, "unit": unit})


def _spec(step: PlannedStep, outputs: Sequence[str]) -> StepSpec:
    return StepSpec(kind=step.kind, params=step.params, inputs=resolve_inputs(step.inputs, outputs), seed=step.seed)


def _step_function(kind: str) -> Callable[[StepContext], StepOutput]:
    if kind not in catalog.STEPS:
        raise LookupError(f"this worker knows no step '{kind}': it is older than the one who asks; upgrade it")
    return catalog.step_function(kind)


def _result(digest: str, output: StepOutput, measured: Mapping[str, float], *, reused: bool) -> Json:
    return {
        "type": "result",
        "output": digest,
        "data": output.data,
        "steps": [step.to_json() for step in output.steps],
        "measured": dict(measured),
        "reused": reused,
    }


def _errored(error: Exception) -> Json:
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        message = "the step needs more memory than it may take"
    return {"type": "errored", "message": message, "traceback": "".join(traceback.format_exception(error))}
