"""What people ask of the fleet during a soak: jobs one after another, some cancelled, those that died tried again.

Runs in a process of its own against the run's database, writes each thing it did to the history, and ends when all
that was accepted has ended.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from django.db import close_old_connections, connection

from compression_worker.contracts import PlannedStep
from compression_worker.runner import prepare_torch, run_plan
from compression_worker.store import Store
from dashboard.lifecycle import CancelRequest, JobKind, JobState, Refused, Role
from dashboard.models import Artifact, Checkpoint, Job, SampleSet, Step
from dashboard.services import evaluations, jobs, registry
from tests.reliability.scenario import EVALUATION, import_base, import_variant, insist, person

log = logging.getLogger(__name__)
T = TypeVar("T")

DISTILLED = {"distill_steps": 30, "batch_size": 1, "sequence_length": 8}
INITIAL = {"distill_steps": 0}
RECIPES = [(seed, DISTILLED if seed % 3 else INITIAL) for seed in range(12)]
MOST_ACTIVE = 5
AHEAD = 0.05
STUCK_SECONDS = 120.0


class History:
    """One line of JSON for each thing that happened, by whoever did it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: str, **facts: Any) -> None:
        line = json.dumps({"at": round(time.time(), 3), "event": event, **facts}) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def begin() -> None:
    """What all jobs stand on, made while nothing breaks: the pair of models and one artifact to evaluate."""
    insist(import_base)
    insist(import_variant)
    seed, config = RECIPES[0]
    compression(seed, config)
    insist(lambda: Artifact.objects.exists())


def truth(store: Path) -> dict[str, str]:
    """The digest that each recipe comes to when nothing disturbs it, by seed; computed in ``store``."""
    prepare_torch()
    variant = Checkpoint.objects.select_related("base").get(name="variant")
    assert variant.base is not None
    inputs = {"base": variant.base.digest, "variant": variant.digest}
    inputs["calibration"] = SampleSet.objects.get(name="tiny-text").digest
    found = {}
    for seed, config in RECIPES:
        settled = jobs._settled("bitdelta", dict(config))
        params = {"config": settled}
        first = PlannedStep(name="plan", kind="bitdelta.plan", params=params, inputs=inputs, seed=seed)
        found[str(seed)] = run_plan(Store(store, durable=False), first, device="cpu").data["artifact"]
    return found


def compression(seed: int, config: dict[str, int]) -> Job:
    return jobs.compression_create(
        actor=person(Role.ENGINEER),
        method="bitdelta",
        variant=Checkpoint.objects.get(name="variant"),
        config=dict(config),
        calibration=SampleSet.objects.get(name="tiny-text"),
        seed=seed,
    )


def evaluation() -> Job:
    artifact = Artifact.objects.earliest("pk")
    text = SampleSet.objects.get(name="tiny-text")
    return evaluations.evaluation_create(
        actor=person(Role.ENGINEER), variant=artifact.variant, artifact=artifact, text_set=text, config=EVALUATION
    )


def importing(name: str) -> Job:
    return registry.checkpoint_import(actor=person(Role.ENGINEER), root="models", folder="base", name=name)


def steadily(action: Callable[[], T]) -> T:
    """Do ``action`` however often the database goes away meanwhile."""
    give_up = time.monotonic() + STUCK_SECONDS
    while True:
        try:
            close_old_connections()
            return action()
        except Refused:
            raise
        except Exception as error:
            log.warning("again after %r", error)
            connection.close()
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)


@dataclass
class Workload:
    """``wanted`` jobs in step with the faults: ``injected`` and ``submitted`` are shares that both sides can see."""

    history: History
    rng: random.Random
    wanted: int
    injected: Any  # multiprocessing.RawValue: share of the faults that have been injected
    submitted: Any  # multiprocessing.RawValue: share of the jobs that have been submitted
    active: dict[int, float] = field(default_factory=dict)
    cancel_at: dict[int, tuple[float, str]] = field(default_factory=dict)
    count: int = 0

    def play(self) -> None:
        """Submit, cancel, try again; returns when everything has ended. Raises when nothing moves any more."""
        moved = time.monotonic()
        while self.count < self.wanted or self.active:
            before = (self.count, len(self.active))
            self._submit()
            self._cancel()
            steadily(self._see)
            if (self.count, len(self.active)) != before:
                moved = time.monotonic()
            if time.monotonic() - moved > STUCK_SECONDS:
                raise RuntimeError(f"nothing moves: {sorted(self.active)} are active")
            time.sleep(0.1)

    def _submit(self) -> None:
        due = self.count < self.wanted and self.count / self.wanted <= self.injected.value + AHEAD
        if not due or len(self.active) >= MOST_ACTIVE:
            return
        name, choice = f"copy-{self.count}", self.rng.random()
        seed, config = self.rng.choice(RECIPES)
        if choice < 0.82:
            job = steadily(lambda: compression(seed, config))
        elif choice < 0.95:
            job = steadily(lambda: self._imported(name))
        else:
            job = steadily(evaluation)
        self.history.add("accepted", job=job.pk, kind=job.kind, seed=seed if job.kind == JobKind.COMPRESS else None)
        self.count += 1
        self.submitted.value = self.count / self.wanted
        self.active[job.pk] = time.monotonic()
        if self.rng.random() < 0.08:
            how = self.rng.choice([CancelRequest.STOP.value, CancelRequest.KILL.value])
            self.cancel_at[job.pk] = (time.monotonic() + self.rng.uniform(0, 3), how)

    def _imported(self, name: str) -> Job:
        """Asked again after a lost answer, the import is there already."""
        known = Job.objects.filter(kind=JobKind.IMPORT, spec__name=name).first()
        return known or importing(name)

    def _cancel(self) -> None:
        for pk, (at, how) in list(self.cancel_at.items()):
            if time.monotonic() < at:
                continue
            del self.cancel_at[pk]
            job = steadily(lambda pk=pk: Job.objects.get(pk=pk))  # type: ignore[misc]
            self.history.add("cancel", job=pk, how=how)
            try:
                steadily(lambda job=job, how=how: jobs.job_cancel(actor=person(Role.ENGINEER), job=job, how=how))  # type: ignore[misc]
            except Refused:
                self.history.add("too late", job=pk)

    def _see(self) -> None:
        """Take note of what ended; let its steps be computed anew next time; try again what died."""
        ended = Job.objects.filter(pk__in=list(self.active)).exclude(finished_at=None)
        for job in ended:
            if job.state == JobState.SUCCEEDED and self.rng.random() < 0.7:
                Step.objects.filter(job=job).update(key="")
            self.history.add("ended", job=job.pk, state=job.state, seconds=time.monotonic() - self.active.pop(job.pk))
            if job.state == JobState.DEAD:
                again = jobs.job_retry(actor=person(Role.ENGINEER), job=job)
                self.history.add("accepted", job=again.pk, kind=again.kind, seed=job.spec.get("seed"), again=job.pk)
                self.active[again.pk] = time.monotonic()
