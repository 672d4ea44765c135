"""How long a rollback takes under load: from the pointer's change to the last answer of the compressed model.

    python tests/benchmarks/rollback.py --rounds 50 --clients 4

Starts a Postgres and a real server process, deploys a compressed model and rolls it back, again and again, while
clients ask without a pause. Prints one line of JSON: p50, p99 and the longest wait, failed answers (should be none)
and mixed answers: those whose text is not what the digest in their header says greedily. Exits 1 when one was mixed or
failed, or when a rollback took longer than two seconds at the 99th percentile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.postgres import EmbeddedPostgres

if TYPE_CHECKING:
    from dashboard.models import Environment
    from tests.compression_worker.serving.client import Answer
    from tests.compression_worker.serving.world import Rows, Server

OWNER, SERVER = "owner-of-a-benchmark", "server-of-a-benchmark"
LIMIT_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deltaworks-rollback-") as folder:
        postgres = EmbeddedPostgres(Path(folder) / "postgres", password="superuser-of-a-benchmark", durable=False)
        postgres.start()
        try:
            postgres.ensure(database="deltaworks", owner_password=OWNER, server_password=SERVER)
            _set_up_django(postgres.url("deltaworks", "deltaworks", OWNER))
            return measure(Path(folder), args.rounds, args.clients)
        finally:
            postgres.stop()


def measure(folder: Path, rounds: int, clients: int) -> int:
    """Run the rounds; print and judge."""
    from django.core.management import call_command

    from tests.compression_worker.serving.stored import make_models
    from tests.compression_worker.serving.world import Rows, Server, server_dsn

    call_command("migrate", verbosity=0)
    call_command("serving_grants", stdout=sys.stderr)
    models = make_models(folder)
    rows = Rows(models)
    place = rows.environment("production")
    server = Server(models.store.root, server_dsn(SERVER), folder / "server.log")
    server.start()
    try:
        server.wait_alive()
        rows.full_precision(place)
        waits, seen = _rounds(rows, place, server, rounds, clients)
    finally:
        server.stop()
    failed = [answer for _, answer in seen if answer.status != 200]
    good = [answer for _, answer in seen if answer.status == 200]
    mixed = [answer for answer in good if answer.text != models.answers[answer.headers["x-deltaworks-digest"]]]
    p99 = statistics.quantiles(waits, n=100, method="inclusive")[98]
    figures = {
        "rounds": rounds,
        "clients": clients,
        "p50_seconds": round(statistics.median(waits), 3),
        "p99_seconds": round(p99, 3),
        "max_seconds": round(max(waits), 3),
        "answers": len(seen),
        "failed_answers": len(failed),
        "mixed_answers": len(mixed),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 1 if failed or mixed or p99 > LIMIT_SECONDS else 0


def _rounds(
    rows: Rows, place: Environment, server: Server, rounds: int, clients: int
) -> tuple[list[float], list[tuple[float, Answer]]]:
    """The wait of each rollback, and every answer with the time at which it was whole."""
    from tests.compression_worker.serving.client import until

    models, stop = rows.models, threading.Event()
    seen: list[tuple[float, Answer]] = []
    until(lambda: server.report(place).generation == 1, 60)

    def load() -> None:
        while not stop.is_set():
            answer = server.client.complete(place.alias, models.prompt, max_tokens=24)
            seen.append((time.monotonic(), answer))

    def answers_of(digest: str, since: int) -> list[float]:
        return [at for at, answer in seen[since:] if answer.headers.get("x-deltaworks-digest") == digest]

    waits = []
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(load) for _ in range(clients)]
        try:
            for _ in range(rounds):
                since = len(seen)
                rows.compressed(place)
                until(lambda since=since: answers_of(models.artifact_digest, since), 60)
                rows.rollback(place)
                moved, asked = time.monotonic(), len(seen)
                until(lambda: server.report(place).generation == place.generation, 60)
                # As many answers again as there are clients: whatever still ran on the old handle is whole by then.
                until(lambda asked=asked: len(answers_of(models.variant_digest, asked)) >= 2 * clients, 60)
                waits.append(max([0.0, *(at - moved for at in answers_of(models.artifact_digest, since))]))
        finally:
            stop.set()
        for client in running:
            client.result()
    return waits, seen


def _set_up_django(database_url: str) -> None:
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "dashboard.settings",
        "DATABASE_URL": database_url,
        "SECRET_KEY": "a key for a benchmark only",
        "ARTIFACT_ROOT": "unused",
        "PLAIN_STATIC": "1",
    }
    import django

    django.setup()


if __name__ == "__main__":
    sys.exit(main())
