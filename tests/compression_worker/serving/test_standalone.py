"""Serving folders without a database: names, answers, and flags that do not go together."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from compression_worker.artifact import write_folder
from compression_worker.contracts import CompressionError
from compression_worker.serving.command import add_serve_arguments, bound, break_glass, check_arguments
from compression_worker.serving.loading import Loader
from compression_worker.serving.standalone import load_folders
from compression_worker.serving.variants import Resident, Variants
from tests.compression_worker.serving.client import SERVE, Client, until
from tests.compression_worker.serving.conftest import handle
from tests.compression_worker.serving.stored import GREEDY, Models, greedy


@pytest.fixture(scope="module")
def artifact_folder(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "delta"
    write_folder(out, models.store, models.artifact.blobs)
    return out


def base_folder(models: Models) -> Path:
    return models.store.root.parent / "imports" / "base"


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser.parse_args(flags)


def test_the_base_answers_as_its_folder_and_each_artifact_as_its_name(
    models: Models, artifact_folder: Path, tmp_path: Path
) -> None:
    variants = Variants()
    load_folders(variants, base_folder(models), {"support": artifact_folder}, scratch=tmp_path)
    with variants.checkout("support") as answering:
        assert greedy(answering.resident, models.prompt) == models.answers[models.artifact_digest]
    with variants.checkout("base") as answering:
        said = greedy(answering.resident, models.prompt)
    base = Loader(models.store).full_precision(models.base_digest, lambda: False)
    assert said == greedy(base, models.prompt)


def test_a_damaged_artifact_folder_is_refused(models: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    write_folder(broken, models.store, models.artifact.blobs)
    weights = next(broken.glob("*.safetensors"))
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CompressionError, match=weights.name):
        load_folders(Variants(), base_folder(models), {"support": broken}, scratch=tmp_path / "scratch")


def test_the_command_serves_folders_and_ends_in_order(models: Models, artifact_folder: Path, tmp_path: Path) -> None:
    command = [*SERVE, "--base", str(base_folder(models)), "--variant", f"support={artifact_folder}", "--port", "0"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until(lambda: "listening on" in log.read_text() or process.poll() is not None, 120)
        port = int(log.read_text().split("listening on http://127.0.0.1:")[1].split("/")[0])
        client = Client(port)
        until(lambda: _alive(client), 20, log.read_text)
        answer = client.complete("support", models.prompt, max_tokens=GREEDY.max_tokens)
        assert answer.text == models.answers[models.artifact_digest]
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "support"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def _alive(client: Client) -> bool:
    try:
        return client.get("/readyz").status == 200
    except OSError:
        return False


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ([], "--store"),
        (["--base", "x", "--store", "y"], "--base and --variant stand alone"),
        (["--variant", "a=b", "--store", "y"], "--base and --variant stand alone"),
        (["--variant", "a=b", "--environment", "y"], "--base and --variant stand alone"),
        (["--variant", "a"], "NAME=ARTIFACT"),
        (["--base", "x", "--variant", "a"], "NAME=ARTIFACT"),
        (["--base", "x", "--variant", "=b"], "NAME=ARTIFACT"),
        (["--base", "x", "--variant", "a=b", "--variant", "a=c"], "name of its own"),
        (["--store", "y"], "DELTAWORKS_SERVER_DSN"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: list[str], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DELTAWORKS_SERVER_DSN", raising=False)
    with pytest.raises(CompressionError, match=word):
        check_arguments(parsed(*flags))


def test_a_port_that_is_taken_is_known_at_once() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        pytest.raises(CompressionError, match="cannot listen"),
        bound("127.0.0.1", first.getsockname()[1]),
    ):
        pass


def test_broken_glass_brings_full_precision_without_a_database(full_precision: Resident, poisoned: Resident) -> None:
    variants = Variants()
    variants.swap(handle(poisoned, 4, fallback=full_precision))
    began = time.monotonic()
    break_glass(variants)
    answering = variants.active("production")
    assert time.monotonic() - began < 1
    assert answering is not None
    assert (answering.generation, answering.digest) == (4, full_precision.digest)
    assert "SIGUSR1" in answering.fell_back
