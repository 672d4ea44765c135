"""A tiny world: a real Postgres, a real store, a pair of tiny models, and the product's processes, forked.

One template database and one template store are made at the start; each run gets copies of its own. Leases last two
seconds, so that what a fleet recovers from in minutes is seen here in seconds.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from compression_worker import faults
from deploy import processes
from deploy.postgres import EmbeddedPostgres
from tests.reliability.forking import Forked, forked_launcher
from tests.reliability.settings import DATABASE, OWNER_PASSWORD

LEASE_SECONDS = 2.0
STOP_SECONDS = 3.0
"""How long the fault ``stop`` lasts: longer than a lease."""
TEXT = "\n".join(
    f"The quick brown fox number {n} jumps over the lazy dog while a small model watches." for n in range(9)
)


@dataclass
class World:
    """What all runs share."""

    folder: Path
    postgres: EmbeddedPostgres
    count: int = 0

    @classmethod
    def start(cls, folder: Path, port: int) -> World:
        """Start Postgres, make the pair of models, migrate, and write the people and rooms that every run begins with."""
        folder.mkdir(parents=True, exist_ok=True)
        postgres = EmbeddedPostgres(folder / "postgres", password="superuser", port=port, durable=False)
        postgres.start()
        postgres.ensure(database=DATABASE, owner_password=OWNER_PASSWORD, server_password="server")
        world = cls(folder, postgres)
        for begin in (world._models, world._rows):
            setup = Forked(begin, log=folder / "setup.log")
            if setup.wait(120):
                raise RuntimeError(f"the world could not be made:\n{processes.last_lines(folder / 'setup.log', 40)}")
        return world

    def _models(self) -> None:
        from tests.tiny import make_tiny_pair

        make_tiny_pair(self.folder / "models")

    def _rows(self) -> None:
        from django.core.management import call_command

        from dashboard.lifecycle import Role
        from dashboard.services import accounts, evaluations, releases

        call_command("migrate", verbosity=0)
        for role in Role:
            accounts.user_create(actor=None, username=role.value, password="a long enough password", role=role.value)
        rules = [{"check": "true_ratio", "limit": 0.1, "severity": "block"}]
        releases.policy_create(actor=None, rules=rules)
        releases.environment_create(actor=None, name="production", alias="tiny")
        evaluations.sample_set_create(actor=None, name="tiny-text", kind="text", data=TEXT.encode(), bundled=True)

    def fresh(self, fault: str = "") -> Run:
        """A run of its own: copies of the template database and the template store."""
        self.count += 1
        run = Run(self, f"run_{self.count}", fault)
        run.folder.mkdir(parents=True)
        (self.folder / "store").mkdir(exist_ok=True)
        shutil.copytree(self.folder / "store", run.store, copy_function=os.link)
        with psycopg.connect(self.postgres.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {run.database} TEMPLATE {DATABASE} OWNER deltaworks")
        return run

    def stop(self) -> None:
        self.postgres.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Run:
    """One run: its database, its folder, the faults (comma separated) that are armed in each of its processes."""

    world: World
    database: str
    fault: str = ""
    living: list[Living] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.world.folder / self.database

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    @property
    def dsn(self) -> str:
        return self.world.postgres.url("deltaworks", self.database, OWNER_PASSWORD)

    def unfired(self) -> list[str]:
        """The faults that are armed and whose place was not passed so often."""
        written = self.ledger.read_text() if self.ledger.exists() else ""
        fired = {line.split()[1] for line in written.splitlines() if line.startswith("fired ")}
        return [fault for fault in self.fault.split(",") if fault and fault.partition(":")[0] not in fired]

    def enter(self) -> None:
        """Make this process one of the run's: its database, its store, its clock, its fault."""
        from django.conf import settings
        from django.db import connections

        from compression_worker import launcher
        from dashboard import execution

        connections.databases["default"]["NAME"] = self.database
        settings.ARTIFACT_ROOT = str(self.store)
        settings.LEASE_SECONDS, settings.HEARTBEAT_SECONDS, settings.RETRY_SECONDS = LEASE_SECONDS, 0.25, 0.1
        settings.RESUME_FREE_BYTES = 1
        execution.WATCH_SECONDS, execution.RECONCILE_SECONDS, launcher.TICK_SECONDS = 0.1, 0.3, 0.05
        os.environ["FAULT_LEDGER"], os.environ["FAULT_STOP_SECONDS"] = str(self.ledger), str(STOP_SECONDS)
        os.environ["FAULT"] = self.fault
        faults.arm(*faults.armed_from(os.environ))
        logging.getLogger().setLevel(logging.INFO)

    def keep(self, name: str, function: Callable[[], object]) -> None:
        """A process that is started again when it dies, as a supervisor does."""
        self.living.append(Living(name, function, self.folder / f"{name}.log"))

    def look(self) -> None:
        """Start what died."""
        for one in self.living:
            one.look()

    def end(self, *, keep_files: bool = False) -> None:
        for one in self.living:
            one.end()
        with psycopg.connect(self.world.postgres.url(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {self.database} WITH (FORCE)")
        if not keep_files:
            shutil.rmtree(self.folder, ignore_errors=True)

    # What the processes do

    def work(self, name: str) -> None:
        """A worker: what Celery would call for a wake and for its clock, in a loop."""
        self.enter()
        from dashboard import tasks
        from dashboard.execution import Execution

        roots = {"models": self.world.folder / "models"}
        execution = Execution(name=name, queues=["cpu"], launcher=forked_launcher(self.store, roots))
        tasks.present_execution = lambda: execution  # type: ignore[assignment]
        while True:
            for task in (tasks.reconcile, tasks.wake):
                try:
                    task()
                except Exception:
                    logging.getLogger(name).exception("the task broke; the worker goes on")
            time.sleep(0.05)

    def serve(self) -> None:
        """A server that follows the pointer of the run's database."""
        self.enter()
        from compression_worker.serving import command, follower, switch

        os.environ[command.DSN_VARIABLE] = self.dsn
        follower.POLL_SECONDS, follower.REPORT_SECONDS, follower.LONGEST_PAUSE = 0.1, 0.3, 0.3
        switch.Switch.__init__.__kwdefaults__["retry_seconds"] = 0.3
        parser = argparse.ArgumentParser()
        command.add_serve_arguments(parser)
        args = parser.parse_args(["--store", str(self.store), "--name", "server-1", "--port", "0"])
        logging.basicConfig(stream=sys.stderr, level=logging.INFO)
        with command.bound(args.host, args.port) as listener:
            command.following(args, listener)


@dataclass
class Living:
    """One process of a run that is kept alive."""

    name: str
    function: Callable[[], object]
    log: Path
    process: Forked | None = None
    starts: int = 0
    finished: bool = False

    def look(self) -> None:
        if self.finished:
            return
        if self.process is not None and (code := self.process.poll()) is not None:
            self.finished, self.process = code == 0, None
        if self.process is None and not self.finished:
            self.process = Forked(self.function, log=self.log)
            self.starts += 1

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None
