"""The soak: a fleet under a seeded nemesis while people go on asking for jobs; then a checker reads what came of it.

``python -m tests.reliability.soak --seeds 1,2,3 --faults 600 --jobs 200`` spreads faults and jobs over the seeds; odd
seeds run with Redis, even ones with RabbitMQ. Exits 1 when a job was lost, an effect doubled, a digest wrong, or an old
attempt wrote anything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg

from deploy import processes
from tests.reliability.settings import import_everything, prepare_environment

DRAIN_SECONDS = 180.0
LOOK_SECONDS = 0.02
WATCH = """
    CREATE TABLE stale_write (at timestamptz DEFAULT clock_timestamp(), what text);
    CREATE FUNCTION note_step() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.attempt < OLD.attempt THEN
            INSERT INTO stale_write (what) VALUES (format('step %s went from attempt %s to %s', OLD.id, OLD.attempt, NEW.attempt));
        END IF;
        IF OLD.state IN ('failed', 'cancelled', 'dead') AND NEW.state <> OLD.state THEN
            INSERT INTO stale_write (what) VALUES (format('step %s went from %s to %s', OLD.id, OLD.state, NEW.state));
        END IF;
        RETURN NULL; END $$;
    CREATE TRIGGER note_step AFTER UPDATE ON dashboard_step FOR EACH ROW EXECUTE FUNCTION note_step();
    CREATE FUNCTION note_attempt() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.outcome IN ('done', 'failed') AND NEW.number <> (SELECT attempt FROM dashboard_step WHERE id = NEW.step_id) THEN
            INSERT INTO stale_write (what) VALUES (format('attempt %s of step %s ended as %s', NEW.number, NEW.step_id, NEW.outcome));
        END IF;
        RETURN NULL; END $$;
    CREATE TRIGGER note_attempt AFTER UPDATE ON dashboard_attempt FOR EACH ROW EXECUTE FUNCTION note_attempt();
    CREATE FUNCTION note_job() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF OLD.finished_at IS NOT NULL AND NEW.state <> OLD.state THEN
            INSERT INTO stale_write (what) VALUES (format('job %s went from %s to %s', OLD.id, OLD.state, NEW.state));
        END IF;
        RETURN NULL; END $$;
    CREATE TRIGGER note_job AFTER UPDATE ON dashboard_job FOR EACH ROW EXECUTE FUNCTION note_job();
"""
"""The database itself watches: whatever an old attempt or an ended job would write is noted here."""


def check(run: Any, history: list[dict[str, Any]], truth: dict[str, str]) -> dict[str, Any]:
    """Compare what was promised with what came of it. Runs in a process of the run's."""
    from django.db import connection

    from dashboard.lifecycle import JobState
    from dashboard.models import Artifact, Attempt, Job
    from tests.reliability import invariants

    problems = [*invariants.jobs_ended(), *invariants.effects_happened_once(), *invariants.fences_held()]
    cancelled = {event["job"] for event in history if event["event"] == "cancel"}
    rows = {job.pk: job for job in Job.objects.all()}
    for event in history:
        if event["event"] == "accepted" and event["job"] not in rows:
            problems.append(f"job {event['job']} was accepted and is gone")
    for job in rows.values():
        if job.state == JobState.FAILED or (job.state == JobState.CANCELLED and job.pk not in cancelled):
            problems.append(f"{job} is {job.state}: {job.error}")
    for artifact in Artifact.objects.select_related("job"):
        if artifact.digest != truth[str(artifact.job.spec["seed"])]:
            problems.append(f"artifact of {artifact.job} is {artifact.digest}: wrong")
    with connection.cursor() as cursor:
        cursor.execute("SELECT what FROM stale_write ORDER BY at")
        problems += [f"written too late: {what}" for (what,) in cursor.fetchall()]
    known = {event["what"] for event in history if event["event"] == "fault"}
    for path in (run.store / "sha256").glob("*/*"):
        if path.name not in known and hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
            problems.append(f"blob {path.name} is damaged, and nobody damaged it on purpose")
    outcomes = Counter(Attempt.objects.values_list("outcome", flat=True))
    reopened = sum(1 for causes in _causes() if "damaged" in causes)
    return {
        "problems": problems,
        "jobs": dict(Counter(job.state for job in rows.values())),
        "attempts": dict(outcomes),
        "reopened": reopened,
    }


def _causes() -> list[dict[str, int]]:
    from dashboard.models import Step

    return list(Step.objects.exclude(causes={}).values_list("causes", flat=True))


def soak(world: Any, seed: int, faults: int, jobs: int, broker_name: str) -> dict[str, Any]:
    """One seed: calm beginning, storm, calm end, check."""
    from tests.reliability import workload
    from tests.reliability.fleet import BROKERS, Fleet
    from tests.reliability.forking import Forked
    from tests.reliability.nemesis import Nemesis

    began = time.monotonic()
    run = world.fresh()
    history = workload.History(run.folder / "history.jsonl")
    with psycopg.connect(run.dsn, autocommit=True) as connection:
        connection.execute(WATCH)
    broker = BROKERS[broker_name](run.folder / "broker")
    broker.start()
    fleet = Fleet(run, broker)
    injected, submitted = multiprocessing.RawValue("d", 0.0), multiprocessing.RawValue("d", 0.0)
    truths, result = run.folder / "truth.json", run.folder / "result.json"
    nemesis = None

    def find_truth() -> None:
        fleet.enter()
        shutil.copytree(run.store, run.folder / "truth-store", copy_function=shutil.copy2)
        truths.write_text(json.dumps(workload.truth(run.folder / "truth-store")))

    def people() -> None:
        fleet.enter()
        workload.Workload(history, random.Random(seed), jobs, injected, submitted).play()

    def look_at_it() -> None:
        fleet.enter()
        result.write_text(json.dumps(check(run, history.read(), json.loads(truths.read_text()))))

    def to_the_end(what: Any, name: str, seconds: float) -> None:
        process, deadline = Forked(what, log=run.folder / f"{name}.log"), time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            fleet.look()
            time.sleep(LOOK_SECONDS)
        if process.poll() != 0:
            process.kill()
            raise RuntimeError(f"{name} failed:\n{processes.last_lines(run.folder / f'{name}.log', 30)}")

    def calm() -> None:
        fleet.enter()
        workload.begin()

    try:
        fleet.look()
        to_the_end(calm, "calm", 120)
        to_the_end(find_truth, "truth", 120)
        protected = {path.name for path in (run.store / "sha256").glob("*/*")}
        nemesis = Nemesis(fleet, history, random.Random(f"nemesis {seed}"), protected)
        driver = Forked(people, log=run.folder / "people.log")
        storm = time.monotonic()
        while driver.poll() is None or nemesis.count < faults:
            fleet.look()
            count = nemesis.count
            nemesis.look(count < faults and count / faults <= submitted.value + 0.1)
            injected.value = nemesis.count / faults
            if nemesis.count >= faults:
                nemesis.relent()
            time.sleep(LOOK_SECONDS)
        storm = time.monotonic() - storm
        nemesis.relent()
        to_the_end(look_at_it, "checker", DRAIN_SECONDS)
        found: dict[str, Any] = json.loads(result.read_text())
        if driver.poll() != 0:
            found["problems"].insert(0, f"people gave up: {processes.last_lines(run.folder / 'people.log', 3)}")
    finally:
        if nemesis is not None:
            nemesis.relent()
        fleet.end()
        broker.kill()
    found |= {
        "seed": seed,
        "broker": broker_name,
        "faults": nemesis.count,
        "kinds": dict(nemesis.done),
        "storm_seconds": round(storm, 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    run.end(keep_files=bool(found["problems"]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3", help="comma separated; 4-9 is a range")
    parser.add_argument("--faults", type=int, default=600, help="over all seeds")
    parser.add_argument("--jobs", type=int, default=200, help="over all seeds")
    parser.add_argument("--broker", choices=["redis", "rabbitmq"], help="for all seeds (default: by turns)")
    parser.add_argument("--record", help="append a line of JSON for each seed to this file")
    args = parser.parse_args()
    seeds = [one for part in args.seeds.split(",") for one in _range(part)]
    folder = Path(tempfile.mkdtemp(prefix="deltaworks-soak-"))
    port = processes.free_port()
    os.environ["CELERY_BROKER_URL"] = "memory://"
    prepare_environment(folder, port)
    import_everything()
    from tests.reliability.world import World

    world = World.start(folder, port)
    results = []
    try:
        for seed in seeds:
            broker = args.broker or ("redis" if seed % 2 else "rabbitmq")
            found = soak(world, seed, -(-args.faults // len(seeds)), -(-args.jobs // len(seeds)), broker)
            results.append(found)
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            if args.record:
                with Path(args.record).open("a") as file:
                    file.write(json.dumps(found) + "\n")
    finally:
        if any(one["problems"] for one in results) or len(results) < len(seeds):
            world.postgres.stop()
            sys.stdout.write(f"kept: {folder}\n")
        else:
            world.stop()
    problems = [problem for one in results for problem in one["problems"]]
    ended: Counter[str] = Counter()
    for one in results:
        ended.update(one["jobs"])
    sys.stdout.write(
        f"soak: {len(seeds)} seeds, {sum(one['faults'] for one in results)} faults, {sum(ended.values())} jobs "
        f"({', '.join(f'{count} {state}' for state, count in sorted(ended.items()))}), {len(problems)} problems\n"
    )
    return 1 if problems else 0


def _range(part: str) -> list[int]:
    first, _, last = part.partition("-")
    return list(range(int(first), int(last or first) + 1))


if __name__ == "__main__":
    sys.exit(main())
