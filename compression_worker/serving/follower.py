"""The one place that speaks to the database: reads the pointer twice a second, writes what this server does with it.

Postgres may be away for as long as it likes: whatever answers goes on answering, and the follower knocks again, more
slowly each time. The highest epoch and generation seen are kept in memory alone. A restart believes the database,
which is the truth by then; a database that is set back under a running server is not followed until its
epoch is raised.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
from psycopg.rows import class_row

from compression_worker import faults
from compression_worker.faults import failpoint
from compression_worker.serving.switch import Pointer, Status, Switch
from compression_worker.serving.variants import Variants

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
REPORT_SECONDS = 2.0
STALE_SECONDS = 30.0
LONGEST_PAUSE = 10.0
MESSAGE_LIMIT = 2000

READ = """
SELECT environment, alias, epoch, generation, kind, variant_digest, base_digest, artifact_digest, digest
FROM serving_pointer ORDER BY environment
"""
REPORT = """
INSERT INTO dashboard_serverreport (server, environment, address, epoch, wanted, generation, digest, state, message,
                                    answers, resident_bytes, started_at, reported_at)
VALUES (%(server)s, %(environment)s, %(address)s, %(epoch)s, %(wanted)s, %(generation)s, %(digest)s, %(state)s,
        %(message)s, %(answers)s, %(resident_bytes)s, clock_timestamp() - %(age)s * interval '1 second',
        clock_timestamp())
ON CONFLICT (server, environment) DO UPDATE SET
    address = EXCLUDED.address, epoch = EXCLUDED.epoch, wanted = EXCLUDED.wanted, generation = EXCLUDED.generation,
    digest = EXCLUDED.digest, state = EXCLUDED.state, message = EXCLUDED.message, answers = EXCLUDED.answers,
    resident_bytes = EXCLUDED.resident_bytes, started_at = EXCLUDED.started_at, reported_at = EXCLUDED.reported_at
"""
CONNECTION: dict[str, Any] = {
    "autocommit": True,
    "connect_timeout": 5,
    "application_name": "deltaworks server",
    "options": "-c statement_timeout=5000",
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """How this server names itself in its reports."""

    server: str
    address: str


class Follower:
    """A thread that follows the pointer of ``environments`` (all, when none is named)."""

    def __init__(
        self,
        *,
        dsn: str,
        identity: Identity,
        environments: Collection[str],
        variants: Variants,
        make_switch: Callable[[str, Callable[[], None]], Switch],
    ) -> None:
        self._dsn, self._identity, self._variants = dsn, identity, variants
        self._named = frozenset(environments)
        self._make_switch = make_switch
        self._stopping, self._news = threading.Event(), threading.Event()
        self._switches = {name: make_switch(name, self._news.set) for name in sorted(environments)}
        self._reported: dict[str, Status] = {}
        self._started = time.monotonic()
        self._last_read: float | None = None
        self._next_report = 0.0
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        variants.names_known = False

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._news.set()
        for switch in self._switches.copy().values():
            switch.close()
        self._thread.join(5)

    def statuses(self) -> list[Status]:
        return [switch.status() for switch in self._switches.copy().values()]

    @property
    def ready(self) -> bool:
        """Whether the pointer was read once and everything that is deployed answers."""
        return self._last_read is not None and all(switch.ready for switch in self._switches.copy().values())

    @property
    def stale(self) -> bool:
        """Whether the database has not been read for 30 s."""
        return time.monotonic() - (self._last_read or self._started) > STALE_SECONDS

    def _run(self) -> None:
        pause = POLL_SECONDS
        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._dsn, **CONNECTION) as connection:
                    logger.info("following the pointer")
                    faults.drop_database = partial(faults.cut_socket, connection.fileno())
                    while not self._stopping.is_set():
                        self._turn(connection)
                        pause = POLL_SECONDS
            except psycopg.Error as error:
                logger.warning("the database cannot be read (%s); what answers goes on", str(error).strip())
            except Exception:
                # Whatever is wrong, a server that stopped following would miss the next rollback.
                logger.exception("following broke; it starts again")
            self._stopping.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _turn(self, connection: psycopg.Connection[Any]) -> None:
        """Read, act, report, and wait for the next half second or for news of a load."""
        began = time.monotonic()
        with connection.cursor(row_factory=class_row(Pointer)) as cursor:
            rows = cursor.execute(READ).fetchall()
        failpoint("server.read")
        self._last_read = time.monotonic()
        for pointer in rows:
            self._see(pointer)
        self._variants.names_known = True
        self._report(connection)
        while (left := began + POLL_SECONDS - time.monotonic()) > 0 and not self._stopping.is_set():
            if self._news.wait(left):
                self._news.clear()
                self._report(connection)

    def _see(self, pointer: Pointer) -> None:
        if self._named and pointer.environment not in self._named:
            return
        if pointer.environment not in self._switches:
            self._switches[pointer.environment] = self._make_switch(pointer.environment, self._news.set)
        self._switches[pointer.environment].see(pointer)

    def _report(self, connection: psycopg.Connection[Any]) -> None:
        """Write what changed, and each 2 s everything."""
        due = time.monotonic() >= self._next_report
        if due:
            self._next_report = time.monotonic() + REPORT_SECONDS
        statuses = [one for one in self.statuses() if due or self._reported.get(one.environment) != one]
        if not statuses:
            return
        failpoint("server.report")
        try:
            with connection.cursor() as cursor:
                cursor.executemany(REPORT, [self._row(status) for status in statuses])
        except psycopg.Error:
            if connection.broken or connection.closed:
                raise
            logger.exception("the report was refused; answers go on")
        self._reported |= {status.environment: status for status in statuses}

    def _row(self, status: Status) -> dict[str, Any]:
        answers = self._variants.answers().items()
        return {
            "server": self._identity.server[:100],
            "environment": status.environment,
            "address": self._identity.address,
            "epoch": status.epoch,
            "wanted": status.wanted,
            "generation": status.generation,
            "digest": status.digest,
            "state": status.state,
            "message": status.message.replace("\x00", "")[:MESSAGE_LIMIT],
            "answers": sum(count for (name, _, how), count in answers if name == status.environment and how == "ok"),
            "resident_bytes": self._variants.resident_bytes(),
            "age": time.monotonic() - self._started,
        }
