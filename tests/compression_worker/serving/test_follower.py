"""A real server process follows real rows: deploy, roll back, refuse, survive. Answers must match their digest."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from compression_worker.serving.follower import Follower, Identity
from compression_worker.serving.loading import Loader
from compression_worker.serving.switch import Switch
from compression_worker.serving.variants import NotReady, Variants
from compression_worker.store import Store
from dashboard.models import Environment, ServerReport
from tests.compression_worker.serving.client import Answer, Client, until
from tests.compression_worker.serving.stored import Models
from tests.compression_worker.serving.world import Rows, Server, server_dsn

pytestmark = pytest.mark.django_db(transaction=True)
NAMES = (f"place-{number}" for number in count(1))


class Link:
    """A TCP link to Postgres that can be cut and restored: what a server sees when the database is away."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open = True
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self._open = False
        for end in self._ends:
            _shut(end)
        self._ends.clear()

    def restore(self) -> None:
        self._open = True

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if not self._open:
                near.close()
                continue
            far = socket.create_connection(self._target)
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    _shut(source)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        end.close()


@pytest.fixture(scope="module")
def link(django_db_setup: None) -> Link:
    from django.db import connection

    return Link((connection.settings_dict["HOST"], int(connection.settings_dict["PORT"])))


@pytest.fixture(scope="module")
def server(
    models: Models,
    link: Link,
    server_password: str,
    django_db_blocker: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    with django_db_blocker.unblock():
        call_command("serving_grants")
        dsn = server_dsn(server_password, link.port)
    server = Server(models.store.root, dsn, tmp_path_factory.mktemp("log") / "server.log")
    server.start()
    server.wait_alive()
    yield server
    assert server.stop() == 0


@pytest.fixture
def rows(models: Models) -> Rows:
    return Rows(models)


@pytest.fixture
def place(rows: Rows) -> Environment:
    """An environment with a name of its own, so that one server can serve all tests."""
    return rows.environment(next(NAMES))


def ask(client: Client, models: Models, place: Environment, **fields: Any) -> Answer:
    return client.complete(place.alias, models.prompt, max_tokens=24, **fields)


def answers_from(server: Server, models: Models, place: Environment, generation: int, digest: str) -> Answer:
    """Wait for an answer of ``generation``, and check that it is what ``digest`` says."""
    until(lambda: server.report(place).generation == generation, 30, lambda: f"{vars(server.report(place))}")
    answer = ask(server.client, models, place)
    assert answer.status == 200
    assert answer.headers["x-deltaworks-generation"] == str(generation)
    assert answer.headers["x-deltaworks-digest"] == digest
    assert answer.headers["x-deltaworks-environment"] == place.name
    assert answer.text == models.answers[digest]
    return answer


def test_deploy_compress_and_roll_back(server: Server, models: Models, rows: Rows, place: Environment) -> None:
    full, small = models.variant_digest, models.artifact_digest
    rows.full_precision(place)
    answers_from(server, models, place, 1, full)
    rows.compressed(place)
    answers_from(server, models, place, 2, small)
    rows.rollback(place)
    answers_from(server, models, place, 3, full)
    until(lambda: server.report(place).answers == 3, 10)
    said = server.report(place)
    assert (said.state, said.wanted, said.digest, said.message) == ("serving", 3, full, "")
    assert (said.server, said.address) == ("server-1", f"http://127.0.0.1:{server.port}")
    assert said.resident_bytes > 0
    assert said.started_at < said.reported_at


def test_every_answer_under_load_is_of_the_digest_that_it_names(
    server: Server, models: Models, rows: Rows, place: Environment
) -> None:
    """Rollbacks under load: no failed answer, no mixed answer, and full precision within two seconds."""
    rows.full_precision(place)
    answers_from(server, models, place, 1, models.variant_digest)
    stop, seen = threading.Event(), list[tuple[float, Answer]]()

    def load() -> None:
        while not stop.is_set():
            answer = ask(server.client, models, place)
            seen.append((time.monotonic(), answer))

    waits = []
    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(load) for _ in range(3)]
        try:
            for _ in range(4):
                rows.compressed(place)
                until(lambda: server.report(place).generation == place.generation, 30)
                until(lambda: _last(seen) == models.artifact_digest, 10)
                rows.rollback(place)
                moved = time.monotonic()
                until(lambda: server.report(place).generation == place.generation, 10)
                time.sleep(0.3)
                late = [at for at, one in seen if one.headers["x-deltaworks-digest"] == models.artifact_digest]
                waits.append(max(0.0, max(late) - moved))
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert {answer.status for _, answer in seen} == {200}
    assert all(answer.text == models.answers[answer.headers["x-deltaworks-digest"]] for _, answer in seen)
    assert max(waits) <= 2.0, waits


def test_generations_in_answers_never_go_back(server: Server, models: Models, rows: Rows, place: Environment) -> None:
    rows.full_precision(place)
    answers_from(server, models, place, 1, models.variant_digest)
    generations = []
    for move in (rows.compressed, rows.rollback, rows.compressed, rows.full_precision):
        move(place)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and server.report(place).generation < place.generation:
            generations.append(int(ask(server.client, models, place).headers["x-deltaworks-generation"]))
    answers_from(server, models, place, 5, models.variant_digest)
    assert generations == sorted(generations)


def test_a_damaged_artifact_is_refused_by_name_and_the_previous_generation_answers(
    models: Models, rows: Rows, place: Environment, link: Link, server_password: str, tmp_path: Path
) -> None:
    """A store of its own, so that nothing is in memory before the damage."""
    store = tmp_path / "store"
    shutil.copytree(models.store.root, store, symlinks=True)
    damaged = _flip_a_bit(models, store)
    call_command("serving_grants")
    server = Server(
        store, server_dsn(server_password, link.port), tmp_path / "log", "--environment", place.name, name="server-2"
    )
    server.start()
    server.wait_alive()
    try:
        rows.full_precision(place)
        answers_from(server, models, place, 1, models.variant_digest)
        rows.compressed(place)
        until(lambda: server.report(place).state == "refused", 30, lambda: f"{vars(server.report(place))}")
        assert (server.report(place).wanted, server.report(place).generation) == (2, 1)
        assert damaged in server.report(place).message
        answers_from(server, models, place, 1, models.variant_digest)
        server.kill()
        server.start()
        server.wait_alive()
        until(lambda: server.report(place).state == "fallback", 60, lambda: f"{vars(server.report(place))}")
        assert damaged in server.report(place).message
        answers_from(server, models, place, 2, models.variant_digest)
    finally:
        server.stop()


def _flip_a_bit(models: Models, store: Path) -> str:
    """Damage the artifact's largest file in the middle; its name."""
    manifest = json.loads((models.store.path(models.artifact_digest)).read_bytes())
    name, entry = max(manifest["files"].items(), key=lambda item: item[1]["size"])
    blob = store / "sha256" / entry["sha256"][:2] / entry["sha256"]
    raw = bytearray(blob.read_bytes())
    raw[len(raw) // 2] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(raw)
    return name


def test_a_store_that_is_gone_does_not_stop_a_rollback(
    models: Models, rows: Rows, place: Environment, link: Link, server_password: str, tmp_path: Path
) -> None:
    """The way back is in memory: every blob may be cut or deleted under the running server."""
    store = tmp_path / "store"
    shutil.copytree(models.store.root, store, symlinks=True)
    call_command("serving_grants")
    server = Server(
        store, server_dsn(server_password, link.port), tmp_path / "log", "--environment", place.name, name="server-2"
    )
    rows.compressed(place)
    server.start()
    server.wait_alive()
    try:
        answers_from(server, models, place, 1, models.artifact_digest)
        for blob in (store / "sha256").glob("*/*"):
            blob.chmod(0o644)
            blob.write_bytes(b"")
        shutil.rmtree(store)
        answers_from(server, models, place, 1, models.artifact_digest)
        rows.rollback(place)
        answers_from(server, models, place, 2, models.variant_digest)
    finally:
        server.stop()


def test_a_database_that_was_set_back_is_not_followed(
    server: Server, models: Models, rows: Rows, place: Environment
) -> None:
    rows.full_precision(place)
    rows.compressed(place)
    answers_from(server, models, place, 2, models.artifact_digest)
    _set_back(place, generation=1)
    until(lambda: server.report(place).state == "rewound", 10, lambda: f"{vars(server.report(place))}")
    assert "set back" in server.report(place).message
    answers_from(server, models, place, 2, models.artifact_digest)
    _set_back(place, generation=2)
    rows.rollback(place)
    answers_from(server, models, place, 3, models.variant_digest)
    assert server.report(place).state == "serving"


def _set_back(place: Environment, generation: int) -> None:
    """What a restore of an older backup does: the row as it was, no trigger asked."""
    import pgtrigger

    active = place.deployments.get(generation=generation)
    with pgtrigger.ignore("dashboard.Environment:generation_grows_by_one"):
        Environment.objects.filter(pk=place.pk).update(generation=generation, active=active)


def test_a_server_that_was_killed_answers_again(server: Server, models: Models, rows: Rows, place: Environment) -> None:
    rows.compressed(place)
    answers_from(server, models, place, 1, models.artifact_digest)
    server.kill()
    with pytest.raises(OSError, match="refused"):
        server.client.get("/livez")
    before = server.report(place).reported_at
    server.start()
    server.wait_alive()
    assert ask(server.client, models, place).status in (200, 503)
    until(lambda: server.report(place).reported_at > before and server.report(place).state == "serving", 60)
    answers_from(server, models, place, 1, models.artifact_digest)
    assert ServerReport.objects.filter(environment=place.name).count() == 1


def test_without_a_database_it_keeps_answering_and_catches_up(
    server: Server, link: Link, models: Models, rows: Rows, place: Environment
) -> None:
    rows.compressed(place)
    answers_from(server, models, place, 1, models.artifact_digest)
    link.cut()
    try:
        rows.rollback(place)
        until_time = time.monotonic() + 3
        while time.monotonic() < until_time:
            answer = ask(server.client, models, place)
            assert (answer.status, answer.text) == (200, models.answers[models.artifact_digest])
            assert answer.headers["x-deltaworks-generation"] == "1"
        assert server.client.get("/readyz").status == 200
    finally:
        link.restore()
    answers_from(server, models, place, 2, models.variant_digest)


def test_broken_glass_brings_full_precision_while_the_database_is_away(
    server: Server, link: Link, models: Models, rows: Rows, place: Environment
) -> None:
    rows.compressed(place)
    answers_from(server, models, place, 1, models.artifact_digest)
    link.cut()
    try:
        server.process.send_signal(signal.SIGUSR1)
        until(lambda: _digest(ask(server.client, models, place)) == models.variant_digest, 5)
    finally:
        link.restore()
    until(lambda: server.report(place).state == "fallback", 20)
    answers_from(server, models, place, 1, models.variant_digest)
    rows.compressed(place)
    answers_from(server, models, place, 2, models.artifact_digest)
    assert server.report(place).state == "serving"


def test_a_database_that_was_never_reached_leaves_it_unready_and_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = probe.getsockname()[1]
    monkeypatch.setattr("compression_worker.serving.follower.STALE_SECONDS", 0.3)
    variants = Variants()
    follower = Follower(
        dsn=f"postgres://nobody@127.0.0.1:{nobody}/nothing",
        identity=Identity(server="server-3", address=""),
        environments=["production"],
        variants=variants,
        make_switch=lambda name, changed: Switch(name, variants, Loader(Store("unused")), changed),
    )
    follower.start()
    try:
        assert (follower.ready, follower.stale) == (False, False)
        until(lambda: follower.stale, 5)
        assert not follower.ready
        with pytest.raises(NotReady), variants.checkout("support"):
            pass
        assert [status.state for status in follower.statuses()] == ["starting"]
    finally:
        follower.stop()


def _digest(answer: Answer) -> str:
    return answer.headers["x-deltaworks-digest"]


def test_readiness_names_every_environment(server: Server, models: Models, rows: Rows, place: Environment) -> None:
    rows.full_precision(place)
    answers_from(server, models, place, 1, models.variant_digest)
    body = server.client.get("/readyz").json()
    assert (body["ready"], body["stale"]) == (True, False)
    assert body["environments"][place.name]["state"] == "serving"
    assert place.alias in [model["id"] for model in server.client.get("/v1/models").json()["data"]]


def test_the_servers_role_may_do_nothing_else(
    server: Server, rows: Rows, place: Environment, link: Link, server_password: str
) -> None:
    rows.full_precision(place)
    forbidden = [
        "SELECT * FROM dashboard_environment",
        "SELECT * FROM dashboard_user",
        "UPDATE dashboard_environment SET alias = 'x'",
        "INSERT INTO dashboard_deployment (generation) VALUES (1)",
        "DELETE FROM dashboard_serverreport",
        "TRUNCATE dashboard_serverreport",
        "UPDATE serving_pointer SET generation = 9",
        "CREATE TABLE mine (id int)",
    ]
    with psycopg.connect(server_dsn(server_password, link.port), autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM serving_pointer").fetchone() == (1,)
        for statement in forbidden:
            with pytest.raises(psycopg.Error):
                connection.execute(statement)


def test_grants_refuse_a_role_that_is_missing_or_all_powerful() -> None:
    with pytest.raises(CommandError, match="there is no database role"):
        call_command("serving_grants", "--role", "nobody-made-me")
    with pytest.raises(CommandError, match="superuser"):
        call_command("serving_grants", "--role", "postgres")


def _last(seen: list[tuple[float, Answer]]) -> str:
    return seen[-1][1].headers.get("x-deltaworks-digest", "") if seen else ""
