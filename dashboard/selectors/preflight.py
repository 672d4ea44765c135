"""Whether a job fits before it is accepted: bytes against the store's room, memory against the workers alive.

What does not fit is said with by how much, and with the cheapest change that would fit, found by trying changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from django.conf import settings
from django.utils.translation import gettext as _

from compression_worker import catalog
from compression_worker.evaluation import estimate as evaluation
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.preflight import Estimate, Inputs, Model, StepLoad
from compression_worker.store import open_store
from dashboard.formats import byte_words
from dashboard.glossary import group_label
from dashboard.models import Artifact, Checkpoint, SampleSet, Worker
from dashboard.selectors.queues import Room, light_queue, offered_queues, room_of, serves, step_queue, workers_alive
from dashboard.selectors.rates import Hours, measured_rates, time_needed

Estimator = Callable[[Any], Estimate]


def free_bytes() -> int | None:
    """Room in the store; None where it cannot be told."""
    try:
        return open_store(settings.ARTIFACT_ROOT, settings.ARTIFACT_CACHE).free_bytes()
    except OSError:
        return None


def model_of(checkpoint: Checkpoint) -> Model:
    """The checkpoint by its sizes."""
    manifest = checkpoint.manifest or {}
    return Model(
        config=manifest.get("config") or {},
        parameters=checkpoint.parameters,
        weight_bytes=int(manifest.get("weight_bytes") or checkpoint.size_bytes),
        size_bytes=checkpoint.size_bytes,
    )


def compression_inputs(method: str, checkpoint: Checkpoint, calibration: SampleSet | None) -> Inputs:
    """What a job of ``method`` is given. One that compresses a model by itself reads no base."""
    base = checkpoint.base if catalog.method(method).needs_base else None
    return Inputs(
        variant=model_of(checkpoint),
        base=model_of(base) if base else None,
        text_bytes=calibration.size_bytes if calibration else 0,
    )


def evaluation_inputs(
    variant: Checkpoint, artifact: Artifact | None, text_set: SampleSet | None, choice_set: SampleSet | None
) -> Inputs:
    return Inputs(
        variant=model_of(variant),
        base=model_of(variant.base) if variant.base else None,
        artifact_bytes=artifact.artifact_bytes if artifact else 0,
        text_bytes=text_set.size_bytes if text_set else 0,
        questions=choice_set.samples if choice_set else 0,
        question_bytes=choice_set.size_bytes if choice_set else 0,
    )


@dataclass(frozen=True)
class Problem:
    """What does not fit. ``short``: by how many bytes."""

    kind: str  # disk, memory, gpu
    text: str
    short: int


@dataclass(frozen=True)
class Remedy:
    """The cheapest change that would fit; ``changes`` are fields of the form, where it is one of those."""

    text: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """A kind of step on its queue, beside what the roomiest worker there has (None: unknown or nobody)."""

    load: StepLoad
    queue: str
    memory_bytes: int
    room: int | None
    gpu_bytes: int
    gpu_room: int | None

    @property
    def label(self) -> str:
        return group_label(self.load.kind.partition(".")[2])


@dataclass(frozen=True)
class Preflight:
    """A job before it is accepted."""

    estimate: Estimate
    queue: str
    free: int | None
    needs: tuple[Need, ...]
    hours: Hours
    problems: tuple[Problem, ...]
    remedies: tuple[Remedy, ...]
    unserved: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def words(self) -> str:
        """All of it in one paragraph, for a refusal."""
        return " ".join([*(one.text for one in self.problems), *(one.text for one in self.remedies)])

    @property
    def hungriest(self) -> Need | None:
        return max(self.needs, key=lambda one: one.memory_bytes + one.gpu_bytes, default=None)

    def record(self) -> dict[str, Any]:
        """What is kept with the job."""
        span = self.hours.span if not self.hours.unmeasured else None
        return self.estimate.to_json() | {"seconds": asdict(span) if span else None}


@dataclass(frozen=True)
class Site:
    """The facts of one moment, read once however many changes are tried."""

    workers: Sequence[Worker]
    free: int | None

    @classmethod
    def now(cls) -> Site:
        return cls(workers_alive(), free_bytes())

    def rooms(self, queue: str) -> list[Room]:
        return [room_of(one) for one in self.workers if serves(one, queue) and not one.trouble]

    def on_gpu(self, queue: str) -> bool:
        return any(room.on_gpu for room in self.rooms(queue))


def compression_preflight(
    method: str, config: Any, inputs: Inputs, queue: str, *, site: Site | None = None
) -> Preflight:
    """``config``: an instance of the method's config class."""
    forecast = catalog.method(method).forecaster()
    return preflight(lambda one: forecast.estimate(one, inputs), config, forecast.cheaper, queue, site=site)


def evaluation_preflight(config: EvaluationConfig, inputs: Inputs, queue: str) -> Preflight:
    return preflight(lambda one: evaluation.estimate(one, inputs), config, evaluation.cheaper, queue)


def plain_preflight(estimate: Estimate, queue: str) -> Preflight:
    """Of a job that has no settings to change."""
    return preflight(lambda _config: estimate, None, lambda _config: (), queue)


def preflight(
    estimator: Estimator,
    config: Any,
    cheaper: Callable[[Any], Iterable[Any]],
    queue: str,
    *,
    site: Site | None = None,
) -> Preflight:
    """Judge ``config`` in ``queue``, and look for what would fit where it does not."""
    site = site or Site.now()
    estimate = estimator(config)
    needs = tuple(_needs(estimate, queue, site))
    problems = (*_disk_problem(estimate, site), *_memory_problems(needs, site))
    rates = measured_rates({step.kind for step in estimate.steps})
    return Preflight(
        estimate=estimate,
        queue=queue,
        free=site.free,
        needs=needs,
        hours=time_needed(estimate, rates, site.on_gpu(queue)),
        problems=problems,
        remedies=tuple(_remedies(problems, estimator, config, cheaper, queue, site)),
        unserved=tuple(sorted({one.queue for one in needs if not site.rooms(one.queue)})),
    )


def _needs(estimate: Estimate, queue: str, site: Site) -> Iterator[Need]:
    light = light_queue(site.workers)
    for load in estimate.steps:
        where = step_queue(load.kind, queue, light)
        rooms = site.rooms(where)
        on_gpu = bool(load.gpu_bytes) and any(room.on_gpu for room in rooms)
        best = max(rooms, key=lambda room: _slack(room, load), default=None)
        yield Need(
            load=load,
            queue=where,
            memory_bytes=load.gpu_host_bytes if on_gpu else load.memory_bytes,
            room=best.memory if best else None,
            gpu_bytes=load.gpu_bytes if on_gpu else 0,
            gpu_room=best.gpu if best else None,
        )


def _slack(room: Room, load: StepLoad) -> float:
    """How much would be left; a worker that does not say how much it has counts as large enough."""
    host = load.gpu_host_bytes if room.on_gpu else load.memory_bytes
    left = [float("inf") if room.memory is None else room.memory - host]
    if room.on_gpu and load.gpu_bytes:
        left.append(float("inf") if room.gpu is None else room.gpu - load.gpu_bytes)
    return min(left)


def _disk_problem(estimate: Estimate, site: Site) -> Iterator[Problem]:
    short = estimate.needed_bytes - site.free if site.free is not None else 0
    if short <= 0 or site.free is None:
        return
    text = _(
        "It needs %(needed)s of free room, twice what it will write, and the store has %(free)s: %(short)s too little."
    )
    values = {"needed": estimate.needed_bytes, "free": site.free, "short": short}
    yield Problem("disk", text % {name: byte_words(value) for name, value in values.items()}, short)


def _memory_problems(needs: Iterable[Need], site: Site) -> Iterator[Problem]:
    """The hungriest step that fits on no worker of its queue; where nobody serves the queue nothing is known."""
    worst: dict[str, Problem] = {}
    for need in needs:
        rooms = site.rooms(need.queue)
        if not rooms or max(_slack(room, need.load) for room in rooms) >= 0:
            continue
        for problem in _shortages(need):
            if problem.kind not in worst or worst[problem.kind].short < problem.short:
                worst[problem.kind] = problem
    yield from worst.values()


def _shortages(need: Need) -> Iterator[Problem]:
    memory = _(
        "The step “%(step)s” needs %(needed)s of memory, and the roomiest worker of the queue %(queue)s gives %(has)s: "
        "%(short)s too little."
    )
    gpu = _(
        "The step “%(step)s” needs %(needed)s of GPU memory, and the largest GPU of the queue %(queue)s has %(has)s: "
        "%(short)s too little."
    )
    sides = (("memory", need.memory_bytes, need.room, memory), ("gpu", need.gpu_bytes, need.gpu_room, gpu))
    for kind, needed, has, text in sides:
        if has is not None and needed > has:
            short = needed - has
            values = {"needed": byte_words(needed), "has": byte_words(has), "short": byte_words(short)}
            yield Problem(kind, text % (values | {"step": need.label, "queue": need.queue}), short)


def _remedies(
    problems: Sequence[Problem],
    estimator: Estimator,
    config: Any,
    cheaper: Callable[[Any], Iterable[Any]],
    queue: str,
    site: Site,
) -> Iterator[Remedy]:
    for problem in problems:
        if problem.kind == "disk":
            yield Remedy(_("Free %(bytes)s on the storage page.") % {"bytes": byte_words(problem.short)})
    if any(problem.kind != "disk" for problem in problems):
        yield _memory_remedy(problems, estimator, config, cheaper, queue, site)


def _memory_remedy(
    problems: Sequence[Problem],
    estimator: Estimator,
    config: Any,
    cheaper: Callable[[Any], Iterable[Any]],
    queue: str,
    site: Site,
) -> Remedy:
    """Another queue costs nothing, so those come first; then the method's own changes in the order of their cost."""

    def holds(one: Any, where: str) -> bool:
        needs = list(_needs(estimator(one), where, site))
        served = all(site.rooms(need.queue) for need in needs)
        return served and not any(_memory_problems(needs, site))

    for other in offered_queues(site.workers):
        if other != queue and holds(config, other):
            return Remedy(_("It fits in the queue %(queue)s.") % {"queue": other}, {"queue": other})
    for candidate in cheaper(config):
        if holds(candidate, queue):
            changes = changed_fields(config, candidate)
            return Remedy(_("It would fit with %(changes)s.") % {"changes": change_words(changes)}, changes)
    needed = max(need.memory_bytes for need in _needs(estimator(config), queue, site))
    return Remedy(
        _("No smaller setting fits: it takes a worker with at least %(bytes)s of memory.")
        % {"bytes": byte_words(needed)}
    )


def changed_fields(before: Any, after: Any) -> dict[str, Any]:
    """The fields of two configs of one class that differ, as in ``after``."""
    old = asdict(before)
    return {name: value for name, value in asdict(after).items() if old[name] != value}


def change_words(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items())
