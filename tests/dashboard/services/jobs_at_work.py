"""A job whose steps do what a test says, and an execution whose child obeys them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from compression_worker.contracts import PlannedStep
from compression_worker.launcher import Launcher
from dashboard.execution import Execution
from dashboard.lifecycle import JobKind, Role
from dashboard.models import Job
from dashboard.services.ordering import job_order
from tests.dashboard.world import digest, pair, person

CHILD = Path(__file__).with_name("scripted_child.py")
RESULT = {
    "artifact": digest("an artifact"),
    "name_hint": "bitdelta",
    "method": "bitdelta",
    "config": {},
    "source_bytes": 1_000,
    "artifact_bytes": 100,
    "nominal_ratio": 16.0,
    "true_ratio": 10.0,
    "bits_per_weight": 1.0,
    "ledger": [{"name": "codes", "bytes": 100}],
    "figures": {},
}


def artifact_result() -> dict[str, Any]:
    """What a compression of the pair would say at its end."""
    base, variant = pair()
    return RESULT | {"base_fingerprint": base.fingerprint, "variant_fingerprint": variant.fingerprint}


def step(act: str, *, inputs: dict[str, str] | None = None, **params: Any) -> dict[str, Any]:
    """A planned step of the scripted child."""
    name = params.pop("name", act)
    return PlannedStep(
        name=name, kind=f"scripted.{name}", group="layer", params={"act": act} | params, inputs=inputs or {}
    ).to_json()


def ordered(*steps: dict[str, Any], priority: int = 0, title: str = "scripted", starts: Path | None = None) -> Job:
    """A queued compression whose plan asks for ``steps``; the last one gives the result."""
    noted = {"starts": str(starts)} if starts else {}
    planned = [value | {"params": value["params"] | noted} for value in steps]
    if planned:
        planned[-1] = planned[-1] | {"params": {"data": artifact_result()} | planned[-1]["params"]}
    first = step("plan", steps=planned, data={} if planned else artifact_result(), **noted)
    return job_order(
        actor=person(Role.ENGINEER),
        kind=JobKind.COMPRESS,
        title=title,
        spec={"config": {}},
        first=PlannedStep(**first),
        variant=pair()[1],
        method="bitdelta",
        priority=priority,
    )


def execution(name: str = "worker-1") -> Execution:
    """A worker process whose child is the scripted one."""
    return Execution(name=name, queues=["cpu"], launcher=Launcher([sys.executable, str(CHILD)]))
