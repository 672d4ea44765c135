"""The folder of a stack: private, made once, one supervisor at a time."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deploy.home import Home, RunsAlready


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.secrets()
    assert home.folder.stat().st_mode & 0o777 == 0o700
    assert (home.folder / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_secrets_are_made_once_and_differ(tmp_path: Path) -> None:
    first = Home(tmp_path / "home").secrets()
    assert Home(tmp_path / "home").secrets() == first
    assert len(set(first.values())) == len(first)
    assert Home(tmp_path / "other").secrets() != first


def test_ports_are_kept_unless_somebody_took_them(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    first = home.choose_ports()
    assert home.choose_ports() == first
    with socket.socket() as other:
        other.bind(("127.0.0.1", first["web"]))
        other.listen()
        assert home.choose_ports()["web"] != first["web"]


def test_a_second_supervisor_is_told_where_the_first_one_answers(tmp_path: Path) -> None:
    first = Home(tmp_path / "home")
    first.lock()
    first.write("status.json", {"address": "http://127.0.0.1:8000", "pid": 42})
    with pytest.raises(RunsAlready, match=r"http://127\.0\.0\.1:8000 \(process 42\)"):
        Home(tmp_path / "home").lock()
