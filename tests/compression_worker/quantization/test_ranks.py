"""Training steps that processes share: the same losses and factors as one process, and none of them is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from compression_worker import catalog, runner
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput, StepSpec
from compression_worker.methods.deltallm.training import COUNT, FIRST, SECOND, STATE_FILE
from compression_worker.quantization.ranks import RENDEZVOUS, RankFailed, Share, in_processes, processes
from compression_worker.store import Store
from tests.compression_worker.methods.sharing import LEARNING, QUICK, Job, six_layers

PROJECT = Path(__file__).parents[3]
UNEVEN: Json = {**QUICK, **LEARNING, "tokens": 240, "batch_size": 3, "delta_dtype": "float32"}
"""Five optimizer steps on three windows each: one process takes one of them, the other two. Factors are compared as they
learned: rounded to 16 bits, a difference far below the tolerance becomes a whole unit in the last place of a few."""
INT21: Json = {
    **{"tokens": 128, "window_tokens": 16, "batch_size": 2, "held_out": 2, "samples": 4, "length": 32, "rank": 4},
    **{"teacher_logits": 16, "learning_rate": 1e-3, "adapter_dtype": "float32"},
}
STARTED_BY = "TESTED_BY"
KILLED_WHILE = """
import json, sys
from compression_worker.contracts import StepSpec
from compression_worker.quantization.ranks import in_processes
from compression_worker.store import Store
from tests.compression_worker.quantization.test_ranks import silent
spec = StepSpec.from_json(json.loads(sys.argv[2]))
spoken = lambda done, total, unit: print("progress", flush=True)
in_processes(silent(Store(sys.argv[1]), spec, progress=spoken), 2)
"""


def silent(store: Store, spec: StepSpec, **heard: Callable[..., None]) -> StepContext:
    nothing: dict[str, Callable[..., None]] = dict.fromkeys(("progress", "log", "measure"), lambda *words: None)
    return StepContext(store=store, spec=spec, **nothing | heard)


@dataclass
class Heard:
    """What a step says to whoever watches."""

    logs: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def context(self, job: Job, spec: StepSpec) -> StepContext:
        return silent(
            job.store,
            spec,
            progress=lambda done, total, unit: self.steps.append(done),
            log=lambda text, level: self.logs.append(text),
            measure=lambda name, value: self.figures.update({name: value}),
        )


@pytest.fixture(autouse=True)
def fixture_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STARTED_BY, str(os.getpid()))


@pytest.fixture(scope="module", name="job")
def fixture_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return six_layers(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", name="sharing")
def fixture_sharing(job: Job) -> StepSpec:
    return first_training(job, "deltallm", UNEVEN)


def first_training(job: Job, method: str, config: Json) -> StepSpec:
    """The first step of a job in which something learns, all before it being done."""
    plan = StepSpec(kind=f"{method}.plan", params={"config": config}, inputs=job.inputs, seed=3)
    computing = runner.Runner(store=job.store, device="cpu")
    digests: list[str] = []
    for step in computing.compute(plan, lambda event: None)[1].steps:
        inputs = runner.resolve_inputs(step.inputs, digests)
        spec = StepSpec(kind=step.kind, params=step.params, inputs=inputs, seed=step.seed)
        if step.kind == f"{method}.train":
            return spec
        digests.append(computing.compute(spec, lambda event: None)[0])
    raise AssertionError("nothing learns")


def state_of(job: Job, output: StepOutput) -> dict[str, torch.Tensor]:
    return load_file(job.store.path(output.blobs[STATE_FILE]))


def left() -> list[int]:
    """Processes that share a step and come from this one, which others of its kind may run beside."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            if f"{RENDEZVOUS}=".encode() in environment and f"{STARTED_BY}={os.getpid()}\0".encode() in environment:
                found.append(int(process.name))
        except OSError:
            continue
    return found


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(line for line in environment if line.startswith(b"RANK=")).removeprefix(b"RANK="))


def compare(job: Job, spec: StepSpec) -> StepOutput:
    """A step in one process and in two: the same losses and factors, each trained as often. The output of two."""
    alone, both = Heard(), Heard()
    one = catalog.step_function(spec.kind)(alone.context(job, spec))
    two = in_processes(both.context(job, spec), 2)
    assert left() == []
    assert len(two.data["losses"]) == spec.params["last"] - spec.params["first"]
    assert two.data["losses"] == pytest.approx(one.data["losses"], rel=1e-4)
    assert two.data["curve"][-1]["kl"] == pytest.approx(one.data["curve"][-1]["kl"], rel=1e-4)
    ours, theirs = state_of(job, one), state_of(job, two)
    # AdamW divides by the size of a gradient: where that is 1e-8, rounding moves a factor by some 1e-4 of a step.
    of_a_step = 1e-3 * spec.params["config"]["learning_rate"]
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        atol = 1e-7 if name.endswith((FIRST, SECOND, COUNT)) else of_a_step
        torch.testing.assert_close(
            theirs[name], tensor, rtol=1e-4, atol=atol, msg=lambda text, at=name: f"{at}: {text}"
        )
    assert not any("divided" in line for line in alone.logs)
    assert both.logs[0] == "the windows of each training step are divided over 2 processes"
    assert len(both.logs) == 1 + len(alone.logs), "the first process alone is heard"
    assert both.steps[-1] == alone.steps[-1]
    assert both.figures.keys() == alone.figures.keys() | {"peak_memory_bytes"}
    return two


def test_factors_learn_as_in_one_process_also_from_batches_that_do_not_divide(job: Job, sharing: StepSpec) -> None:
    state = state_of(job, compare(job, sharing))
    counts = [int(count) for name, count in state.items() if name.endswith(COUNT)]
    assert 0 < min(counts) < 5, "modules were replaced one by one: with other draws the losses would be others"


def test_adapters_of_int21_learn_as_in_one_process(job: Job) -> None:
    compare(job, first_training(job, "int21", INT21))


@pytest.mark.parametrize(("start", "batch_size", "count"), [(0, 8, 2), (6, 3, 2), (8, 8, 3), (0, 5, 5), (4, 4, 1)])
def test_every_window_is_one_processes_and_none_is_idle(start: int, batch_size: int, count: int) -> None:
    shares = [Share(rank, count).rows(start, batch_size) for rank in range(count)]
    assert [row for rows in shares for row in range(rows.start, rows.stop)] == [*range(start, start + batch_size)]
    sizes = [rows.stop - rows.start for rows in shares]
    assert min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("device", "batch_size", "gpus", "count"),
    [("cpu", 8, 4, 1), ("cuda", 8, 4, 4), ("cuda", 2, 4, 2), ("cuda", 8, 1, 1), ("cuda", 8, 0, 1), ("cuda:1", 8, 4, 1)],
)
def test_there_is_a_process_for_each_gpu_and_none_without_a_window(
    monkeypatch: pytest.MonkeyPatch, device: str, batch_size: int, gpus: int, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert processes(device, batch_size) == count
    monkeypatch.setenv(RENDEZVOUS, "/a/file")
    assert processes(device, batch_size) == 1, "a process that shares a step does not share its share"


def test_one_that_breaks_ends_the_step_and_all_others(
    job: Job, sharing: StepSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAULT", "child.compute:2:raise")
    monkeypatch.setenv("FAULT_LEDGER", str(tmp_path / "ledger"))
    with pytest.raises(RankFailed, match=r"process [12] of 2 that shared the training step: FaultInjected"):
        in_processes(silent(job.store, sharing), 2)
    assert left() == []
    assert (tmp_path / "ledger").read_text().count("fired") == 1


def test_one_that_is_killed_ends_the_step_and_all_others(job: Job, sharing: StepSpec) -> None:
    def kill_the_second(done: int, total: int, unit: str) -> None:
        for pid in left():
            if rank_of(pid) == 1:
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(RankFailed, match=r"process 2 of 2 that shared the training step: .*signal 9"):
        in_processes(silent(job.store, sharing, progress=kill_the_second), 2)
    assert left() == []


def test_what_one_refuses_the_step_refuses(job: Job, sharing: StepSpec) -> None:
    before = catalog.step_function(sharing.kind)(silent(job.store, sharing))
    grown = {name: tensor * 1e30 for name, tensor in state_of(job, before).items()}
    output = StepOutput(blobs={STATE_FILE: job.store.write_bytes(save(grown))}, data=before.data)
    inputs = {**sharing.inputs, "previous": job.store.write_bytes(output.to_bytes())}
    spec = StepSpec(kind=sharing.kind, params=sharing.params, inputs=inputs, seed=sharing.seed)
    with pytest.raises(CompressionError, match="lower learning_rate") as refused:
        in_processes(silent(job.store, spec), 2)
    assert refused.value.code == "diverged"
    assert left() == []


def test_nobody_hearing_the_progress_ends_them_all(job: Job, sharing: StepSpec) -> None:
    def gone(done: int, total: int, unit: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        in_processes(silent(job.store, sharing, progress=gone), 2)
    assert left() == []


def test_they_die_with_the_process_that_started_them(job: Job, sharing: StepSpec) -> None:
    command = [sys.executable, "-c", KILLED_WHILE, str(job.store.root), json.dumps(sharing.to_json())]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=PROJECT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"progress\n"
        assert len(left()) == 2
        parent.kill()
    until = time.monotonic() + 5
    while left() and time.monotonic() < until:
        time.sleep(0.05)
    assert left() == []
