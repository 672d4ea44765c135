"""What must be true of a world whatever happened to it, read from the rows and from the bytes in its store."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from django.db import connection

from dashboard.lifecycle import TERMINAL_JOB_STATES, JobKind, JobState
from dashboard.models import Artifact, Attempt, Checkpoint, Deployment, Environment, Escrow, Evaluation, Job, Step

DELIBERATE = "deserter"
"""The worker that never comes back on purpose: its attempt is no work lost to a fault."""


def observe(store: Path) -> dict[str, Any]:
    """Everything that a run came to: digests of what it published, problems, and how much was done twice."""
    problems = [
        *jobs_ended(),
        *effects_happened_once(),
        *fences_held(),
        *generations_grew_by_one(),
        *blobs_are_whole(store),
    ]
    return {"problems": problems, "published": published(), "redone": steps_redone()}


def published() -> dict[str, str]:
    """By name and seed, the digest of each thing that was published."""
    found = {f"checkpoint {row.name}": row.digest for row in Checkpoint.objects.all()}
    found |= {f"artifact {row.job.spec['seed']}": row.digest for row in Artifact.objects.select_related("job")}
    found |= {f"escrow {row.variant.name}": row.digest for row in Escrow.objects.select_related("variant")}
    found |= {
        f"evaluation of {row.artifact_id and row.job.variant.name}": row.digest for row in Evaluation.objects.all()
    }
    return found


def jobs_ended() -> list[str]:
    """Every accepted job has reached an end, and none is left with steps at work."""
    problems = [
        f"job {job.pk} ({job}) is still {job.state}" for job in Job.objects.exclude(state__in=TERMINAL_JOB_STATES)
    ]
    running = Step.objects.filter(state="running").values_list("pk", flat=True)
    return problems + [f"step {pk} is still running" for pk in running]


def effects_happened_once() -> list[str]:
    """One result for each job that succeeded, none for the others; one end for each attempt."""
    problems = []
    made: Counter[int] = Counter()
    for model in (Artifact, Escrow, Evaluation, Checkpoint):
        made.update(model._default_manager.filter(job__isnull=False).values_list("job_id", flat=True))
    with connection.cursor() as cursor:
        cursor.execute("SELECT job_id FROM dashboard_rollbackcertificate")
        made.update(row[0] for row in cursor.fetchall())
    for job in Job.objects.all():
        # A restore puts back what has a row already: its bytes are looked at with all others.
        owed = 1 if job.state == JobState.SUCCEEDED and job.kind != JobKind.RESTORE else 0
        if made[job.pk] != owed:
            problems.append(f"job {job.pk} is {job.state} and has {made[job.pk]} results")
    twice = Counter(Attempt.objects.filter(outcome="done").values_list("step_id", flat=True))
    return problems + [f"step {pk} was done {times} times" for pk, times in twice.items() if times > 1]


def fences_held() -> list[str]:
    """What is done was written by the newest attempt, and each attempt has a number of its own."""
    problems = []
    for step in Step.objects.prefetch_related("attempts"):
        numbers = [attempt.number for attempt in step.attempts.all()]
        if numbers != list(range(1, step.attempt + 1)):
            problems.append(f"step {step.pk} has attempts {numbers} and stands at {step.attempt}")
        done = [attempt.number for attempt in step.attempts.all() if attempt.outcome == "done"]
        if step.state == "done" and done != [step.attempt]:
            problems.append(f"step {step.pk} is done, but attempt {done} did it and the fence is {step.attempt}")
        causes = step.causes if isinstance(step.causes, dict) else {}
        problems += [f"step {step.pk} was tried after {times} {cause}" for cause, times in causes.items() if times > 3]
    return problems


def generations_grew_by_one() -> list[str]:
    """The pointer of each environment went one generation at a time, and each is in the history exactly once."""
    problems = []
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT environment_id, generation, count(*) FROM dashboard_deploymentevent WHERE pgh_label = 'insert' "
            "GROUP BY 1, 2 HAVING count(*) <> 1"
        )
        problems += [f"generation {row[1]} of environment {row[0]} has {row[2]} entries" for row in cursor.fetchall()]
    for environment in Environment.objects.all():
        numbers = list(
            Deployment.objects.filter(environment=environment)
            .order_by("generation")
            .values_list("generation", flat=True)
        )
        if numbers != list(range(1, environment.generation + 1)):
            problems.append(f"{environment} stands at {environment.generation} and had generations {numbers}")
    return problems


def blobs_are_whole(store: Path) -> list[str]:
    """Whatever lies under a digest's name has that digest."""
    problems = []
    for path in (store / "sha256").glob("*/*"):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
            problems.append(f"blob {path.name} does not match its name")
    return problems


def steps_redone() -> int:
    """How many attempts were computed for nothing, beside the one that was deserted on purpose."""
    wasted = Attempt.objects.exclude(outcome__in=["done", "cancelled"]).exclude(worker=DELIBERATE)
    return wasted.exclude(step__job__state=JobState.CANCELLED).count()


def write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))
