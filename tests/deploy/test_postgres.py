"""The embedded Postgres: passwords asked for, rows kept over a kill -9, nothing left when its parent dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from deploy.postgres import EmbeddedPostgres, clear_leftovers

PASSWORD = "p @/'\"ss"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path / "postgres", password=PASSWORD)
    server.start()
    yield server
    server.stop()


def test_it_asks_for_a_password(server: EmbeddedPostgres) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(server.url(password="wrong"))


def test_it_listens_on_loopback_only_and_checks_its_pages(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.url()) as connection:
        shown = [
            connection.execute(f"SHOW {name}").fetchone() for name in ("listen_addresses", "data_checksums", "fsync")
        ]
    assert shown == [("127.0.0.1",), ("on",), ("on",)]


def test_the_servers_role_may_connect_and_reads_no_table(server: EmbeddedPostgres) -> None:
    for _ in range(2):  # the second start finds roles and database there
        server.ensure(database="deltaworks", owner_password="owner's", server_password="server's")
    with psycopg.connect(server.url("deltaworks", "deltaworks", "owner's")) as owner:
        owner.execute("CREATE TABLE secret (value text)")
    with (
        psycopg.connect(server.url("deltaworks_server", "deltaworks", "server's")) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute("SELECT * FROM secret")


def test_committed_rows_survive_a_kill(server: EmbeddedPostgres) -> None:
    with psycopg.connect(server.url()) as connection:
        connection.execute("CREATE TABLE kept (value int)")
        connection.execute("INSERT INTO kept VALUES (7)")
    assert server.process is not None
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server.start()
    with psycopg.connect(server.url()) as connection:
        assert connection.execute("SELECT value FROM kept").fetchone() == (7,)


def test_a_process_id_that_another_program_has_now_does_not_stop_a_start(server: EmbeddedPostgres) -> None:
    server.stop()
    stale = f"{os.getpid()}\n{server.folder}\n1700000000\n{server.port}\n\n127.0.0.1\n\nready\n"
    (server.folder / "postmaster.pid").write_text(stale)
    clear_leftovers(server.folder)
    assert not (server.folder / "postmaster.pid").exists()
    server.start()
    assert server.ready()


def test_an_initialisation_that_was_cut_off_begins_again(tmp_path: Path) -> None:
    (tmp_path / ".initdb-half" / "data").mkdir(parents=True)
    server = EmbeddedPostgres(tmp_path / "postgres", password=PASSWORD, durable=False)
    server.create()
    assert (server.folder / "PG_VERSION").read_text().strip() == "18"


def test_it_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time; from deploy.postgres import EmbeddedPostgres\n"
        f"server = EmbeddedPostgres(pathlib.Path({str(tmp_path / 'postgres')!r}), password='x', durable=False)\n"
        "server.start(); print(server.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/fd").exists() and _alive(pid):
        assert time.monotonic() < deadline, "Postgres outlived its parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
