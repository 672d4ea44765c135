"""The launcher against a real child: every way a step can end, and that nothing of a child outlives its parent."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compression_worker.contracts import Json, StepOutput, StepSpec
from compression_worker.launcher import Launcher, Outcome, child_command, child_environment
from compression_worker.store import Store

PROJECT = Path(__file__).parents[2]
START = "import sys; from tests.compression_worker.child import main; main(sys.argv[1])"


@pytest.fixture(name="store")
def fixture_store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(name="launcher")
def fixture_launcher(store: Store) -> Iterator[Launcher]:
    launcher = make_launcher(store)
    yield launcher
    launcher.close()


def make_launcher(store: Store, memory_limit_mb: int = 0) -> Launcher:
    env = child_environment(os.environ) | {"PYTHONPATH": str(PROJECT)}
    return Launcher([sys.executable, "-c", START, str(store.root)], env, memory_limit_mb)


def run(launcher: Launcher, kind: str, *, cached: str = "", seed: int = 0, **params: object) -> Outcome:
    return launcher.run(StepSpec(kind=f"test.{kind}", params=params, seed=seed), cached=cached)


def gone(pid: int) -> bool:
    """No such process, or one that only waits to be collected by its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(what: Callable[[], bool], seconds: float) -> float:
    """Seconds until ``what`` holds; fails the test after ``seconds``."""
    started = time.monotonic()
    while not what():
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - started


def test_a_done_step_hands_over_its_output_and_its_events(launcher: Launcher, store: Store) -> None:
    events: list[Json] = []
    outcome = launcher.run(StepSpec(kind="test.echo", seed=7), on_event=events.append)
    assert (outcome.kind, outcome.data["seed"], outcome.reused) == ("done", 7, False)
    assert outcome.measured["rounds_per_second"] == 3.0
    assert outcome.measured["seconds"] >= 0
    output = StepOutput.from_bytes(store.read_bytes(outcome.output))
    assert store.read_bytes(output.blobs["blob"]) == b"seed 7"
    progress = [event for event in events if event["type"] == "progress"]
    assert (progress[0]["done"], progress[-1]) == (1, {"type": "progress", "done": 3, "total": 3, "unit": "rounds"})
    assert {"type": "log", "level": "info", "text": "half way"} in events


def test_a_plan_hands_over_its_steps(launcher: Launcher) -> None:
    outcome = run(launcher, "plan")
    assert [(step["name"], step["group"]) for step in outcome.steps] == [
        ("echo 1", "echo"),
        ("echo 2", "echo"),
        ("join", "join"),
    ]
    assert outcome.steps[2]["inputs"] == {"first": "@0", "second": "@1"}


def test_the_child_stays_warm_while_the_answers_are_sound(launcher: Launcher) -> None:
    pids = [run(launcher, "where").data["pid"]]
    for kind in ("refuse", "full_disk"):
        run(launcher, kind)
        pids.append(run(launcher, "where").data["pid"])
    assert len(set(pids)) == 1
    assert launcher.pid == pids[0]


def test_a_step_that_says_no_is_failed(launcher: Launcher) -> None:
    outcome = run(launcher, "refuse")
    assert (outcome.kind, outcome.code, outcome.message) == (
        "failed",
        "shape_mismatch",
        "the base is of another shape",
    )


@pytest.mark.parametrize("kind", ["full_disk", "no_space"])
def test_a_full_disk_blocks(launcher: Launcher, kind: str) -> None:
    outcome = run(launcher, kind)
    assert (outcome.kind, outcome.code) == ("blocked", "disk")
    assert "space left" in outcome.message


def test_broken_code_is_errored_with_its_traceback_and_gets_a_fresh_child(launcher: Launcher) -> None:
    before = run(launcher, "where").data["pid"]
    outcome = run(launcher, "broken")
    assert outcome.kind == "errored"
    assert outcome.message.startswith("ZeroDivisionError")
    assert "1 // int(" in outcome.detail
    assert gone(before)
    assert run(launcher, "where").data["pid"] != before


def test_a_figure_that_is_no_number_is_errored(launcher: Launcher) -> None:
    assert run(launcher, "not_a_number").kind == "errored"


def test_an_unknown_step_is_errored_and_says_what_to_do(launcher: Launcher) -> None:
    outcome = run(launcher, "of_the_future")
    assert outcome.kind == "errored"
    assert "upgrade" in outcome.message


def test_a_killed_child_is_reported_with_its_signal_and_last_words(launcher: Launcher) -> None:
    outcome = run(launcher, "killed")
    assert (outcome.kind, outcome.signal) == ("killed", signal.SIGKILL)
    assert "last words" in outcome.detail
    assert run(launcher, "echo").kind == "done"


def test_a_child_killed_from_outside_while_it_works_is_killed(launcher: Launcher) -> None:
    run(launcher, "where")
    ticks: list[int] = []

    def tick() -> bool:
        ticks.append(1)
        if len(ticks) == 2:
            os.kill(launcher.pid, signal.SIGKILL)
        return False

    outcome = launcher.run(StepSpec(kind="test.hang"), tick=tick)
    assert (outcome.kind, outcome.signal) == ("killed", signal.SIGKILL)


def test_a_child_that_died_between_two_steps_is_replaced(launcher: Launcher) -> None:
    run(launcher, "where")
    before = launcher.pid
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: gone(before), 2)
    assert run(launcher, "echo").kind == "done"
    assert launcher.pid != before


def test_a_child_that_leaves_without_an_answer_is_errored(launcher: Launcher) -> None:
    outcome = run(launcher, "leave")
    assert outcome.kind == "errored"
    assert "exit status 3" in outcome.message


def test_garbage_on_the_protocol_is_errored_and_ends_the_child(launcher: Launcher) -> None:
    outcome = run(launcher, "garbage")
    assert outcome.kind == "errored"
    assert "what is this" in outcome.detail
    assert launcher.pid == 0


def test_a_tick_kills_a_hanging_step_and_all_it_started(launcher: Launcher, tmp_path: Path) -> None:
    note = tmp_path / "note"
    spec = StepSpec(kind="test.hang", params={"note": str(note)})
    asked: list[float] = []

    def tick() -> bool:
        if note.exists() and note.read_text():
            asked.append(time.monotonic())
        return bool(asked)

    outcome = launcher.run(spec, tick=tick)
    assert outcome.kind == "cancelled"
    assert time.monotonic() - asked[0] < 2
    child, beside = map(int, note.read_text().split())
    wait_for(lambda: gone(child) and gone(beside), 2)


def test_ticks_come_each_second_also_under_a_flood_of_events(launcher: Launcher) -> None:
    run(launcher, "where")
    times: list[float] = []

    def tick() -> bool:
        times.append(time.monotonic())
        return len(times) > 4

    assert launcher.run(StepSpec(kind="test.flood"), tick=tick).kind == "cancelled"
    assert max(after - before for before, after in itertools.pairwise(times)) < 1


def test_an_exception_of_the_watcher_ends_the_child(launcher: Launcher) -> None:
    run(launcher, "where")
    before = launcher.pid

    def lost() -> bool:
        raise RuntimeError("the lease is lost")

    with pytest.raises(RuntimeError, match="lease"):
        launcher.run(StepSpec(kind="test.hang"), tick=lost)
    assert gone(before)


def test_long_lines_go_both_ways(launcher: Launcher) -> None:
    outcome = run(launcher, "big", bytes=10, padding="p" * 1_000_000)
    assert (outcome.kind, len(outcome.data["text"])) == ("done", 300_000)


def test_the_child_dies_with_its_parent(store: Store, tmp_path: Path) -> None:
    note = tmp_path / "note"
    program = (
        "import os, sys; from compression_worker.launcher import Launcher; from compression_worker.contracts import StepSpec\n"
        f"launcher = Launcher([sys.executable, '-c', {START!r}, {str(store.root)!r}], dict(os.environ))\n"
        f"launcher.run(StepSpec(kind='test.hang', params={{'note': {str(note)!r}}}))\n"
    )
    env = child_environment(os.environ) | {"PYTHONPATH": str(PROJECT)}
    parent = subprocess.Popen([sys.executable, "-c", program], env=env)
    wait_for(lambda: note.exists() and " " in note.read_text(), 30)
    child, beside = map(int, note.read_text().split())
    try:
        parent.kill()
        parent.wait()
        assert wait_for(lambda: gone(child), 5) < 2
    finally:
        os.kill(beside, signal.SIGKILL)


def test_a_step_over_the_memory_limit_is_errored_and_the_next_one_runs(store: Store) -> None:
    launcher = make_launcher(store, memory_limit_mb=1500)
    try:
        outcome = run(launcher, "big", bytes=2 << 30)
        assert outcome.kind == "errored"
        assert "memory" in outcome.message
        assert run(launcher, "big", bytes=1 << 20).kind == "done"
    finally:
        launcher.close()


def test_an_earlier_output_is_reused_only_while_every_byte_verifies(launcher: Launcher, store: Store) -> None:
    first = run(launcher, "echo", seed=3)
    again = run(launcher, "echo", seed=3, cached=first.output)
    assert (again.reused, again.output, again.data) == (True, first.output, first.data)
    blob = store.path(StepOutput.from_bytes(store.read_bytes(first.output)).blobs["blob"])
    blob.chmod(0o644)
    blob.write_bytes(b"seed 4")
    events: list[Json] = []
    repaired = launcher.run(StepSpec(kind="test.echo", seed=3), cached=first.output, on_event=events.append)
    assert (repaired.reused, repaired.output) == (False, first.output)
    assert any("cannot reuse" in event.get("text", "") for event in events)
    assert blob.read_bytes() == b"seed 3"


def test_close_ends_the_child_and_a_later_run_starts_one(launcher: Launcher) -> None:
    run(launcher, "where")
    before = launcher.pid
    launcher.close()
    assert gone(before)
    assert run(launcher, "echo").kind == "done"


def test_a_child_sees_no_password_and_stays_offline() -> None:
    env = child_environment(
        {"PATH": "/bin", "DATABASE_URL": "postgres://", "SECRET_KEY": "x", "DELTAWORKS_SERVER_DSN": "x", "LC_ALL": "C"}
    )
    assert set(env) == {
        "PATH",
        "LC_ALL",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "TOKENIZERS_PARALLELISM",
        "PYTHONUNBUFFERED",
    }


def test_the_command_of_a_child_names_store_roots_and_device(tmp_path: Path) -> None:
    command = child_command(tmp_path, {"demo": tmp_path / "demo"}, "cpu")
    assert command[1:] == [
        *("-m", "compression_worker", "step", "--store", str(tmp_path), "--device", "cpu"),
        *("--import-root", f"demo={tmp_path / 'demo'}"),
    ]


def test_launching_needs_no_torch() -> None:
    program = (
        "import sys; import compression_worker.launcher, compression_worker.runner; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False).returncode == 0
