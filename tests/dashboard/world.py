"""Rows to start a test from: people of each role, a base and its variant, an artifact with its evidence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.db import connection
from django.utils import timezone

from compression_worker.contracts import sha256
from dashboard.lifecycle import JobKind, JobState, Role
from dashboard.models import (
    Approval,
    Artifact,
    Checkpoint,
    Environment,
    Evaluation,
    Job,
    Policy,
    RollbackCertificate,
    User,
)
from dashboard.services import releases

RESULTS: dict[str, Any] = {
    "targets": ["base", "variant", "compressed"],
    "reference": "variant",
    "metrics": [
        {
            "name": "perplexity",
            "unit": "",
            "higher_is_better": False,
            "samples": 40,
            "values": {
                "base": {"value": 7.3, "low": 7.1, "high": 7.5},
                "variant": {"value": 4.5, "low": 4.4, "high": 4.6},
                "compressed": {"value": 4.6, "low": 4.5, "high": 4.7},
            },
            "differences": {"compressed": {"value": 0.06, "low": 0.03, "high": 0.09}},
        }
    ],
    "generations": [],
    "config": {},
}
RULES = [{"check": "perplexity_increase", "limit": 0.05, "severity": "block"}]


def digest(word: str) -> str:
    """A digest that is the same each time for ``word``."""
    return sha256(word.encode())


def person(role: Role | str, name: str = "") -> User:
    """The user ``name`` (by default named after the role)."""
    return User.objects.get_or_create(username=name or str(role), defaults={"role": str(role)})[0]


def checkpoint(name: str, base: Checkpoint | None = None, **values: Any) -> Checkpoint:
    """A checkpoint with made-up digests."""
    manifest = {"fingerprint": digest(f"{name} fingerprint"), "weight_bytes": 1_000, "files": {}}
    given = {
        "name": name,
        "base": base,
        "digest": digest(name),
        "fingerprint": manifest["fingerprint"],
        "manifest": manifest,
        "size_bytes": 1_200,
        "parameters": 500,
        "dtype": "BF16",
        "architecture": "LlamaForCausalLM",
    }
    return Checkpoint.objects.create(**(given | values))


def pair() -> tuple[Checkpoint, Checkpoint]:
    """A base and its variant."""
    base = Checkpoint.objects.filter(name="base").first() or checkpoint("base")
    return base, Checkpoint.objects.filter(name="variant").first() or checkpoint("variant", base)


def finished_job(kind: JobKind, variant: Checkpoint, by: User) -> Job:
    return Job.objects.create(
        kind=kind,
        title=f"{kind} {variant.name}",
        spec={},
        variant=variant,
        state=JobState.SUCCEEDED,
        finished_at=timezone.now(),
        created_by=by,
    )


def artifact(name: str = "variant-bitdelta", by: User | None = None, **values: Any) -> Artifact:
    """A published artifact of the pair, with its job."""
    base, variant = pair()
    given = {
        "name": name,
        "variant": variant,
        "base": base,
        "job": finished_job(JobKind.COMPRESS, variant, by or person(Role.ENGINEER)),
        "digest": digest(name),
        "method": "bitdelta",
        "config": {},
        "source_bytes": 1_000,
        "artifact_bytes": 100,
        "nominal_ratio": 16.0,
        "bits_per_weight": 1.0,
        "ledger": [{"name": "codes", "bytes": 100}],
    }
    return Artifact.objects.create(**(given | values))


def evaluation(of: Artifact, by: User | None = None, **values: Any) -> Evaluation:
    """Evidence for ``of`` that the policy of these tests accepts."""
    job = finished_job(JobKind.EVALUATE, of.variant, by or person(Role.ENGINEER))
    given = {
        "variant": of.variant,
        "artifact": of,
        "job": job,
        "digest": digest(f"evaluation {job.pk}"),
        "results": RESULTS,
    }
    return Evaluation.objects.create(**(given | values))


def policy() -> Policy:
    """The policy in force."""
    present = Policy.objects.filter(active=True).first()
    return present or releases.policy_create(actor=None, rules=RULES)


def certificate(variant: Checkpoint) -> RollbackCertificate:
    """A rehearsal that went well just now."""
    return RollbackCertificate.objects.create(
        variant=variant,
        job=finished_job(JobKind.REHEARSE, variant, person(Role.OPS)),
        digest=variant.digest,
        seconds=1.4,
        details={},
        expires_at=timezone.now() + timedelta(hours=24),
    )


def environment(name: str = "production") -> Environment:
    return Environment.objects.get_or_create(name=name, defaults={"alias": f"{name}-model"})[0]


def requested(of: Artifact | None = None) -> Approval:
    """An approval that somebody asked for."""
    policy()
    found = of or artifact()
    return releases.approval_request(actor=person(Role.ENGINEER), artifact=found, evaluation=evaluation(found))


def approved(of: Artifact | None = None) -> Approval:
    """A live approval, with a rehearsed way back."""
    asked = requested(of)
    certificate(asked.artifact.variant)
    return releases.approval_decide(actor=person(Role.MANAGER), approval=asked, approve=True, reason="looks right")


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Run ``calls`` in threads that start together, each on a connection of its own; their results or exceptions."""
    barrier = threading.Barrier(len(calls))
    results: list[object] = [None] * len(calls)

    def run(at: int, call: Callable[[], object]) -> None:
        try:
            barrier.wait(30)
            results[at] = call()
        except Exception as error:  # the test looks at what came out, whatever it is
            results[at] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(at, call)) for at, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results
