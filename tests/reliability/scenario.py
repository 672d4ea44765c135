"""The whole loop, as a person would go it who tries again whatever happens: from an import to a rollback.

Each stage looks at the rows first and asks only for what is missing, so that the person may be killed at any moment
and start over. Beside the main line there is a job that is cancelled and one whose first worker never comes back.
"""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.db import close_old_connections, connection, transaction

from compression_worker.store import open_store
from dashboard.lifecycle import ApprovalState, CancelRequest, Conflict, JobKind, JobState, Refused, Role
from dashboard.models import (
    Approval,
    Artifact,
    Checkpoint,
    Environment,
    Escrow,
    Evaluation,
    Job,
    RollbackCertificate,
    SampleSet,
    ServerReport,
    Step,
    User,
)
from dashboard.services import escrows, evaluations, jobs, registry, releases
from dashboard.services.steps import step_claim
from dashboard.services.storage_marks import weight_files

log = logging.getLogger(__name__)

CONFIG = {"distill_steps": 0}
EVALUATION = {
    "window_tokens": 32,
    "max_windows": 3,
    "prompts": "The quick",
    "max_new_tokens": 2,
    "bootstrap_resamples": 200,
}
MAIN, STOPPED, DESERTED = 7, 8, 9
"""The seeds of three compressions: the one that is deployed, the one that is cancelled, the one that is deserted."""
PATIENCE_SECONDS = 40.0
ENDED = frozenset({JobState.FAILED, JobState.DEAD, JobState.CANCELLED})


class Lost(Exception):
    """The world did not come to what it owes: a job ended badly, or nothing moved for too long."""


def play() -> None:
    """Go through all stages; raises :class:`Lost`."""
    for stage in (
        import_base,
        import_variant,
        desert_a_job,
        stop_a_job,
        compress,
        evaluate,
        ask,
        approve,
        deploy_in_full,
        deploy_compressed,
        roll_back,
        keep_as_escrow,
        see_the_others_end,
        restore_from_escrow,
    ):
        log.info("stage %s", stage.__name__)
        insist(stage)


def insist(stage: Callable[[], bool]) -> None:
    """Try ``stage`` until it says that it is done. What breaks on the way is tried again, as people do."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            close_old_connections()
            if stage():
                return
        except (Lost, Refused) as error:
            if isinstance(error, Conflict):
                continue
            raise Lost(f"{stage.__name__}: {error}") from error
        except Exception as error:
            log.warning("%s: %r; again", stage.__name__, error)
            if not connection.in_atomic_block:
                connection.close()
        if time.monotonic() > give_up:
            raise Lost(f"{stage.__name__} is not done after {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.05)


def person(role: Role) -> User:
    return User.objects.get(username=role.value)


def wanted(**facts: Any) -> Job | None:
    """The one job of these facts; raises :class:`Lost` when it ended badly."""
    job = Job.objects.filter(**facts).order_by("pk").first()
    if job is not None and job.state in ENDED:
        raise Lost(f"{job} is {job.state}: {job.error_code} {job.error}")
    return job


def import_base() -> bool:
    if wanted(kind=JobKind.IMPORT, spec__name="base") is None:
        registry.checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="base", name="base")
    return Checkpoint.objects.filter(name="base").exists()


def import_variant() -> bool:
    if wanted(kind=JobKind.IMPORT, spec__name="variant") is None:
        base = Checkpoint.objects.get(name="base")
        registry.checkpoint_import(
            actor=person(Role.ENGINEER), root="models", folder="variant", name="variant", base=base
        )
    return Checkpoint.objects.filter(name="variant").exists()


def order(seed: int) -> Job:
    """The compression of this seed, asked for once."""
    job = Job.objects.filter(kind=JobKind.COMPRESS, spec__seed=seed).first()
    return job or jobs.compression_create(
        actor=person(Role.ENGINEER),
        method="bitdelta",
        variant=Checkpoint.objects.get(name="variant"),
        config=CONFIG,
        seed=seed,
    )


def desert_a_job() -> bool:
    """A worker claims the first step of a job and is never heard of again: its lease has to run out."""
    with transaction.atomic():
        first = order(DESERTED).steps.get(index=0)
        Step.objects.filter(pk=first.pk, attempt=0).update(queue="nowhere")  # until then nobody else sees it
    if first.attempt == 0:
        step_claim(worker="deserter", queues=["nowhere"])
    Step.objects.filter(pk=first.pk, attempt__gt=0).update(queue="cpu")
    return Step.objects.filter(pk=first.pk, attempt__gt=0, queue="cpu").exists()


def stop_a_job() -> bool:
    job = order(STOPPED)
    if not job.is_terminal and not job.cancel_requested:
        try:
            jobs.job_cancel(actor=person(Role.ENGINEER), job=job, how=CancelRequest.KILL)
        except Refused:
            log.info("too late to cancel")
    return True


def compress() -> bool:
    order(MAIN)
    wanted(kind=JobKind.COMPRESS, spec__seed=MAIN)
    return Artifact.objects.filter(job__spec__seed=MAIN).exists()


def evaluate() -> bool:
    artifact = Artifact.objects.get(job__spec__seed=MAIN)
    if wanted(kind=JobKind.EVALUATE) is None:
        evaluations.evaluation_create(
            actor=person(Role.ENGINEER),
            variant=artifact.variant,
            artifact=artifact,
            text_set=SampleSet.objects.get(name="tiny-text"),
            config=EVALUATION,
        )
    return Evaluation.objects.filter(artifact=artifact).exists()


def ask() -> bool:
    evaluation = Evaluation.objects.get()
    assert evaluation.artifact is not None
    if not Approval.objects.exists():
        releases.approval_request(actor=person(Role.ENGINEER), artifact=evaluation.artifact, evaluation=evaluation)
    return True


def approve() -> bool:
    approval = Approval.objects.get()
    if approval.state == ApprovalState.PENDING:
        releases.approval_decide(actor=person(Role.MANAGER), approval=approval, approve=True, reason="looks right")
    wanted(kind=JobKind.REHEARSE)
    return RollbackCertificate.objects.exists()


def deploy_in_full() -> bool:
    environment = Environment.objects.get()
    if environment.generation == 0:
        releases.deployment_full_precision(
            actor=person(Role.OPS),
            environment=environment,
            variant=Checkpoint.objects.get(name="variant"),
            reason="the first",
            seen_generation=0,
        )
    return answered(1, Checkpoint.objects.get(name="variant").digest)


def deploy_compressed() -> bool:
    environment, artifact = Environment.objects.get(), Artifact.objects.get(job__spec__seed=MAIN)
    if environment.generation == 1:
        releases.deployment_create(
            actor=person(Role.OPS),
            environment=environment,
            artifact=artifact,
            approval=Approval.objects.get(),
            reason="smaller",
            seen_generation=1,
        )
    return answered(2, artifact.digest)


def roll_back() -> bool:
    environment = Environment.objects.get()
    if environment.generation == 2:
        releases.rollback(actor=person(Role.OPS), environment=environment, reason="as a drill", seen_generation=2)
    return answered(3, Checkpoint.objects.get(name="variant").digest)


def answered(generation: int, digest: str) -> bool:
    """Whether the server answers a client from exactly this generation and digest, and has reported so."""
    report = ServerReport.objects.filter(server="server-1").first()
    if report is None or (report.generation, report.digest, report.state) != (generation, digest, "serving"):
        return False
    address = urlsplit(report.address)
    client = http.client.HTTPConnection(str(address.hostname), address.port, timeout=5)
    try:
        body = json.dumps({"model": "tiny", "prompt": "The", "max_tokens": 1, "temperature": 0})
        client.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = client.getresponse()
        answer.read()
    finally:
        client.close()
    said = (answer.getheader("x-deltaworks-generation"), answer.getheader("x-deltaworks-digest"))
    if answer.status == 200 and said != (str(generation), digest):
        raise Lost(f"the server reports generation {generation} and answers from {said}")
    return answer.status == 200


def keep_as_escrow() -> bool:
    """The variant, bit for bit, as its difference from the base."""
    if wanted(kind=JobKind.ESCROW) is None:
        escrows.escrow_create(actor=person(Role.ENGINEER), variant=Checkpoint.objects.get(name="variant"))
    return Escrow.objects.exists()


def restore_from_escrow() -> bool:
    """The way back, as after a disk that lost the weights, once no other job needs them."""
    escrow = Escrow.objects.select_related("variant").get()
    job = wanted(kind=JobKind.RESTORE)
    if job is None:
        store = open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE)
        store.remove(weight_files(escrow.variant))
        escrows.escrow_restore(actor=person(Role.OPS), variant=escrow.variant)
        return False
    return job.state == JobState.SUCCEEDED


def see_the_others_end() -> bool:
    """The deserted job succeeds after all, and the cancelled one has ended."""
    deserted = wanted(kind=JobKind.COMPRESS, spec__seed=DESERTED)
    stopped = Job.objects.get(kind=JobKind.COMPRESS, spec__seed=STOPPED)
    return deserted is not None and deserted.state == JobState.SUCCEEDED and stopped.is_terminal
