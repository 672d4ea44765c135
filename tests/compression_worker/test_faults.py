"""Failpoints: armed by an environment variable, fired once at the passing that was asked for."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from compression_worker import faults
from compression_worker.faults import POINTS, Armed, FaultInjected, arm, armed_from, failpoint

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("compression_worker", "dashboard")


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    arm()


def test_unarmed_nothing_happens() -> None:
    for name in POINTS:
        failpoint(name)


def test_it_fires_at_the_passing_that_was_asked_for_and_only_there() -> None:
    arm(Armed("store.half", 2, "raise", ""))
    failpoint("store.half")
    failpoint("store.open")
    with pytest.raises(FaultInjected):
        failpoint("store.half")
    failpoint("store.half")


def test_several_places_are_counted_apart(tmp_path: Path) -> None:
    given = {"FAULT": "store.half:2:raise,store.open:1:enospc"}
    for environment in (given, given | {"FAULT_LEDGER": str(tmp_path / "ledger")}):
        arm(*armed_from(environment))
        failpoint("store.half")
        with pytest.raises(OSError, match="No space left"):
            failpoint("store.open")
        with pytest.raises(FaultInjected):
            failpoint("store.half")
        failpoint("store.open")
        failpoint("store.half")


def test_processes_that_share_a_ledger_count_together_and_fire_once(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    code = "from compression_worker.faults import failpoint; failpoint('store.half'); failpoint('store.half')"
    environment = {"FAULT": "store.half:3:kill", "FAULT_LEDGER": str(ledger), "PYTHONPATH": str(ROOT)}
    statuses = [
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False).returncode
        for _ in range(3)
    ]
    assert statuses == [0, -signal.SIGKILL, 0]
    assert re.findall(r"fired (\S+) (\S+)", ledger.read_text()) == [("store.half", "kill")]


def test_a_full_disk_is_what_the_system_says_of_it() -> None:
    arm(Armed("store.half", 1, "enospc", ""))
    with pytest.raises(OSError, match="No space left") as caught:
        failpoint("store.half")
    assert caught.value.errno == errno.ENOSPC


def test_a_stopped_process_goes_on_after_its_time() -> None:
    code = "from compression_worker.faults import failpoint; failpoint('store.half'); print('went on')"
    environment = {"FAULT": "store.half:1:stop", "FAULT_STOP_SECONDS": "0.3", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, capture_output=True)
    assert done.stdout == b"went on\n"


def test_the_database_is_lost_by_whoever_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[bool] = []
    monkeypatch.setattr(faults, "drop_database", lambda: lost.append(True))
    arm(Armed("store.half", 1, "drop_db", ""))
    failpoint("store.half")
    assert lost == [True]


@pytest.mark.parametrize(
    "given",
    [
        "nowhere:1:kill",
        "store.half:x:kill",
        "store.half:1:explode",
        "store.half",
        "store.half:1:kill,store.open",
        "store.half:1:kill,store.half:2:kill",
    ],
)
def test_a_wrong_fault_is_refused_with_what_is_wanted(given: str) -> None:
    with pytest.raises(ValueError, match="want name:n:action"):
        armed_from({"FAULT": given})


def test_every_place_that_is_named_stands_exactly_once_in_the_code() -> None:
    found = Counter(
        name
        for folder in PRODUCT
        for path in (ROOT / folder).rglob("*.py")
        for name in re.findall(r'failpoint\("([^"]+)"\)', path.read_text())
    )
    assert set(found) == set(POINTS)
    assert {name for name, times in found.items() if times > 1} == set()
