"""The sweep, the soak and the planted bugs in their short forms; `make sweep`, `make soak` and `make mutants` are whole."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compression_worker.faults import ACTIONS, POINTS
from tests.reliability.mutants import MUTANTS, OF_A_TEST_RUN
from tests.reliability.sweep import TOGETHER, plan, short_plan

ROOT = Path(__file__).resolve().parents[2]
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")


def last_line(module: str, *arguments: str, seconds: float) -> str:
    """Run a module of this folder in an environment of its own; it has to end well."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_TEST_RUN}
    command = [sys.executable, "-m", f"tests.reliability.{module}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout.splitlines()[-1]


def test_each_failpoint_is_passed_and_nothing_is_lost_doubled_or_wrong() -> None:
    words = last_line("sweep", "--short", seconds=1800)
    assert len(POINTS) >= 60
    runs = -(-len(POINTS) // TOGETHER)
    assert f"{runs} runs, {len(POINTS)} fired, 0 places not passed [], 0 problems" in words
    assert re.search(r"at most [01] steps redone a fault", words)


def test_the_turns_of_the_short_sweep_inject_each_action_at_each_place_and_no_two_alike_in_a_run() -> None:
    points, actions = list(POINTS), list(ACTIONS)
    runs = [run.split(",") for turn in range(len(actions)) for run in short_plan(points, actions, 1, turn)]
    assert sorted(fault for run in runs for fault in run) == sorted(plan(points, actions, 1))
    assert all(len({fault.rpartition(":")[2] for fault in run}) == len(run) <= TOGETHER for run in runs)


@pytest.mark.parametrize("broker", ["redis", "rabbitmq"])
def test_a_storm_of_faults_loses_and_doubles_nothing(broker: str) -> None:
    if broker == "rabbitmq" and not RABBITMQ.exists():
        pytest.skip("rabbitmq-server is not installed: make brokers")
    words = last_line("soak", "--seeds", "1", "--faults", "100", "--jobs", "30", "--broker", broker, seconds=900)
    assert re.search(r"1 seeds, 100 faults, \d+ jobs", words)
    assert words.endswith("0 problems")


def test_every_planted_bug_is_caught_by_the_test_that_is_named_for_it() -> None:
    words = last_line("mutants", seconds=1800)
    assert len(MUTANTS) == 20
    assert "20 of 20 caught" in words
