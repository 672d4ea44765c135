"""Taking the demo away again: its people, its models and all that was made from them, and the bytes they filled.

History stays, as it does for everything. What somebody made from a demo model goes with the model: it could not be
restored or explained without it. What the demo's people made from other models stays.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Model, ProtectedError, Q, QuerySet
from django.utils.translation import gettext as _

from compression_worker.store import open_store
from dashboard.lifecycle import ACTIVE_JOB_STATES, CancelRequest, Refused, Role
from dashboard.models import (
    Approval,
    Artifact,
    Checkpoint,
    Deployment,
    Environment,
    Escrow,
    Evaluation,
    Job,
    RollbackCertificate,
    SampleSet,
    Study,
    User,
)
from dashboard.services.blobs import blobs_free, digests_of_rows
from dashboard.services.jobs import job_cancel
from dashboard.services.units import recorded, unit_of_work


@dataclass(frozen=True, kw_only=True)
class DemoRows:
    """All rows that the removal takes, by kind, in the order in which they can be deleted."""

    deployments: QuerySet[Deployment]
    studies: QuerySet[Study]
    approvals: QuerySet[Approval]
    certificates: QuerySet[RollbackCertificate]
    evaluations: QuerySet[Evaluation]
    artifacts: QuerySet[Artifact]
    sample_sets: QuerySet[SampleSet]
    escrows: QuerySet[Escrow]
    checkpoints: QuerySet[Checkpoint]
    jobs: QuerySet[Job]
    users: QuerySet[User]

    def counts(self) -> dict[str, int]:
        return {name: rows.count() for name, rows in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What was removed. ``kept_users`` did something that stays, so they stay too, without a way to sign in."""

    counts: dict[str, int] = field(default_factory=dict)
    kept_users: list[str] = field(default_factory=list)
    blobs: int = 0
    bytes_freed: int = 0


def demo_rows() -> DemoRows:
    """What belongs to the demo at this moment: marked so, or made from what is."""
    bases = Checkpoint.objects.filter(is_demo=True)
    checkpoints = Checkpoint.objects.filter(Q(pk__in=bases) | Q(base__in=bases))
    artifacts = Artifact.objects.filter(Q(is_demo=True) | Q(variant__in=checkpoints) | Q(base__in=checkpoints))
    evaluations = Evaluation.objects.filter(Q(is_demo=True) | Q(variant__in=checkpoints) | Q(artifact__in=artifacts))
    others = Evaluation.objects.exclude(pk__in=evaluations)
    studies = Study.objects.filter(Q(is_demo=True) | Q(variant__in=checkpoints))
    # A set that measured something else is evidence for it, perhaps of an approval, and stays.
    sample_sets = SampleSet.objects.filter(is_demo=True)
    for rows, names in (
        (others, ("text_set", "choice_set")),
        (Study.objects.exclude(pk__in=studies), ("calibration", "text_set", "choice_set")),
    ):
        for name in names:
            sample_sets = sample_sets.exclude(pk__in=rows.filter(**{f"{name}__isnull": False}).values(name))
    approvals = Approval.objects.filter(Q(is_demo=True) | Q(artifact__in=artifacts) | Q(evaluation__in=evaluations))
    certificates = RollbackCertificate.objects.filter(Q(variant__in=checkpoints) | Q(job__is_demo=True))
    deployments = Deployment.objects.filter(
        Q(is_demo=True) | Q(variant__in=checkpoints) | Q(base__in=checkpoints) | Q(approval__in=approvals)
    )
    escrows = Escrow.objects.filter(variant__in=checkpoints)
    jobs = Job.objects.filter(
        Q(is_demo=True)
        | Q(variant__in=checkpoints)
        | Q(artifact__in=artifacts)
        | Q(evaluation__in=evaluations)
        | Q(certificate__in=certificates)
        | Q(checkpoints__in=checkpoints)
        | Q(escrow__in=escrows)
    )
    return DemoRows(
        deployments=deployments,
        studies=studies,
        approvals=approvals,
        certificates=certificates,
        evaluations=evaluations,
        artifacts=artifacts,
        sample_sets=sample_sets,
        escrows=escrows,
        checkpoints=checkpoints,
        jobs=Job.objects.filter(pk__in=jobs),
        users=User.objects.filter(is_demo=True, is_active=True),
    )


def demo_remove(*, actor: User | None, patience: float = 20.0) -> Removal:
    """Stop the demo's jobs, delete its rows in one transaction, then free the blobs that no other row needs.

    ``actor`` None: from the command line. Waits up to ``patience`` seconds for running steps to be killed; a worker
    that does not answer by then finds its fence closed.
    """
    _refuse_while_others_work()
    _jobs_stop(patience)
    with recorded(actor=actor, reason="the demo was removed"):
        removal, doomed = _rows_delete()
    blobs, freed = blobs_free(store=open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE), candidates=doomed)
    return Removal(counts=removal.counts, kept_users=removal.kept_users, blobs=blobs, bytes_freed=freed)


def _refuse_while_others_work() -> None:
    """A job that runs may just now write a blob that equals one of the demo's: it must not vanish under it."""
    others = Job.objects.filter(state__in=ACTIVE_JOB_STATES).exclude(pk__in=demo_rows().jobs).order_by("pk")
    if others:
        names = ", ".join(str(job) for job in others[:5])
        raise Refused(_("Other jobs are not finished yet: %(jobs)s. Wait for them or stop them.") % {"jobs": names})
    for environment in Environment.objects.filter(active__in=demo_rows().deployments):
        if environment.deployments.exclude(pk__in=demo_rows().deployments).exists():
            raise Refused(
                _("%(name)s answers from the demo and has also served other models: deploy one of them there first.")
                % {"name": environment.name}
            )


def _jobs_stop(patience: float) -> None:
    admin = User.objects.filter(is_demo=True, role=Role.ADMIN, is_active=True).first()
    running = demo_rows().jobs.filter(state__in=ACTIVE_JOB_STATES)
    if admin is None or not running:
        return
    for job in running:
        job_cancel(actor=admin, job=job, how=CancelRequest.KILL)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and demo_rows().jobs.filter(state__in=ACTIVE_JOB_STATES).exists():
        time.sleep(0.5)


@unit_of_work
def _rows_delete() -> tuple[Removal, set[str]]:
    rows = demo_rows()
    counts = rows.counts()
    doomed = set[str]()
    # What is to go is written down before the first deletion: the queries name each other's rows.
    found: list[tuple[type[Model], list[int]]] = []
    for queryset in vars(rows).values():
        doomed |= digests_of_rows(queryset)
        found.append((queryset.model, list(queryset.values_list("pk", flat=True))))
    _environments_clear(found[0][1])
    for model, keys in found[:-1]:
        model._default_manager.filter(pk__in=keys).delete()
    SampleSet.objects.filter(is_demo=True).update(is_demo=False, created_by=None)
    counts["users"], kept = _users_remove(found[-1][1])
    return Removal(counts=counts, kept_users=kept), doomed


def _environments_clear(deployments: list[int]) -> None:
    """Environments that point at one of ``deployments`` begin anew, empty, and go on counting where they were.

    The pointer itself cannot be taken back: the database lets it move only forward, to a deployment. The generation
    is kept because a server never goes back one.
    """
    Deployment.objects.filter(replaces__in=deployments).update(replaces=None)
    for environment in Environment.objects.select_for_update().filter(active__in=deployments):
        with connection.cursor() as cursor:
            # Its deployments point back at it and go in the same transaction, where the constraint is checked last.
            cursor.execute("DELETE FROM dashboard_environment WHERE id = %s", [environment.pk])
        Environment.objects.create(
            name=environment.name, alias=environment.alias, generation=environment.generation, active=None
        )


def _users_remove(keys: list[int]) -> tuple[int, list[str]]:
    removed, kept = 0, []
    for user in User.objects.filter(pk__in=keys).order_by("username"):
        try:
            with transaction.atomic():
                user.delete()
            removed += 1
        except ProtectedError:
            user.is_active = False
            user.set_unusable_password()
            user.save(update_fields=["is_active", "password"])
            kept.append(user.username)
    return removed, kept
