"""The processes that share a training step: one for each GPU, each with the model and its part of the windows.

Of a step on ``B`` windows the process ``r`` of ``n`` takes windows ``floor(B r / n)`` to ``floor(B (r + 1) / n)``; the
gradients of what learns and the losses are summed over processes with Accelerate, and each takes the same optimizer
step. They are children as a worker has one, which compute the same step of the job and know from their environment who
they are. The first one's output counts. The sums are in another order than those of one process, so its bytes are
promised for equal numbers of processes only.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch

from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput
from compression_worker.launcher import Launcher, Outcome, child_command
from compression_worker.runner import DamagedInputs
from compression_worker.store import STORE_AWAY, NoRoom, StoreAway

RENDEZVOUS = "TRAINING_RENDEZVOUS"
"""In the environment of a process that shares a step: the file by which they find each other."""
PATIENCE = 2.0
"""Seconds that the others get to say what is wrong after one has failed."""
TIMEOUT = timedelta(days=1)
"""How long a process waits for the others: a step that stands still is whoever watches it's to end."""
GRAVITY: Final = ("failed", "damaged", "blocked", "killed", "errored", "cancelled")
"""Ends of a process, the one that explains most first: a process whose peer is gone breaks, too."""


class RankFailed(RuntimeError):
    """One of the processes broke or was killed: the step is tried again as one that broke in a single process."""


@dataclass(frozen=True)
class Share:
    """What the process ``rank`` (from 0) of ``count`` does of each optimizer step."""

    rank: int = 0
    count: int = 1

    def rows(self, start: int, batch_size: int) -> slice:
        """Its windows of the ``batch_size`` from ``start`` on."""
        ends = [start + batch_size * rank // self.count for rank in (self.rank, self.rank + 1)]
        return slice(*ends)

    def summed(self, loss: float, parameters: Sequence[torch.nn.Parameter]) -> float:
        """The sum of all processes' ``loss``; gradients of ``parameters`` become their sums.

        One that no process has a gradient of keeps none, so that the optimizer leaves it alone as it would have.
        """
        if self.count == 1:
            return loss
        from accelerate.utils import reduce

        reached = [float(parameter.grad is not None) for parameter in parameters]
        figures = torch.tensor([loss, *reached], dtype=torch.float64, device=parameters[0].device)
        total, *reached = reduce(figures, "sum").tolist()
        learning = [parameter for parameter, times in zip(parameters, reached, strict=True) if times]
        for parameter in learning:
            own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = reduce(own, "sum")
        return float(total)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Share]:
    """This process's share, with the others ready to sum; the whole where it is alone."""
    if RENDEZVOUS not in os.environ:
        yield Share()
        return
    from accelerate import PartialState

    state = PartialState(
        cpu=device == "cpu",
        init_method=f"file://{os.environ[RENDEZVOUS]}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    yield Share(state.process_index, state.num_processes)
    state.destroy_process_group()  # not after an error: it would wait for processes that are gone


def processes(device: str, batch_size: int) -> int:
    """How many are to share a step: one for each GPU, and none without a window. 1 on a CPU or a GPU that was named."""
    if device != "cuda" or RENDEZVOUS in os.environ:
        return 1
    return max(1, min(batch_size, torch.cuda.device_count()))


def is_first() -> bool:
    """Whether this process is the one whose output counts: the first of those that share a step, or alone."""
    return RENDEZVOUS not in os.environ or os.environ["RANK"] == "0"


def in_processes(context: StepContext, count: int) -> StepOutput:
    """Compute the step of ``context`` in ``count`` processes that share it; what the first of them gives.

    What one refuses (:class:`CompressionError`), or that its disk is full, is raised here as if it had happened here;
    raises :class:`RankFailed` where one broke or was killed. None of them is left when this returns or raises, and
    they die with this process.
    """
    where = "GPUs" if context.device == "cuda" else "processes"
    context.log(f"the windows of each training step are divided over {count} {where}", "info")
    _let_go_of_gpu()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = _Ranks(context, count, os.path.join(folder, "rendezvous"))
        outcomes = ranks.run()
    for name, value in _measured(outcomes).items():
        context.measure(name, value)
    return StepOutput.from_bytes(context.store.read_bytes(outcomes[0].output))


class _Ranks:
    """The processes of one step, a thread for each that watches it: they die with their thread."""

    def __init__(self, context: StepContext, count: int, rendezvous: str) -> None:
        self._context = context
        self._count = count
        self._rendezvous = rendezvous
        self._deadline = math.inf
        self._ended: list[tuple[int, Outcome]] = []

    def run(self) -> list[Outcome]:
        """How each ended, if all did their part. Raises what the one raised that explains most."""
        with ThreadPoolExecutor(self._count, thread_name_prefix="rank") as pool:
            futures = [pool.submit(self._watched, rank) for rank in range(self._count)]
            try:
                outcomes = [future.result() for future in futures]
            finally:
                self._stop(0.0)  # also where this process is interrupted, or nobody hears its progress any more
        if not all(outcome.kind == "done" for outcome in outcomes):
            self._refuse()
        return outcomes

    def _watched(self, rank: int) -> Outcome:
        """One process from its start to its end. When it fails, the others soon end, too."""
        context = self._context
        command = child_command(
            context.store.address, context.import_roots, context.device, cache=str(context.store.root)
        )
        launcher = Launcher(command, self._environment(rank))
        hear = self._heard if rank == 0 else lambda event: None
        outcome = None
        try:
            outcome = launcher.run(context.spec, on_event=hear, tick=lambda: time.monotonic() >= self._deadline)
            self._ended.append((rank, outcome))
            return outcome
        finally:
            if outcome is None or outcome.kind != "done":
                self._stop(PATIENCE)
            launcher.close()

    def _stop(self, patience: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + patience)

    def _environment(self, rank: int) -> dict[str, str]:
        """This process's own, with what Accelerate reads; a process sees its own GPU alone."""
        found = dict(os.environ) | {
            RENDEZVOUS: self._rendezvous,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._count),
            "LOCAL_WORLD_SIZE": str(self._count),
            "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self._count)),
        }
        if self._context.device == "cuda":
            visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
            found["CUDA_VISIBLE_DEVICES"] = visible[rank] if visible else str(rank)
        return found

    def _heard(self, event: Json) -> None:
        """What the first process says goes to whoever watches this one."""
        if event["type"] == "progress":
            self._context.progress(event["done"], event["total"], event["unit"])
        elif event["type"] == "log":
            self._context.log(event["text"], event["level"])

    def _refuse(self) -> None:
        """Raise what happened in the process that failed, the first of those that explain most."""
        rank, outcome = min(self._ended, key=lambda end: GRAVITY.index(end[1].kind) if end[1].kind != "done" else 99)
        if outcome.kind == "failed":
            raise CompressionError(outcome.code, outcome.message)
        if outcome.kind == "damaged":
            raise DamagedInputs(list(outcome.inputs))
        if outcome.kind == "blocked":
            raise NoRoom(outcome.message)
        if outcome.code == STORE_AWAY:
            raise StoreAway(errno.EIO, outcome.message)
        raise RankFailed(
            f"process {rank + 1} of {self._count} that shared the training step: {outcome.message}\n{outcome.detail}"
        )


def _measured(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The first process's figures; memory is what all took together, and on a GPU what one took at most."""
    found = {name: value for name, value in outcomes[0].measured.items() if name != "seconds"}
    for name, together in (("peak_memory_bytes", sum), ("gpu_peak_memory_bytes", max)):
        if values := [outcome.measured[name] for outcome in outcomes if name in outcome.measured]:
            found[name] = together(values)
    return found


def _let_go_of_gpu() -> None:
    """Give back the memory that earlier steps of this process left cached on the first GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
