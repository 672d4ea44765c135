"""Sample sets and evaluations: uploading immutable versions, asking for a measurement, publishing its result."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.utils.translation import gettext as _

from compression_worker.contracts import CompressionError, PlannedStep
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.faults import failpoint
from compression_worker.samples import parse_samples
from compression_worker.store import NoRoom, StoreAway, open_store
from dashboard.lifecycle import ArtifactState, Conflict, JobKind, Refused
from dashboard.models import Artifact, Checkpoint, Evaluation, Job, SampleSet, Step, User
from dashboard.selectors.preflight import evaluation_inputs, evaluation_preflight
from dashboard.services.escrows import require_weights
from dashboard.services.ordering import job_order, queue_checked, require_fit
from dashboard.services.units import authorise, recorded, unit_of_work


@unit_of_work
def sample_set_create(
    *, actor: User | None, name: str, kind: str, data: bytes, origin: str = "", bundled: bool = False
) -> SampleSet:
    """A new immutable version of the set ``name`` from an uploaded TXT or JSONL file. ``actor`` None: bundled only."""
    if actor is not None:
        actor = authorise(actor, "set.upload")
    elif not bundled:
        raise Refused("only a bundled set comes without a person")
    _check_slug(name)
    try:
        parsed = parse_samples(data, kind)
        digest = open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE).write_bytes(parsed.data)
    except CompressionError as error:
        raise Refused(error.message) from error
    except NoRoom as error:
        raise Refused(_("there is no room on the disk for this set: free some and upload it again")) from error
    except StoreAway as error:
        message = _("the store does not answer now: upload it again later (%(error)s)") % {"error": error}
        raise Refused(message) from error
    with recorded(actor=actor, reason=f"sample set {name}"):
        return _add_version(
            name=name,
            kind=kind,
            digest=digest,
            samples=parsed.info.samples,
            size_bytes=len(parsed.data),
            origin=origin[:200],
            preview=parsed.info.preview,
            bundled=bundled,
            created_by=actor,
            is_demo=bool(actor and actor.is_demo and bundled),
        )


def _check_slug(name: str) -> None:
    try:
        SampleSet._meta.get_field("name").clean(name, None)
    except ValidationError as error:
        raise Refused(" ".join(error.messages)) from None


def _add_version(*, name: str, **values: Any) -> SampleSet:
    latest = SampleSet.objects.filter(name=name).order_by("-version").first()
    if latest is not None and latest.kind != values["kind"]:
        raise Refused(_("the set '%(name)s' is of another kind: choose another name") % {"name": name})
    if latest is not None and latest.digest == values["digest"]:
        raise Refused(
            _("these are the same samples as '%(name)s' version %(version)d")
            % {"name": name, "version": latest.version}
        )
    try:
        with transaction.atomic():
            return SampleSet.objects.create(name=name, version=latest.version + 1 if latest else 1, **values)
    except IntegrityError:
        raise Conflict(_("somebody uploaded a version of this set just now: look at it, then try again")) from None


@unit_of_work
def evaluation_create(
    *,
    actor: User,
    variant: Checkpoint,
    artifact: Artifact | None = None,
    text_set: SampleSet | None = None,
    choice_set: SampleSet | None = None,
    config: dict[str, Any] | None = None,
    priority: int = 0,
    cloned_from: Job | None = None,
    queue: str = "",
) -> Job:
    """Queue a measurement of base, variant and (if given) artifact on a text set, a choice set, or both."""
    actor = authorise(actor, "job.create")
    artifact = Artifact.objects.get(pk=artifact.pk) if artifact else None
    _check_targets(variant, artifact, text_set, choice_set)
    require_weights(variant)
    parsed = evaluation_settings(config or {})
    settled, queue = asdict(parsed), queue_checked(queue)
    fit = evaluation_preflight(parsed, evaluation_inputs(variant, artifact, text_set, choice_set), queue)
    inputs = {
        "variant": variant.digest,
        "base": variant.base.digest if variant.base else "",
        "artifact": artifact.digest if artifact else "",
        "text": text_set.digest if text_set else "",
        "choice": choice_set.digest if choice_set else "",
    }
    first = PlannedStep(
        name="plan",
        kind="evaluation.plan",
        group="plan",
        params={"config": settled},
        inputs={name: digest for name, digest in inputs.items() if digest},
    )
    spec = {
        "config": settled,
        "artifact": artifact.pk if artifact else None,
        "text_set": text_set.pk if text_set else None,
        "choice_set": choice_set.pk if choice_set else None,
    }
    title = f"evaluate {artifact.name if artifact else variant.name}"
    with recorded(actor=actor, reason=title):
        return job_order(
            actor=actor,
            kind=JobKind.EVALUATE,
            title=title,
            spec=spec,
            first=first,
            variant=variant,
            priority=priority,
            cloned_from=cloned_from,
            queue=queue,
            estimate=require_fit(fit),
        )


def _check_targets(
    variant: Checkpoint, artifact: Artifact | None, text_set: SampleSet | None, choice_set: SampleSet | None
) -> None:
    if text_set is None and choice_set is None:
        raise Refused(_("choose a text set, a multiple-choice set, or both"))
    if text_set is not None and text_set.kind != "text":
        raise Refused(_("'%(set)s' is not a text set") % {"set": text_set})
    if choice_set is not None and choice_set.kind != "choice":
        raise Refused(_("'%(set)s' is not a multiple-choice set") % {"set": choice_set})
    if artifact is not None and artifact.variant_id != variant.pk:
        raise Refused(_("'%(artifact)s' was made from another model") % {"artifact": artifact.name})
    if artifact is not None and artifact.state != ArtifactState.PUBLISHED:
        raise Refused(_("'%(artifact)s' is no longer published") % {"artifact": artifact.name})


def evaluation_settings(config: dict[str, Any]) -> EvaluationConfig:
    """The whole configuration, defaults written out, so that a later default changes no old job."""
    try:
        return EvaluationConfig(**config)
    except CompressionError as error:
        raise Refused(error.message) from error
    except (TypeError, ValueError) as error:
        raise Refused(_("this configuration is not possible: %(error)s") % {"error": error}) from error


def evaluation_publish(*, job: Job, step: Step) -> Evaluation:
    """The evaluation that a job made. Called by the last step's finish, in its transaction."""
    spec = job.spec
    if job.variant is None:
        raise Refused("the variant was removed during the job")
    if not step.data["metrics"]:
        raise Refused("nothing was measured")
    evaluation = Evaluation.objects.create(
        variant=job.variant,
        artifact_id=spec["artifact"],
        text_set_id=spec["text_set"],
        choice_set_id=spec["choice_set"],
        job=job,
        digest=step.output,
        results=step.data,
        is_demo=job.is_demo,
    )
    failpoint("publish.evaluation")
    return evaluation
