"""What the stack tells its processes, with embedded servers and with real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.home import Home
from deploy.local import Stack

PORTS = {"web": 8000, "server": 8100, "postgres": 5000, "broker": 6000}
REAL = {
    "DATABASE_URL": "postgres://deltaworks:secret@db.example/deltaworks",
    "CELERY_BROKER_URL": "redis://broker.example/0",
    "ARTIFACT_ROOT": "/srv/store",
    "IMPORT_ROOTS": "models=/srv/models",
    "SECRET_KEY": "a real key",
}


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    for name in (*REAL, "DELTAWORKS_SERVER_DSN"):
        monkeypatch.delenv(name, raising=False)
    return Stack(Home(tmp_path / "home"), PORTS)


def _names(stack: Stack) -> list[str]:
    return [child.name for child in stack._applications()]


def test_the_embedded_servers_are_used_when_nothing_is_set(stack: Stack) -> None:
    env = stack.environment()
    assert env["DATABASE_URL"].startswith("postgres://deltaworks:")
    assert env["DATABASE_URL"].endswith("@127.0.0.1:5000/deltaworks")
    assert env["CELERY_BROKER_URL"].endswith("@127.0.0.1:6000/0")
    assert env["ARTIFACT_ROOT"] == str(stack.home.folder / "store")
    assert _names(stack) == ["web", "worker", "beat", "server"]


def test_real_servers_take_the_place_of_the_embedded_ones(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REAL.items():
        monkeypatch.setenv(name, value)
    env = stack.environment()
    assert {name: env[name] for name in REAL if name != "IMPORT_ROOTS"} == {
        name: value for name, value in REAL.items() if name != "IMPORT_ROOTS"
    }
    assert env["IMPORT_ROOTS"].split(",")[-1] == "models=/srv/models"


def test_without_the_servers_own_role_no_server_is_started_on_a_real_database(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", REAL["DATABASE_URL"])
    assert "server" not in _names(stack)
    assert "DELTAWORKS_SERVER_DSN does not say" in capsys.readouterr().out
    monkeypatch.setenv("DELTAWORKS_SERVER_DSN", "postgres://reader:secret@db.example/deltaworks")
    assert "server" in _names(stack)
    assert stack.server_environment()["DELTAWORKS_SERVER_DSN"].startswith("postgres://reader:")


def test_the_server_gets_no_secret_of_the_others(stack: Stack) -> None:
    env = stack.server_environment()
    assert not {"DATABASE_URL", "CELERY_BROKER_URL", "SECRET_KEY"} & set(env)
    secrets = stack.home.secrets()
    assert secrets["server"] in env["DELTAWORKS_SERVER_DSN"]
    assert not [
        name for name in ("owner", "postgres", "secret_key", "broker") if secrets[name] in "\n".join(env.values())
    ]
