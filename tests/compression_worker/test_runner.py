"""Running steps in this process: whole plans, their inputs, reuse, and the same bytes each time."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compression_worker import catalog, runner
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepSpec
from compression_worker.launcher import Launcher, child_environment
from compression_worker.runner import Runner, resolve_inputs, run_plan, serve_lines
from compression_worker.store import Store
from tests.compression_worker.child import KINDS
from tests.tiny import make_tiny_pair

PROJECT = Path(__file__).parents[2]


@pytest.fixture(name="store")
def fixture_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def _step_kinds_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "STEPS", catalog.STEPS | KINDS)
    monkeypatch.setattr(runner, "TORCH_FREE", frozenset({*runner.TORCH_FREE, *KINDS}))


def test_a_plan_runs_to_its_last_step_and_names_each(store: Store) -> None:
    events: list[Json] = []
    output = run_plan(store, PlannedStep(name="plan", kind="test.plan"), events.append)
    assert output.data == {"first": 1, "second": 2}
    steps = [event for event in events if event["type"] == "step"]
    assert [(step["name"], step["group"], step["index"], step["total"]) for step in steps] == [
        ("echo 1", "echo", 0, 3),
        ("echo 2", "echo", 1, 3),
        ("join", "join", 2, 3),
    ]
    assert {"type": "progress", "done": 3, "total": 3, "unit": "rounds"} in events


def test_a_plan_without_steps_is_its_own_result(store: Store) -> None:
    assert run_plan(store, StepSpec(kind="test.echo", seed=5)).data["seed"] == 5


def test_a_plan_raises_what_its_step_refuses(store: Store) -> None:
    with pytest.raises(CompressionError, match="another shape"):
        run_plan(store, StepSpec(kind="test.refuse"))


def test_inputs_count_the_steps_of_the_plan_from_zero() -> None:
    digest = "d" * 64
    assert resolve_inputs({"a": "@0", "b": digest, "c": "@11"}, [str(n) for n in range(12)]) == {
        "a": "0",
        "b": digest,
        "c": "11",
    }


def test_progress_is_thinned_but_its_end_always_comes(store: Store) -> None:
    events: list[Json] = []
    report = runner._Progress(events.append)
    for done in range(1, 10_001):
        report(done, 10_000, "bytes")
    assert len(events) < 50
    assert (events[0]["done"], events[-1]["done"]) == (1, 10_000)


def test_a_line_that_cannot_be_read_is_answered_and_the_next_one_runs(store: Store) -> None:
    good = json.dumps({"spec": StepSpec(kind="test.echo").to_json(), "cached": ""}).encode()
    answers = io.BytesIO()
    serve_lines(Runner(store=store, device="cpu"), [b"{", b"[]", b'{"spec": {}}', good], answers)
    kinds = [json.loads(line)["type"] for line in answers.getvalue().splitlines()]
    assert kinds[:3] == ["errored"] * 3
    assert kinds[-1] == "result"


def test_the_same_step_leaves_the_same_output_wherever_it_runs(tmp_path: Path) -> None:
    make_tiny_pair(tmp_path / "imports", shards=2)
    spec = StepSpec(kind="checkpoint.import", params={"root": "demo", "folder": "base", "licence": "MIT"})
    roots = {"demo": tmp_path / "imports"}
    here, _, _ = Runner(store=Store(tmp_path / "one"), import_roots=roots, device="cpu").compute(
        spec, lambda event: None
    )
    program = "import sys, pathlib; from compression_worker.runner import run_child; run_child(pathlib.Path(sys.argv[1]), {'demo': pathlib.Path(sys.argv[2])}, 'cpu')"
    env = child_environment(os.environ) | {"PYTHONPATH": str(PROJECT)}
    launcher = Launcher([sys.executable, "-c", program, str(tmp_path / "two"), str(roots["demo"])], env)
    try:
        events: list[Json] = []
        outcome = launcher.run(spec, on_event=events.append)
    finally:
        launcher.close()
    assert (outcome.kind, outcome.output) == ("done", here)
    assert events[-2]["unit"] == "bytes"


def test_torch_computes_with_a_fixed_number_of_threads_and_deterministically() -> None:
    program = (
        "import torch; from compression_worker.runner import prepare_torch, resolve_device; prepare_torch()\n"
        "print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), resolve_device('auto'))"
    )
    env = child_environment(os.environ) | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "3"}
    shown = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    import torch

    assert shown.split() == ["3", "True", "cuda" if torch.cuda.is_available() else "cpu"]
