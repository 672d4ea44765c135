"""Studies: queueing several compressions at once, and the evaluation of each when it has succeeded.

Nothing remembers which evaluation is due: ``studies_advance`` looks at the rows and asks for what is missing. It may be
called at any time, by anybody and twice at once, so a restart, a lost message or a killed worker loses nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError, transaction
from django.db.models import QuerySet
from django.utils import timezone
from django.utils.translation import gettext as _

from compression_worker.contracts import CompressionError
from dashboard.lifecycle import CancelRequest, JobState, Refused
from dashboard.models import Artifact, Checkpoint, Job, SampleSet, Study, Trial, User
from dashboard.selectors.sizes import fits
from dashboard.selectors.trials import MOST, Way, study_forecast
from dashboard.services.evaluations import evaluation_create, evaluation_settings
from dashboard.services.jobs import compression_create, job_cancel, job_retry
from dashboard.services.ordering import queue_checked
from dashboard.services.units import authorise, recorded, unit_of_work

log = logging.getLogger(__name__)

AT_ONCE = 50
"""Evaluations asked for in one look: the next one takes the rest."""


@unit_of_work
def study_create(
    *,
    actor: User,
    variant: Checkpoint,
    ways: Sequence[Way],
    calibration: SampleSet | None = None,
    text_set: SampleSet | None = None,
    choice_set: SampleSet | None = None,
    config: dict[str, Any] | None = None,
    priority: int = 0,
    queue: str = "",
    tokens: int | None = None,
) -> Study:
    """Queue a compression of ``variant`` for each of ``ways``: all of them, or none where one cannot be.

    ``config``: settings of the evaluation that follows each. ``tokens``: how many methods that train are trained on,
    None for their own number; others ignore it.
    """
    actor = authorise(actor, "job.create")
    ways = list(dict.fromkeys(ways))
    settled, queue = evaluation_settings(config or {}), queue_checked(queue)
    _check(variant, ways, calibration, text_set, choice_set)
    configs = {way: _own_settings(way, tokens) for way in ways}
    forecast = study_forecast(
        variant,
        ways,
        calibration=calibration,
        sets=(text_set, choice_set),
        config=settled,
        queue=queue,
        tokens=tokens,
    )
    if problems := forecast.problems:
        raise Refused(" ".join(problems))
    title = f"study of {variant.name}"
    with recorded(actor=actor, reason=title):
        study = Study.objects.create(
            title=title[:200],
            variant=variant,
            calibration=calibration,
            text_set=text_set,
            choice_set=choice_set,
            config=vars(settled),
            queue=queue,
            priority=priority,
            created_by=actor,
            is_demo=variant.is_demo,
        )
    for index, way in enumerate(ways):
        job = _compress(study, way, configs[way])
        Trial.objects.create(study=study, index=index, method=way.method, bits=way.bits, compression=job)
    return study


def _check(
    variant: Checkpoint,
    ways: Sequence[Way],
    calibration: SampleSet | None,
    text_set: SampleSet | None,
    choice_set: SampleSet | None,
) -> None:
    if not ways:
        raise Refused(_("choose at least one method"))
    if len(ways) > MOST:
        raise Refused(
            _("a study tries at most %(most)d ways; these are %(count)d") % {"most": MOST, "count": len(ways)}
        )
    for way in ways:
        if not fits(way.method, variant):
            raise Refused(_("%(way)s needs a base, and '%(name)s' has none") % {"way": way.label, "name": variant.name})
        if way.reads_text and calibration is None:
            raise Refused(_("%(way)s reads text: choose a calibration text") % {"way": way.label})
    if text_set is None and choice_set is None:
        raise Refused(_("choose a text set, a multiple-choice set, or both"))
    for one, kind in ((text_set, "text"), (choice_set, "choice")):
        if one is not None and one.kind != kind:
            raise Refused(_("'%(set)s' is a set of the other kind") % {"set": one})


def _compress(study: Study, way: Way, config: dict[str, Any]) -> Job:
    try:
        return compression_create(
            actor=study.created_by,
            method=way.method,
            variant=study.variant,
            config=config,
            calibration=study.calibration if way.reads_text else None,
            priority=study.priority,
            queue=study.queue,
        )
    except Refused as refusal:
        raise Refused(f"{way.label}: {refusal}") from refusal


def _own_settings(way: Way, tokens: int | None) -> dict[str, Any]:
    try:
        made = way.config(tokens)
    except CompressionError as error:
        raise Refused(f"{way.label}: {error.message}") from error
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


def studies_advance() -> int:
    """Ask for the evaluation of each trial whose compression has succeeded; returns how many were asked for."""
    due = _due().order_by("study_id", "index").values_list("pk", flat=True)[:AT_ONCE]
    return sum(_advanced(pk) for pk in list(due))


def _due() -> QuerySet[Trial]:
    return Trial.objects.filter(
        evaluation=None, problem="", study__stopped_at=None, compression__state=JobState.SUCCEEDED
    )


def _advanced(pk: int) -> bool:
    """One trial on its own: what is wrong with it is logged and holds up nothing else. A lost database does."""
    try:
        return _evaluate(pk)
    except (OperationalError, InterfaceError):
        raise
    except Exception:
        log.exception("the evaluation of trial %s cannot be asked for; the others go on", pk)
        return False


@unit_of_work
def _evaluate(pk: int) -> bool:
    """Whether the trial's evaluation was asked for. What refuses it is written down, so that a person sees it."""
    trial = Trial.objects.select_related("study__created_by").get(pk=pk)
    study = trial.study
    try:
        with transaction.atomic():
            return _ask(trial)
    except PermissionDenied:
        problem = f"{study.created_by} may no longer queue jobs"
    except Refused as refusal:
        problem = str(refusal)
    _due().filter(pk=pk).update(problem=problem)
    log.warning("study %s: no evaluation of trial %s: %s", study.pk, trial.index, problem)
    return False


def _ask(trial: Trial) -> bool:
    """Locks in the order that everybody keeps: the person, then the trial."""
    study = trial.study
    actor = authorise(study.created_by, "job.create")
    if not _take(trial):
        return False
    artifact = Artifact.objects.select_related("variant").get(job_id=trial.compression_id)
    trial.evaluation = evaluation_create(
        actor=actor,
        variant=artifact.variant,
        artifact=artifact,
        text_set=study.text_set,
        choice_set=study.choice_set,
        config=study.config,
        priority=study.priority,
        queue=study.queue,
    )
    trial.save(update_fields=["evaluation"])
    return True


def _take(trial: Trial) -> bool:
    """Whether the trial is still due and nobody else is at it; it is locked then."""
    return _due().select_for_update(of=("self",), no_key=True, skip_locked=True).filter(pk=trial.pk).exists()


@unit_of_work
def study_stop(*, actor: User, study: Study, how: CancelRequest | str = CancelRequest.STOP) -> int:
    """Stop what is unfinished of a study, and ask for nothing more of it; returns how many jobs that stopped."""
    actor = authorise(actor, "job.cancel")
    study = Study.objects.select_for_update(no_key=True).get(pk=study.pk)
    jobs = [job for job in _jobs(study) if not job.is_terminal]
    with recorded(actor=actor, reason=f"stop {study}"):
        study.stopped_at = study.stopped_at or timezone.now()
        study.save(update_fields=["stopped_at"])
    for job in jobs:
        job_cancel(actor=actor, job=job, how=how)
    return len(jobs)


@unit_of_work
def study_resume(*, actor: User, study: Study) -> int:
    """Go on with a study: jobs that did not succeed are tried again, and what was refused is asked for again.

    Returns how many jobs were queued. Finished steps are reused by key.
    """
    actor = authorise(actor, "job.create")
    study = Study.objects.select_for_update(no_key=True).get(pk=study.pk)
    broken = [job for job in _jobs(study) if job.is_terminal and job.state != JobState.SUCCEEDED]
    refused = study.trials.exclude(problem="")
    if not broken and not refused.exists() and study.stopped_at is None:
        raise Refused(_("there is nothing to do again: what is left goes on by itself"))
    with recorded(actor=actor, reason=f"resume {study}"):
        refused.update(problem="")
        study.stopped_at = None
        study.save(update_fields=["stopped_at"])
    for job in broken:
        job_retry(actor=actor, job=job)
    return len(broken)


def _jobs(study: Study) -> list[Job]:
    """Compressions and evaluations, in the order of their numbers."""
    trials = study.trials.select_related("compression", "evaluation")
    found = [job for trial in trials for job in (trial.compression, trial.evaluation) if job is not None]
    return sorted(found, key=lambda job: job.pk)
