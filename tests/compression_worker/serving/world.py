"""The rows that name what lies in a store, the ways to move a pointer, and servers as processes of their own.

Used by the tests of the follower and by the rollback benchmark.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.db import connection, transaction
from django.utils import timezone

from compression_worker.contracts import StepOutput
from dashboard.lifecycle import ApprovalState, DeploymentKind, JobKind, JobState
from dashboard.models import (
    Approval,
    Artifact,
    Checkpoint,
    Deployment,
    Environment,
    Evaluation,
    Job,
    Policy,
    ServerReport,
    User,
)
from tests.compression_worker.serving.client import SERVE, Client, until
from tests.compression_worker.serving.stored import Models

START_SECONDS = 120


@dataclass
class Rows:
    """The rows of one world, and the ways to move a pointer: through the ORM, as every writer must."""

    models: Models
    engineer: User = field(init=False)
    variant: Checkpoint = field(init=False)
    artifact: Artifact = field(init=False)
    approval: Approval = field(init=False)

    def __post_init__(self) -> None:
        self.engineer = User.objects.create(username="engineer", role="engineer")
        manager = User.objects.create(username="manager", role="manager")
        base = self._checkpoint("base", self.models.base, None)
        self.variant = self._checkpoint("variant", self.models.variant, base)
        data = self.models.artifact.data
        self.artifact = Artifact.objects.create(
            name="tiny", variant=self.variant, base=base, job=self._job(JobKind.COMPRESS), digest=data["artifact"],
            method="bitdelta", config={}, source_bytes=data["source_bytes"], artifact_bytes=data["artifact_bytes"],
            nominal_ratio=16, bits_per_weight=2, ledger=[],
        )  # fmt: skip
        evaluation = Evaluation.objects.create(
            variant=self.variant, artifact=self.artifact, job=self._job(JobKind.EVALUATE), digest="e" * 64, results={}
        )
        policy = Policy.objects.filter(active=True).first() or Policy.objects.create(
            version=1, rules=[], digest="f" * 64, active=True, created_by=manager
        )
        self.approval = Approval.objects.create(
            artifact=self.artifact, evaluation=evaluation, policy=policy, artifact_digest=self.artifact.digest,
            evaluation_digest=evaluation.digest, base_fingerprint=base.fingerprint, policy_digest=policy.digest,
            state=ApprovalState.APPROVED, requested_by=self.engineer, submitted_by=self.engineer, decided_by=manager,
            decided_at=timezone.now(), expires_at=timezone.now() + timedelta(days=1),
        )  # fmt: skip

    def environment(self, name: str) -> Environment:
        return Environment.objects.create(name=name, alias=f"{name}-alias")

    def full_precision(self, environment: Environment) -> Deployment:
        return self.deploy(environment, kind=DeploymentKind.FULL_PRECISION, digest=self.variant.digest)

    def compressed(self, environment: Environment) -> Deployment:
        return self.deploy(
            environment, kind=DeploymentKind.COMPRESSED, digest=self.artifact.digest, artifact=self.artifact,
            base=self.artifact.base, approval=self.approval,
        )  # fmt: skip

    def rollback(self, environment: Environment) -> Deployment:
        return self.deploy(environment, kind=DeploymentKind.ROLLBACK, digest=self.variant.digest)

    def deploy(self, environment: Environment, **fields: Any) -> Deployment:
        with transaction.atomic():
            environment.refresh_from_db()
            environment.generation += 1
            environment.active = Deployment.objects.create(
                environment=environment, generation=environment.generation, variant=self.variant, reason="a test",
                created_by=self.engineer, **fields,
            )  # fmt: skip
            environment.save()
        return environment.active

    def _checkpoint(self, name: str, output: StepOutput, base: Checkpoint | None) -> Checkpoint:
        manifest = output.data["manifest"]
        return Checkpoint.objects.create(
            name=name, base=base, digest=output.data["checkpoint"], fingerprint=manifest["fingerprint"],
            manifest=manifest, size_bytes=manifest["size_bytes"], parameters=manifest["parameters"],
            dtype=manifest["dtype"], architecture=manifest["architecture"],
        )  # fmt: skip

    def _job(self, kind: JobKind) -> Job:
        return Job.objects.create(
            kind=kind,
            title=kind,
            spec={},
            created_by=self.engineer,
            state=JobState.SUCCEEDED,
            finished_at=timezone.now(),
        )


def server_dsn(password: str, port: int | None = None) -> str:
    """How a server reaches the present database with its own role."""
    settings = connection.settings_dict
    return f"postgres://deltaworks_server:{password}@{settings['HOST']}:{port or settings['PORT']}/{settings['NAME']}"


class Server:
    """``python -m compression_worker serve`` as a process of its own."""

    def __init__(self, store: Path, dsn: str, log: Path, *flags: str, name: str = "server-1") -> None:
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.client = Client(self.port)
        self._log = log
        self._environment = os.environ | {"DELTAWORKS_SERVER_DSN": dsn, "OMP_NUM_THREADS": "1"}
        self._command = [*SERVE, "--store", str(store)]
        self._command += ["--port", str(self.port), "--name", name, *flags]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    def wait_alive(self) -> None:
        until(self._alive, START_SECONDS, lambda: self._log.read_text()[-3000:])

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def report(self, environment: Environment) -> ServerReport:
        """What this server last said of ``environment``; an empty report when it said nothing."""
        found = ServerReport.objects.filter(server=self.name, environment=environment.name).first()
        return found or ServerReport(environment=environment.name, state="")

    def _alive(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text()[-3000:]
        try:
            return self.client.get("/livez").status == 200
        except OSError:
            return False
