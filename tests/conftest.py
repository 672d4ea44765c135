"""The environment of every test: settings before Django loads them, a Postgres of our own, and no outside network.

Postgres starts with the first test that needs a database, so that tests of the worker alone do not wait for it.
``TEST_DATABASE_URL`` names a real server to use instead.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deploy.postgres import EmbeddedPostgres
from deploy.processes import free_port

SCRATCH = Path(tempfile.mkdtemp(prefix="deltaworks-test-"))
OWNER_PASSWORD = "owner-of-a-test-database"
SERVER_PASSWORD = "server-of-a-test-database"
PORT = free_port()
SERVER_STARTED: list[EmbeddedPostgres] = []
ALONE = {"reliability", "test_stack", "test_browser", "test_bucket", "test_storage_bucket"}
"""Folders and files whose tests start fleets, whole stacks or a server with fixed ports, and watch the clock."""

os.environ.update(
    {
        "SECRET_KEY": "a key for tests only: it signs nothing that lives longer than a minute",
        "ARTIFACT_ROOT": str(SCRATCH / "store"),
        "IMPORT_ROOTS": f"imports={SCRATCH / 'imports'}",
        "CELERY_BROKER_URL": "memory://",
        "DATABASE_URL": os.environ.get(
            "TEST_DATABASE_URL", f"postgres://deltaworks:{OWNER_PASSWORD}@127.0.0.1:{PORT}/deltaworks"
        ),
        "DELTAWORKS_TEST_SERVER_PASSWORD": SERVER_PASSWORD,
        # Tests empty their tables between one another; the product's own connections may not.
        "PGOPTIONS": "-c deltaworks.may_empty_history=yes",
        "PLAIN_STATIC": "1",
        "STORAGE_TEND_SECONDS": "0",  # no thread of its own beside a test
        "STATIC_ROOT": str(SCRATCH / "static"),
        "DJANGO_SETTINGS_MODULE": "dashboard.settings",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # before torch loads: spinning threads make small models slow on shared cores
        "DO_NOT_TRACK": "1",
        # Kernels run in Triton's interpreter; set it to 0 on a machine with a GPU. Triton reads it when first imported.
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "1"),
    }
)
(SCRATCH / "imports").mkdir()
(SCRATCH / "static").mkdir()


def pytest_configure(config: pytest.Config) -> None:
    """Load the settings now that their environment is made; pytest-django then sets Django up."""
    from django.conf import settings

    assert settings.DATABASES
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        # Inherited, it would make the processes of ``-n 2`` load the settings before their own environment is made.
        del os.environ["DJANGO_SETTINGS_MODULE"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Beside one another (``-n 2``) run tests that do not watch the clock; storms and whole stacks run in turn."""
    for item in items:
        if ALONE & {Path(part).stem for part in item.path.parts}:
            item.add_marker(pytest.mark.xdist_group("alone"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of several leaves without its exit handlers."""
    if hasattr(session.config, "workerinput"):
        _clean_up()


@atexit.register
def _clean_up() -> None:
    for server in SERVER_STARTED:
        server.stop()
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> EmbeddedPostgres | None:
    """The embedded Postgres of this test run; None where ``TEST_DATABASE_URL`` names another server."""
    if "TEST_DATABASE_URL" in os.environ:
        return None
    if not SERVER_STARTED:
        server = EmbeddedPostgres(SCRATCH / "postgres", password="superuser-of-tests", port=PORT, durable=False)
        SERVER_STARTED.append(server)
        server.start()
        server.ensure(database="deltaworks", owner_password=OWNER_PASSWORD, server_password=SERVER_PASSWORD)
    return SERVER_STARTED[0]


@pytest.fixture(scope="session")
def django_db_modify_db_settings(postgres: EmbeddedPostgres | None) -> None:
    """pytest-django asks for this before it makes the test database: Postgres is up by then."""


@pytest.fixture(scope="session")
def server_password() -> str:
    """The password of the role ``deltaworks_server`` in the embedded Postgres."""
    return SERVER_PASSWORD


@pytest.fixture(autouse=True)
def _no_outside_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that connects to anything but this machine fails."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(str(address[0])):
            raise AssertionError(f"a test tried to connect to {address}: tests speak to this machine only")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
