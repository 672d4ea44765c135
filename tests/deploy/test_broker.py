"""The embedded broker: a password, and messages that survive a kill -9."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import redis

from deploy import processes
from deploy.broker import EmbeddedBroker


def _start(broker: EmbeddedBroker, log: Path) -> subprocess.Popen[bytes]:
    process = processes.start(broker.command(), log=log)
    processes.wait_for(broker.ready, process, what="broker", log=log, seconds=20)
    return process


def test_messages_survive_a_kill(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path / "broker", password="secret", port=processes.free_port())
    process = _start(broker, tmp_path / "log")
    try:
        redis.Redis.from_url(broker.url()).rpush("queue", "wake")
        time.sleep(1.5)  # the file is forced to disk each second
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = _start(broker, tmp_path / "log")
        assert redis.Redis.from_url(broker.url()).lrange("queue", 0, -1) == [b"wake"]
    finally:
        processes.stop(process)


def test_it_asks_for_a_password_and_keeps_it_out_of_the_process_list(tmp_path: Path) -> None:
    broker = EmbeddedBroker(tmp_path / "broker", password="secret", port=processes.free_port())
    process = _start(broker, tmp_path / "log")
    try:
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=broker.port).ping()
        assert b"secret" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert (broker.folder / "valkey.conf").stat().st_mode & 0o077 == 0
    finally:
        processes.stop(process)
