"""Drives a running stack from outside its processes: one JSON request a line in, one JSON answer a line out.

It is a Django process with the stack's own settings, so that a test (whose Django has the test database) can ask
services of the real stack and read its rows. A database that was just killed is asked again for a while.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "dashboard.settings")
django.setup()

from django.db import Error, close_old_connections, connection  # noqa: E402

from dashboard.lifecycle import Role  # noqa: E402
from dashboard.models import (  # noqa: E402
    Approval,
    Artifact,
    Attempt,
    Checkpoint,
    Environment,
    Evaluation,
    Job,
    RollbackCertificate,
    SampleSet,
    ServerReport,
    User,
)
from dashboard.services import accounts, evaluations, jobs, registry, releases  # noqa: E402

SETS = Path(__file__).resolve().parent.parent / "deploy" / "demo" / "sets"
PATIENCE_SECONDS = 60


def people(password: str) -> dict[str, str]:
    """One person of each role, named after it."""
    for role in Role:
        accounts.user_create(actor=None, username=role.value, password=password, role=role.value)
    return {role.value: password for role in Role}


def rooms() -> None:
    """Two environments, and a policy that a compressed model of moderate quality passes."""
    for name in ("staging", "production"):
        releases.environment_create(actor=None, name=name, alias=f"model-{name}")
    rules = [{"check": "true_ratio", "limit": 1.1, "severity": "block"}]
    releases.policy_create(actor=None, rules=rules)


def sample_set(name: str, kind: str) -> int:
    data = (SETS / f"{name}.jsonl").read_bytes()
    return evaluations.sample_set_create(actor=_person("engineer"), name=name, kind=kind, data=data).pk


def sets() -> list[str]:
    return list(SampleSet.objects.values_list("name", flat=True))


def import_checkpoint(folder: str, name: str, base: int | None = None) -> int:
    above = Checkpoint.objects.get(pk=base) if base else None
    return registry.checkpoint_import(
        actor=_person("engineer"), root="demo", folder=folder, name=name, base=above, licence="Apache-2.0"
    ).pk


def compress(variant: int, config: dict[str, Any], calibration: int) -> int:
    return jobs.compression_create(
        actor=_person("engineer"),
        method="bitdelta",
        variant=Checkpoint.objects.get(pk=variant),
        config=config,
        calibration=SampleSet.objects.get(pk=calibration),
    ).pk


def evaluate(artifact: int, text: int) -> int:
    made = Artifact.objects.get(pk=artifact)
    return evaluations.evaluation_create(
        actor=_person("engineer"), variant=made.variant, artifact=made, text_set=SampleSet.objects.get(pk=text)
    ).pk


def ask(artifact: int) -> int:
    made = Artifact.objects.get(pk=artifact)
    evaluation = Evaluation.objects.filter(artifact=made).latest("pk")
    return releases.approval_request(actor=_person("engineer"), artifact=made, evaluation=evaluation).pk


def approve(approval: int) -> None:
    row = Approval.objects.get(pk=approval)
    releases.approval_decide(actor=_person("manager"), approval=row, approve=True, reason="looks good")


def deploy(artifact: int, approval: int) -> int:
    environment = Environment.objects.get(name="production")
    return releases.deployment_create(
        actor=_person("ops"),
        environment=environment,
        artifact=Artifact.objects.get(pk=artifact),
        approval=Approval.objects.get(pk=approval),
        reason="a test",
        seen_generation=environment.generation,
    ).generation


def roll_back() -> int:
    environment = Environment.objects.get(name="production")
    return releases.rollback(
        actor=_person("ops"), environment=environment, reason="a test", seen_generation=environment.generation
    ).generation


def job(pk: int) -> dict[str, Any]:
    """How a job stands, and what it published."""
    row = Job.objects.get(pk=pk)
    artifact = Artifact.objects.filter(job=row).first()
    return {
        "state": row.state,
        "error": row.error,
        "steps": row.steps.count(),
        "done": row.steps.filter(state="done").count(),
        "running": list(row.steps.filter(state="running").values_list("name", flat=True)),
        "outcomes": list(Attempt.objects.filter(step__job=row).order_by("pk").values_list("outcome", flat=True)),
        "checkpoint": Checkpoint.objects.filter(job=row).values_list("pk", flat=True).first(),
        "artifact": artifact.pk if artifact else None,
        "digest": artifact.digest if artifact else "",
    }


def forget_outputs() -> int:
    """Make finished steps unknown by key, so that an equal job computes everything again."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE dashboard_step SET key = encode(sha256(random()::text::bytea), 'hex')")
        return cursor.rowcount


def certified(artifact: int) -> bool:
    variant = Artifact.objects.get(pk=artifact).variant
    return RollbackCertificate.objects.filter(variant=variant).exists()


def reports() -> list[dict[str, Any]]:
    return list(ServerReport.objects.values("server", "environment", "generation", "state", "digest"))


def ping() -> bool:
    return User.objects.count() >= 0


ACTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        people, rooms, sample_set, sets, import_checkpoint, compress, evaluate, ask, approve, deploy, roll_back, job,
        forget_outputs, certified, reports, ping,
    )
}  # fmt: skip


def _person(name: str) -> User:
    return User.objects.get(username=name)


def _answer(request: dict[str, Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            close_old_connections()
            return ACTIONS[request["action"]](**request["arguments"])
        except Error:
            if time.monotonic() > deadline:
                raise
            connection.close()
            time.sleep(0.3)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # logs of libraries must not mix with the answers
    for line in sys.stdin:
        try:
            answer = {"value": _answer(json.loads(line))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
