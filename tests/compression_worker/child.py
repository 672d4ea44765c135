"""A real child process with a few step kinds of its own, for the tests of the launcher and the runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from compression_worker import catalog, runner
from compression_worker.contracts import CompressionError, PlannedStep, StepContext, StepOutput
from compression_worker.store import NoRoom


def echo(context: StepContext) -> StepOutput:
    """Stores its seed; says something on every channel that must not break the protocol."""
    for done in range(1, 4):
        context.progress(done, 3, "rounds")
    context.log("half way", "info")
    context.measure("rounds_per_second", 3.0)
    print("a library prints")
    os.write(1, b"and writes to descriptor one\n")
    blob = context.store.write_bytes(f"seed {context.spec.seed}".encode())
    return StepOutput(blobs={"blob": blob}, data={"pid_is_no_part": True, "seed": context.spec.seed})


def plan(context: StepContext) -> StepOutput:
    """Two echoes, then a step that joins them."""
    echoes = [PlannedStep(name=f"echo {seed}", kind="test.echo", group="echo", seed=seed) for seed in (1, 2)]
    join = PlannedStep(name="join", kind="test.join", group="join", inputs={"first": "@0", "second": "@1"})
    return StepOutput(steps=(*echoes, join))


def join(context: StepContext) -> StepOutput:
    return StepOutput(data={name: context.input(name).data["seed"] for name in ("first", "second")})


def where(context: StepContext) -> StepOutput:
    return StepOutput(data={"pid": os.getpid(), "environment": sorted(os.environ)})


def refuse(context: StepContext) -> StepOutput:
    raise CompressionError("shape_mismatch", "the base is of another shape")


def full_disk(context: StepContext) -> StepOutput:
    raise NoRoom("no space left")


def no_space(context: StepContext) -> StepOutput:
    raise OSError(28, "No space left on device")


def broken(context: StepContext) -> StepOutput:
    return StepOutput(data={"value": 1 // int(context.spec.params.get("divisor", 0))})


def not_a_number(context: StepContext) -> StepOutput:
    return StepOutput(data={"value": float("nan")})


def killed(context: StepContext) -> StepOutput:
    sys.stderr.write("last words\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return StepOutput()


def leave(context: StepContext) -> StepOutput:
    os._exit(3)


def hang(context: StepContext) -> StepOutput:
    """Sleeps for ever with a process of its own beside it, whose id it leaves in a file."""
    beside = subprocess.Popen(["sleep", "600"])
    if "note" in context.spec.params:
        Path(context.spec.params["note"]).write_text(f"{os.getpid()} {beside.pid}")
    while True:
        time.sleep(60)


def flood(context: StepContext) -> StepOutput:
    """Logs without an end."""
    while True:
        context.log("x" * 1000, "info")


def big(context: StepContext) -> StepOutput:
    return StepOutput(data={"length": len("x" * int(context.spec.params["bytes"])), "text": "y" * 300_000})


def garbage(context: StepContext) -> StepOutput:
    """Writes what is no JSON to every descriptor, the protocol's among them."""
    for descriptor in range(3, 30):
        try:
            os.write(descriptor, b"what is this\n")
        except OSError:
            continue
    time.sleep(60)
    return StepOutput()


STEPS = (
    echo,
    plan,
    join,
    where,
    refuse,
    full_disk,
    no_space,
    broken,
    not_a_number,
    killed,
    leave,
    hang,
    flood,
    big,
    garbage,
)
KINDS = {f"test.{step.__name__}": f"tests.compression_worker.child:{step.__name__}" for step in STEPS}


def main(store: str) -> None:
    catalog.STEPS.update(KINDS)
    runner.TORCH_FREE = frozenset({*runner.TORCH_FREE, *KINDS})
    sys.exit(runner.run_child(Path(store), {}, "cpu"))
