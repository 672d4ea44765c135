"""A small fleet for the soak: Postgres, a real broker, two Celery workers and their clock, each of which may be killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from deploy import processes
from deploy.broker import EmbeddedBroker
from tests.reliability.forking import Forked
from tests.reliability.world import Living, Run

LEASE_SECONDS = 2.0
PASSWORD = "secret-of-a-broker-for-tests"


class Broker:
    """A broker on 127.0.0.1 that can be killed, started again and emptied."""

    name = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.second_port, self.third_port = (processes.free_port() for _ in range(3))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def url(self) -> str:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        processes.signal_group(self.process, number)

    def kill(self) -> None:
        if self.process is not None:
            processes.signal_group(self.process, signal.SIGKILL)
            self.process.wait()
            self.process = None
            self.wait_closed(self.port)

    def wait_closed(self, port: int) -> None:
        """What is killed gives its port back a moment later."""
        deadline = time.monotonic() + 10
        while processes.port_open(port) and time.monotonic() < deadline:
            time.sleep(0.05)

    def wait_open(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not processes.port_open(self.port):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} does not answer on {self.port}")
            time.sleep(0.05)


class Redis(Broker):
    """Debian's redis-server where there is one, else the Valkey that the product carries. Nothing survives its end."""

    name = "redis"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._carried = EmbeddedBroker(folder / "carried", password=PASSWORD, port=self.port)

    def url(self) -> str:
        return self._carried.url()

    def start(self) -> None:
        log = self.folder / "redis.log"
        self.process = processes.start(self._command(), log=log)
        processes.wait_for(self._carried.ready, self.process, what="broker", log=log, seconds=20)

    def _command(self) -> list[str]:
        program = shutil.which("redis-server")
        if program is None:
            return self._carried.command()
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", PASSWORD, "--save", ""]
        return processes.tied([program, *options, "--dir", str(self.folder)])

    def kill(self) -> None:
        super().kill()
        shutil.rmtree(self.folder / "carried", ignore_errors=True)

    def flush(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as wire:
            wire.sendall(f"AUTH {PASSWORD}\r\nFLUSHALL\r\n".encode())
            wire.recv(16)


class RabbitMQ(Broker):
    """Debian's rabbitmq-server, with its files below the folder and no name that others could clash with."""

    name = "rabbitmq"

    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "HOME": str(self.folder),
            "RABBITMQ_NODENAME": f"soak{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self.second_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.third_port),
        }

    def start(self) -> None:
        program = "/usr/lib/rabbitmq/bin/rabbitmq-server"
        if not Path(program).exists():
            raise RuntimeError("rabbitmq-server is not installed: apt-get install rabbitmq-server")
        (self.folder / "plugins").write_text("[].\n")
        self.process = processes.start(
            processes.tied([program]), log=self.folder / "rabbitmq.log", env=self._environment()
        )
        self.wait_open(90)

    def kill(self) -> None:
        """With the name server that Erlang started for it."""
        super().kill()
        deadline = time.monotonic() + 5
        while processes.port_open(self.third_port) and time.monotonic() < deadline:
            # Refused as long as it believes in the node that was killed just now.
            subprocess.run(["epmd", "-kill"], env=self._environment(), capture_output=True, check=False)
            time.sleep(0.1)

    def flush(self) -> None:
        """Empty the queue of wakes, as a purge by hand would."""
        from kombu import Connection

        with contextlib.suppress(Exception), Connection(self.url(), connect_timeout=2) as connection:
            connection.default_channel.queue_purge("cpu")


BROKERS: dict[str, type[Broker]] = {"redis": Redis, "rabbitmq": RabbitMQ}


class Fleet:
    """The processes of one soak: kept alive as a supervisor would, found by what they are."""

    def __init__(self, run: Run, broker: Broker) -> None:
        self.run, self.broker = run, broker
        self.workers = [
            Living(name, self._worker(name), run.folder / f"{name}.log") for name in ("worker-1", "worker-2")
        ]
        self.beat = Living("beat", self._beat, run.folder / "beat.log")

    def look(self) -> None:
        for one in (*self.workers, self.beat):
            one.look()

    def end(self) -> None:
        for one in (*self.workers, self.beat):
            one.end()

    def enter(self) -> None:
        """Make this process one of the fleet's, with a lease of two seconds and this broker."""
        from django.conf import settings

        from dashboard.celery import app

        self.run.enter()
        settings.LEASE_SECONDS, settings.HEARTBEAT_SECONDS, settings.RETRY_SECONDS = LEASE_SECONDS, 0.4, 0.1
        settings.CELERY_BROKER_URL, settings.IDLE_LOOK_SECONDS = self.broker.url(), 1.0
        app.conf.broker_url = self.broker.url()
        app.conf.broker_connection_timeout = 1.0
        app.conf.beat_schedule["reconcile"]["schedule"] = 0.5

    def _worker(self, name: str) -> Callable[[], None]:
        def work() -> None:
            self.enter()
            from dashboard import tasks
            from dashboard.celery import app
            from dashboard.execution import Execution
            from tests.reliability.forking import forked_launcher

            made: list[Execution] = []

            def present() -> Execution:
                if not made:
                    roots = {"models": self.run.world.folder / "models"}
                    launcher = forked_launcher(self.run.store, roots)
                    made.append(Execution(name=f"{name}-{os.getpid()}", queues=["cpu"], launcher=launcher))
                return made[0]

            present.cache_info = lambda: type("Info", (), {"currsize": len(made)})()  # type: ignore[attr-defined]
            tasks.present_execution = present  # type: ignore[assignment]
            argv = ["worker", "--pool", "prefork", "--concurrency", "1", "--queues", "cpu", "--loglevel", "INFO"]
            app.worker_main([*argv, "--hostname", f"{name}@localhost", "--without-gossip", "--without-mingle"])

        return work

    def _beat(self) -> None:
        self.enter()
        from dashboard.celery import app

        schedule = self.run.folder / f"beat-{os.getpid()}"
        app.start(["beat", "--schedule", str(schedule), "--pidfile=", "--loglevel", "WARNING"])

    # Who is who, by descent: a worker's main process, its pool process, the child that computes

    def mains(self) -> list[int]:
        return [one.process.pid for one in self.workers if one.process is not None]

    def pools(self) -> list[int]:
        return [pid for main in self.mains() for pid in children_of(main)]

    def computing(self) -> list[int]:
        return [pid for pool in self.pools() for pid in children_of(pool) if not _is_helper(pid)]


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in task.read_text().split()]
    return found


def _is_helper(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "sleep")
    except OSError:
        return True


def asked(function: Callable[[], object], log: Path, seconds: float) -> bool:
    """Run ``function`` in a forked process; whether it ended well in time."""
    process = Forked(function, log=log)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        return False
