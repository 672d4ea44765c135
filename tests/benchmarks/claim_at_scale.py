"""How long a claim takes beside a million finished jobs, and how a page of the job list does.

    python -m tests.benchmarks.claim_at_scale [--jobs 1000000] [--claims 2000]

Starts a Postgres of its own that writes to its disk as a real one does, fills it by SQL, and measures ``SELECT 1``,
``step_claim`` and ``step_finish`` in turn, so that they share whatever else the machine does. Appends its figures to
``results.csv``. Exits 1 when a claim's 99th percentile is over five milliseconds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from deploy.postgres import EmbeddedPostgres

T = TypeVar("T")
OWNER, SERVER = "owner-of-a-benchmark", "server-of-a-benchmark"
LIMIT_MS = 5.0
PAGES = [
    "",
    "state=active",
    "state=finished",
    "state=dead",
    "kind=rehearse",
    "state=failed&kind=import",
    "q=variant+77",
    "q=no-such-job",
]
RESULTS = Path(__file__).with_name("results.csv")
FEW = 1_000
PAGE_ROUNDS = 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--claims", type=int, default=2_000)
    parser.add_argument("--dry", action="store_true", help="write nothing to results.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltaworks-claims-") as folder:
        postgres = EmbeddedPostgres(Path(folder) / "postgres", password="superuser-of-a-benchmark")
        postgres.start()
        try:
            postgres.ensure(database="deltaworks", owner_password=OWNER, server_password=SERVER)
            _set_up_django(postgres.url("deltaworks", "deltaworks", OWNER))
            rows = measure(args.jobs, args.claims)
        finally:
            postgres.stop()
    if not args.dry:
        _append(rows)
    claim = next(float(value) for figure, value, _, _ in rows if figure == "claim p99")
    return int(claim > LIMIT_MS)


def measure(jobs: int, claims: int) -> list[tuple[str, str, str, str]]:
    """Fill, claim, look; the figures as (figure, value, unit, bound)."""
    from django.core.management import call_command

    from tests.dashboard.many_jobs import analyze, finished_jobs, waiting_jobs

    call_command("migrate", verbosity=0)
    finished_jobs(FEW)
    waiting_jobs(20)
    analyze()
    few = {page: _page(page) for page in PAGES}
    started = time.monotonic()
    for _ in range(-(-(jobs - FEW) // 100_000)):
        finished_jobs(min(100_000, jobs - FEW))
    waiting_jobs(2 * claims + 500, steps=2)
    analyze()
    _say("filled", jobs=jobs, seconds=round(time.monotonic() - started))
    many = {page: _page(page) for page in PAGES}
    rows = _claims(claims, f"beside {jobs} finished jobs")
    # Urgent work of a queue that nobody here serves: a claim has to pass it by.
    waiting_jobs(1_000, queue="gpu", priority=5)
    analyze()
    rows += _claims(claims, f"beside {jobs} finished jobs, past 1000 of another queue")
    for page in PAGES:
        name = f"job list {page or 'unfiltered'}"
        rows.append((f"{name}, p50", f"{many[page][1]:.3g}", f"ms at {jobs} jobs; {few[page][1]:.3g} at {FEW}", ""))
        rows.append((f"{name}, queries", str(many[page][0]), f"at {jobs} jobs; {few[page][0]} at {FEW}", ""))
    return rows


def _claims(claims: int, where: str) -> list[tuple[str, str, str, str]]:
    from django.db import connection
    from django.utils import timezone

    from compression_worker.launcher import Outcome
    from dashboard.models import Worker
    from dashboard.services.steps import step_claim, step_finish

    def select_one() -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            cursor.fetchone()

    def write_one() -> None:
        Worker.objects.filter(name="worker-1").update(pid=os.getpid())

    now = timezone.now()
    Worker.objects.get_or_create(
        name="worker-1", defaults={"queues": "cpu", "pid": 1, "started_at": now, "seen_at": now}
    )
    one, write, claiming, finishing = [], [], [], []
    for number in range(claims):
        one.append(_timed(select_one)[0])
        write.append(_timed(write_one)[0])
        took, claim = _timed(lambda: step_claim(worker="worker-1", queues=["cpu"]))
        assert claim is not None
        claiming.append(took)
        done = Outcome(kind="done", output=f"{number:064x}")
        finishing.append(_timed(lambda claim=claim, done=done: step_finish(claim=claim, outcome=done))[0])
    where = f"{where}, {claims} claims"
    rows = []
    for name, times in (("SELECT 1", one), ("UPDATE of one row", write), ("claim", claiming), ("finish", finishing)):
        for share in (50, 99):
            bound = f"{LIMIT_MS:g}" if (name, share) == ("claim", 99) else ""
            rows.append((f"{name} p{share}", f"{_percentile(times, share):.3g}", f"ms {where}", bound))
    for share in (50, 99):
        for name, times in (("SELECT 1", one), ("UPDATE of one row", write)):
            ratio = _percentile(claiming, share) / _percentile(times, share)
            rows.append((f"claim / {name}, p{share}", f"{ratio:.3g}", f"ratio {where}", ""))
    for figure, value, unit, _ in rows:
        _say(figure, value=value, unit=unit)
    return rows


def _page(query: str) -> tuple[int, float]:
    """Queries and median milliseconds of one page of the job list."""
    from django.db import connection
    from django.test import Client

    from dashboard.lifecycle import Role
    from tests.dashboard.world import person

    client = Client(headers={"host": "localhost"})
    client.force_login(person(Role.VIEWER))
    said = []

    def noted(execute: Callable[..., object], sql: str, *rest: object) -> object:
        said.append(sql)
        return execute(sql, *rest)

    with connection.execute_wrapper(noted):
        answer = client.get(f"/jobs/?{query}")
    assert answer.status_code == 200, answer.status_code
    times = [_timed(lambda: client.get(f"/jobs/?{query}"))[0] for _ in range(PAGE_ROUNDS)]
    _say(f"page {query or 'unfiltered'}", queries=len(said), ms=round(statistics.median(times), 1))
    return len(said), statistics.median(times)


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    value = call()
    return 1_000 * (time.perf_counter() - started), value


def _percentile(times: list[float], share: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[share - 1]


def _say(what: str, **figures: object) -> None:
    sys.stdout.write(json.dumps({"what": what} | figures) + "\n")
    sys.stdout.flush()


def _append(rows: list[tuple[str, str, str, str]]) -> None:
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    machine = f"{_processor()}, {os.cpu_count()} cores, PostgreSQL {_postgres()}"
    with RESULTS.open("a", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerows([today, machine, "claims", *row] for row in rows)


def _postgres() -> str:
    from django.db import connection

    return str(connection.pg_version // 10_000)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.split(":")[1].split()[:2])
    return platform.machine()


def _set_up_django(database_url: str) -> None:
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "dashboard.settings",
        "DATABASE_URL": database_url,
        "SECRET_KEY": "a key for a benchmark only",
        "ARTIFACT_ROOT": "unused",
        "PLAIN_STATIC": "1",
        "LOG_LEVEL": "ERROR",
    }
    import django

    django.setup()


if __name__ == "__main__":
    sys.exit(main())
