"""Jobs as people see them: asked for, stopped, killed, tried again. What a worker does is in ``services.steps``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.utils.translation import gettext as _

from compression_worker import catalog
from compression_worker.contracts import CompressionError, PlannedStep
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.faults import failpoint
from dashboard.lifecycle import CancelRequest, JobKind, JobState, Refused
from dashboard.models import Artifact, Checkpoint, Job, SampleSet, Trial, User
from dashboard.selectors.preflight import (
    compression_inputs,
    compression_preflight,
    evaluation_inputs,
    evaluation_preflight,
)
from dashboard.selectors.queues import default_queue, offered_queues
from dashboard.services.endings import job_ask_cancel
from dashboard.services.escrows import require_weights
from dashboard.services.ordering import job_order, queue_checked, require_fit, unique_seed
from dashboard.services.registry import check_import_name
from dashboard.services.units import authorise, recorded, unit_of_work

SMALLINT = 32_767
BIGINT = 2**63 - 1
REDONE_KINDS = frozenset({JobKind.IMPORT, JobKind.REHEARSE, JobKind.RESTORE})
"""Their steps look at the world outside the store, so that a former result proves nothing."""
FORECAST_KINDS = frozenset({JobKind.COMPRESS, JobKind.EVALUATE})
SET_NAMES = ("text_set", "choice_set")


@unit_of_work
def compression_create(
    *,
    actor: User,
    method: str,
    variant: Checkpoint,
    config: dict[str, Any],
    calibration: SampleSet | None = None,
    seed: int = 0,
    priority: int = 0,
    cloned_from: Job | None = None,
    queue: str = "",
) -> Job:
    """Queue a compression of the checkpoint ``variant``. ``config``: fields of the method's config class.

    A method that takes a difference compresses a variant against its base; any other one compresses a base model or a
    variant by itself. ``queue`` is where its heavy steps go. Refused when it cannot fit on the disk or on any worker
    alive there.
    """
    actor = authorise(actor, "job.create")
    parsed = _parsed(method, config)
    settled, queue = asdict(parsed), queue_checked(queue)
    inputs = _checkpoints(method, variant)
    if calibration is not None and calibration.kind != "text":
        raise Refused(_("'%(set)s' is not a text set") % {"set": calibration})
    _check_numbers(seed, priority)
    require_weights(variant)
    fit = compression_preflight(method, parsed, compression_inputs(method, variant, calibration), queue)
    if calibration is not None:
        inputs["calibration"] = calibration.digest
    title = f"{method} {variant.name}"
    with recorded(actor=actor, reason=title):
        return job_order(
            actor=actor,
            kind=JobKind.COMPRESS,
            title=title,
            spec={"config": settled, "calibration": calibration.pk if calibration else None, "seed": seed},
            first=PlannedStep(
                name="plan",
                kind=f"{method}.plan",
                group="plan",
                params={"config": settled},
                inputs=inputs,
                seed=seed,
            ),
            variant=variant,
            method=method,
            priority=priority,
            cloned_from=cloned_from,
            queue=queue,
            estimate=require_fit(fit),
        )


def _checkpoints(method: str, variant: Checkpoint) -> dict[str, str]:
    """The checkpoints that the method reads, by digest; refuses a difference from nothing."""
    if not catalog.method(method).needs_base:
        return {"variant": variant.digest}
    if variant.base is None:
        raise Refused(
            _(
                "'%(name)s' has no base model to take the difference from: choose a variant of it, or a method that "
                "compresses a model by itself"
            )
            % {"name": variant.name}
        )
    return {"base": variant.base.digest, "variant": variant.digest}


def _parsed(method: str, config: dict[str, Any]) -> Any:
    """The whole configuration, defaults written out, so that a later default changes no old job."""
    try:
        return catalog.method(method).config_class()(**config)
    except CompressionError as error:
        raise Refused(error.message) from error
    except (TypeError, ValueError) as error:
        raise Refused(_("this configuration is not possible: %(error)s") % {"error": error}) from error


def _check_numbers(seed: int, priority: int) -> None:
    if not 0 <= seed <= BIGINT:
        raise Refused(_("a seed is a number from 0 to %(most)d") % {"most": BIGINT})
    if abs(priority) > SMALLINT:
        raise Refused(_("a priority is a number from -%(most)d to %(most)d") % {"most": SMALLINT})


@unit_of_work
def job_cancel(*, actor: User, job: Job, how: CancelRequest | str) -> Job:
    """``stop``: the running step ends and is kept; ``kill``: the child is killed. A stop can be raised to a kill."""
    actor = authorise(actor, "job.cancel")
    job = Job.objects.select_for_update(no_key=True).get(pk=job.pk)
    with recorded(actor=actor, reason=f"cancel: {how}"):
        job_ask_cancel(job, how)
        failpoint("cancel.write")
    return job


@unit_of_work
def job_retry(*, actor: User, job: Job) -> Job:
    """A new job with the same specification as the finished ``job``; steps with known results are reused by key."""
    actor = authorise(actor, "job.create")
    job = Job.objects.get(pk=job.pk)
    if not job.is_terminal:
        raise Refused(_("the job has not ended yet: %(state)s") % {"state": job.get_state_display()})
    first = PlannedStep(**job.spec["first"])
    if job.kind == JobKind.IMPORT:
        check_import_name(job.spec["name"])
    if job.variant is not None and job.kind != JobKind.RESTORE:
        require_weights(job.variant)
    if job.kind in REDONE_KINDS:
        first = PlannedStep(**(first.to_json() | {"seed": unique_seed()}))
    queue = job.queue if job.queue in offered_queues() else default_queue()
    estimate = _fit_again(job, queue)
    with recorded(actor=actor, reason=f"again: job {job.pk}"):
        again = job_order(
            actor=actor,
            kind=JobKind(job.kind),
            title=job.title,
            spec=job.spec,
            first=first,
            variant=job.variant,
            method=job.method,
            priority=job.priority,
            cloned_from=job,
            is_demo=job.is_demo,
            queue=queue,
            estimate=estimate,
        )
        _stand_in(job, again)
    return again


def _stand_in(job: Job, again: Job) -> None:
    """In a study the retry takes the place of the job that it repeats, unless that one had succeeded."""
    if job.state != JobState.SUCCEEDED:
        Trial.objects.filter(compression=job).update(compression=again)
        Trial.objects.filter(evaluation=job).update(evaluation=again)


def _fit_again(job: Job, queue: str) -> dict[str, Any] | None:
    """The pre-flight of a retry: what did not fit before may fit now, and the other way round."""
    if job.variant is None or not isinstance(job.spec.get("config"), dict) or job.kind not in FORECAST_KINDS:
        return job.estimate
    sets = {name: SampleSet.objects.filter(pk=job.spec.get(name)).first() for name in ("calibration", *SET_NAMES)}
    if job.kind == JobKind.COMPRESS:
        config = _parsed(job.method, job.spec["config"])
        inputs = compression_inputs(job.method, job.variant, sets["calibration"])
        return require_fit(compression_preflight(job.method, config, inputs, queue))
    artifact = Artifact.objects.filter(pk=job.spec.get("artifact")).first()
    inputs = evaluation_inputs(job.variant, artifact, *(sets[name] for name in SET_NAMES))
    return require_fit(evaluation_preflight(EvaluationConfig.from_json(job.spec["config"]), inputs, queue))


@unit_of_work
def job_reprioritise(*, actor: User, job: Job, priority: int) -> Job:
    """Move an unfinished job forward (higher) or back in its queue."""
    actor = authorise(actor, "job.create")
    _check_numbers(0, priority)
    job = Job.objects.select_for_update(no_key=True).get(pk=job.pk)
    if job.is_terminal:
        raise Refused(_("the job has ended already: %(state)s") % {"state": job.get_state_display()})
    with recorded(actor=actor, reason=f"priority {priority}"):
        job.priority = priority
        job.save(update_fields=["priority"])
    return job
