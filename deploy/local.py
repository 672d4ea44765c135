"""`make run`: the whole of Deltaworks on one machine, from one command, under one folder.

Starts Postgres, the broker, the web process, a worker, its clock and a server, keeps them running, and stops them
all on Ctrl-C. With DATABASE_URL, CELERY_BROKER_URL or ARTIFACT_ROOT set, the real one takes the embedded part's
place. Must not be imported by anything but a main thread: children die with the thread that started them.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from deploy import processes
from deploy.broker import EmbeddedBroker
from deploy.home import Home, RunsAlready
from deploy.postgres import OWNER, SERVER, EmbeddedPostgres, clear_leftovers
from deploy.processes import StartFailed
from deploy.supervisor import Child, Stopped, Supervisor

ROOT = Path(__file__).resolve().parent.parent
DATABASE = "deltaworks"


class Stack:
    """The processes of one home, and the environment that they share."""

    def __init__(self, home: Home, ports: dict[str, int]) -> None:
        self.home = home
        self.ports = ports
        self.secrets = home.secrets()
        self.postgres = EmbeddedPostgres(
            home.folder / "postgres", password=self.secrets["postgres"], port=ports["postgres"], log=home.logs
        )
        self.broker = EmbeddedBroker(home.folder / "broker", password=self.secrets["broker"], port=self.ports["broker"])
        self.address = f"http://127.0.0.1:{self.ports['web']}"
        self.supervisor = Supervisor(self.tell, self.write_status)
        self.seeding: subprocess.Popen[bytes] | None = None
        self.ready_after = 0.0
        self._began = time.monotonic()

    def tell(self, line: str) -> None:
        """One line for the person at the terminal, and for the log."""
        stamped = f"{time.strftime('%H:%M:%S')} {line}\n"
        sys.stdout.write(stamped)
        sys.stdout.flush()
        with (self.home.logs / "supervisor.log").open("a") as log:
            log.write(stamped)

    def write_status(self) -> None:
        """`status.json`: where everything listens and which process is which."""
        children = {
            child.name: {
                "pid": child.process.pid if child.process else None,
                "starts": child.starts,
                "ready": child.is_ready,
                "log": str(child.log),
            }
            for child in self.supervisor.children
        }
        self.home.write(
            "status.json",
            {
                "pid": os.getpid(),
                "address": self.address,
                "api": f"http://127.0.0.1:{self.ports['server']}",
                "ready": bool(self.ready_after),
                "ready_after_seconds": round(self.ready_after, 1),
                "seeding": self.seeding is not None,
                "seeded": self._seeded.exists(),
                "ports": self.ports,
                "processes": children,
            },
        )

    # What each process is told

    def environment(self) -> dict[str, str]:
        """What the web process, the worker and management commands are given."""
        store = os.environ.get("ARTIFACT_ROOT") or str(self.home.folder / "store")
        roots = {"demo": str(ROOT / "deploy" / "demo"), "imports": str(self.home.imports)}
        given = [entry for entry in os.environ.get("IMPORT_ROOTS", "").split(",") if entry]
        defaults = {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HEARTBEAT_SECONDS": "5",
            "LEASE_SECONDS": "30",
            "SECRET_KEY": self.secrets["secret_key"],
            "DATABASE_URL": self.postgres.url(OWNER, DATABASE, self.secrets["owner"]),
            "CELERY_BROKER_URL": self.broker.url(),
            "PYTHONUNBUFFERED": "1",
        }
        own = {name: value for name, value in os.environ.items() if name != "DELTAWORKS_SERVER_DSN" and value}
        return {
            **defaults,
            **own,
            "ARTIFACT_ROOT": store,
            "IMPORT_ROOTS": ",".join([f"{name}={path}" for name, path in roots.items()] + given),
            "STATIC_ROOT": str(self.home.folder / "static"),
            "DJANGO_SETTINGS_MODULE": "dashboard.settings",
        }

    def server_environment(self) -> dict[str, str]:
        """What the server is given: the role that may read the pointer and report, and no other secret."""
        hidden = ("DATABASE_URL", "CELERY_BROKER_URL", "SECRET_KEY")
        shared = {name: value for name, value in self.environment().items() if name not in hidden}
        embedded = self.postgres.url(SERVER, DATABASE, self.secrets["server"])
        return shared | {"DELTAWORKS_SERVER_DSN": os.environ.get("DELTAWORKS_SERVER_DSN", embedded)}

    def python(self, *arguments: str) -> list[str]:
        return processes.tied([sys.executable, *arguments])

    def log(self, name: str) -> Path:
        return self.home.logs / f"{name}.log"

    # Bringing it up

    def bring_up(self) -> None:
        """Start everything, each as soon as what it needs is there."""
        if not os.environ.get("DATABASE_URL"):
            self._start_postgres()
        if not os.environ.get("CELERY_BROKER_URL"):
            self._start_broker()
        self._prepare()
        for child in self._applications():
            self.supervisor.add(child)

    def _start_postgres(self) -> None:
        self.postgres.create()

        def command() -> list[str]:
            clear_leftovers(self.postgres.folder)
            return self.postgres.command()

        child = Child(
            name="postgres",
            command=command,
            log=self.postgres.log,
            ready=self.postgres.ready,
            foundation=True,
            stop_signals=((signal.SIGINT, 8.0), (signal.SIGQUIT, 3.0)),
        )
        self.supervisor.add(child, wait=60)
        self.postgres.ensure(
            database=DATABASE, owner_password=self.secrets["owner"], server_password=self.secrets["server"]
        )

    def _start_broker(self) -> None:
        child = Child(
            name="broker",
            command=self.broker.command,
            log=self.log("broker"),
            ready=self.broker.ready,
            foundation=True,
        )
        self.supervisor.add(child, wait=30)

    def _prepare(self) -> None:
        """Migrate and collect static files, unless the last start did so for exactly this code and database."""
        digest = hashlib.sha256(os.environ.get("DATABASE_URL", "").encode())
        for path in _what_prepare_reads():
            digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
        stamp = {"prepared": digest.hexdigest()}
        if self.home.read("prepared.json") == stamp and not os.environ.get("DATABASE_URL"):
            return
        self.tell("preparing the database and the static files")
        env = self.environment() | {"DELTAWORKS_SERVER_ROLE": self._server_role()}
        self.supervisor.run_once(
            self.python("-m", "deploy.prepare"), what="preparing", log=self.log("prepare"), env=env
        )
        self.home.write("prepared.json", stamp)

    def _server_role(self) -> str:
        """Who serving processes are in the database; empty when a database of yours has no such role yet."""
        if not os.environ.get("DATABASE_URL"):
            return SERVER
        return urlsplit(os.environ.get("DELTAWORKS_SERVER_DSN", "")).username or ""

    def _applications(self) -> Iterator[Child]:
        env, web, server = self.environment(), self.ports["web"], self.ports["server"]
        gunicorn = ["-m", "gunicorn", "dashboard.wsgi", "--bind", f"127.0.0.1:{web}", "--workers", "1"]
        gunicorn += ["--worker-class", "gthread", "--threads", "4", "--graceful-timeout", "2", "--no-control-socket"]
        yield Child(
            name="web",
            command=lambda: self.python(*gunicorn),
            log=self.log("web"),
            env=env,
            ready=lambda: _answers(web, "/readyz"),
            stop_signals=((signal.SIGTERM, 3.0),),
        )
        celery = ["-m", "celery", "--app", "dashboard", "--quiet"]
        yield Child(
            name="worker",
            command=lambda: self.python(
                *celery, "worker", "--pool", "prefork", "--concurrency", "1", "--queues", "cpu", "--loglevel", "INFO",
                "--hostname", "worker-1@%h", "--without-gossip", "--without-mingle",
            ),
            log=self.log("worker"),
            env=env,
            ready_line=" ready.",
            stop_signals=((signal.SIGTERM, 5.0), (signal.SIGQUIT, 2.0)),
        )  # fmt: skip
        yield Child(
            name="beat",
            command=lambda: self.python(*celery, "beat", "--schedule", str(self.home.folder / "beat"), "--pidfile="),
            log=self.log("beat"),
            env=env,
            stop_signals=((signal.SIGTERM, 2.0),),
        )
        if os.environ.get("DATABASE_URL") and not os.environ.get("DELTAWORKS_SERVER_DSN"):
            self.tell("no server is started: DELTAWORKS_SERVER_DSN does not say how it reaches your database")
            return
        store = env["ARTIFACT_ROOT"]
        serve = ["-m", "compression_worker", "serve", "--store", store, "--name", "server-1", "--port", str(server)]
        yield Child(
            name="server",
            command=lambda: self.python(*serve),
            log=self.log("server"),
            env=self.server_environment(),
            ready=lambda: _answers(server, "/livez"),
            stop_signals=((signal.SIGTERM, 3.0),),
        )

    # While it runs

    @property
    def _seeded(self) -> Path:
        return self.home.folder / "seeded"

    def each_round(self) -> None:
        """What happens beside watching: say when the pages answer, then seed the demo once."""
        if self.ready_after:
            self._follow_seed()
            return
        if all(child.is_ready for child in self.supervisor.children):
            self.ready_after = time.monotonic() - self._began
            self.tell(f"Deltaworks is ready after {self.ready_after:.0f} s: {self.address}   (Ctrl-C stops it)")
            self.tell(f"models answer at http://127.0.0.1:{self.ports['server']}/v1, logs lie in {self.home.logs}")
            self._start_seed()
            self.write_status()

    def _start_seed(self) -> None:
        if self._seeded.exists() or os.environ.get("DELTAWORKS_DEMO") == "0":
            return
        # Its words go to the terminal and nowhere else: the passwords of the demo's people are among them.
        self.seeding = subprocess.Popen(
            self.python("manage.py", "demo", "seed"), cwd=ROOT, env=self.environment(), stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def _follow_seed(self) -> None:
        if self.seeding is None or (code := self.seeding.poll()) is None:
            return
        self.seeding = None
        if code:
            self.tell(f"seeding the demo ended with code {code}; the next start tries again")
        else:
            self._seeded.touch()
        self.write_status()

    def stop(self) -> None:
        """Stop everything, in reverse order."""
        self.tell("stopping")
        if self.seeding is not None:
            processes.stop(self.seeding, seconds=1)
        self.supervisor.stop()
        (self.home.folder / "status.json").unlink(missing_ok=True)
        self.tell("stopped")


def _what_prepare_reads() -> Iterator[Path]:
    for pattern in ("dashboard/migrations/*.py", "dashboard/static/**/*", "dashboard/models/*.py", "requirements.lock"):
        yield from sorted(path for path in ROOT.glob(pattern) if path.is_file())


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 500
    except OSError:
        return False
    finally:
        connection.close()


def main() -> int:
    os.chdir(ROOT)
    home = Home(Path(os.environ.get("DELTAWORKS_HOME") or ROOT / ".deltaworks"))
    try:
        home.lock()
    except RunsAlready as answer:
        sys.stdout.write(f"{answer}\n")
        return 0
    clear_leftovers(home.folder / "postgres")
    stack = Stack(home, home.choose_ports())
    stack.supervisor.listen()
    try:
        stack.bring_up()
        stack.supervisor.run(stack.each_round)
    except Stopped:
        return 0
    except StartFailed as error:
        stack.tell(str(error))
        return 1
    finally:
        stack.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
