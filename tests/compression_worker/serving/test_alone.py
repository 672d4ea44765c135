"""Serving what stands alone: no base is read for it, from a store, behind a pointer, and from folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from compression_worker.artifact import Artifact, restore, write_folder
from compression_worker.checkpoints import attach_folder
from compression_worker.contracts import CompressionError, StepOutput, StepSpec
from compression_worker.runner import run_plan
from compression_worker.samples import TEXT, parse_samples
from compression_worker.serving.loading import Loader
from compression_worker.serving.standalone import load_folders
from compression_worker.serving.switch import Pointer, Switch
from compression_worker.serving.variants import Variants
from compression_worker.store import Store
from tests.compression_worker.serving.client import SERVE, Client, until
from tests.compression_worker.serving.stored import Models, greedy
from tests.compression_worker.serving.test_switch import wait_for

TEXTS = b"".join(json.dumps({"text": f"Sentence {n}: the fox jumps over the dog."}).encode() + b"\n" for n in range(60))


def never() -> bool:
    return False


@dataclass(frozen=True)
class Alone:
    """The base of the other tests, quantized by itself, and what that answers."""

    models: Models
    output: StepOutput
    answer: str

    @property
    def digest(self) -> str:
        return str(self.output.data["artifact"])


@pytest.fixture(scope="module")
def alone(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    plan = StepSpec(
        kind="gptq.plan",
        params={"config": {"num_bits": 4, "samples": 4, "length": 32}},
        inputs={
            "variant": models.base_digest,
            "calibration": models.store.write_bytes(parse_samples(TEXTS, TEXT).data),
        },
    )
    output = run_plan(models.store, plan, device="cpu")
    torch.use_deterministic_algorithms(False)
    folder = tmp_path_factory.mktemp("restored") / "model"
    restore(None, Artifact.open_store(models.store, output.data["artifact"]), folder, lambda done, total, unit: None)
    store = Store(tmp_path_factory.mktemp("scratch"))
    resident = Loader(store).full_precision(attach_folder(store, folder), never)
    return Alone(models, output, greedy(resident, models.prompt))


@pytest.fixture
def lonely_store(alone: Alone, tmp_path: Path) -> Store:
    """A copy in which nothing of the base is left but its side files: an artifact has its own copies of those."""
    shutil.copytree(alone.models.store.root, tmp_path / "store", symlinks=True)
    store = Store(tmp_path / "store")
    files = json.loads(store.read_bytes(alone.models.base_digest))["files"]
    for name, entry in files.items():
        if name.endswith(".safetensors"):
            store.path(entry["sha256"]).unlink()
    return store


def test_the_base_is_neither_read_nor_hashed(alone: Alone, lonely_store: Store) -> None:
    for base in (alone.models.base_digest, "0" * 64, None):
        resident = Loader(lonely_store).compressed(alone.digest, base, never)
        assert resident.digest == alone.digest
        assert greedy(resident, alone.models.prompt) == alone.answer


def test_a_file_of_its_own_that_is_damaged_is_refused(alone: Alone, lonely_store: Store) -> None:
    name, entry = next(item for item in sorted(_files(alone, lonely_store).items()) if item[0].endswith(".safetensors"))
    path = lonely_store.path(entry["sha256"])
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CompressionError, match=name):
        Loader(lonely_store).compressed(alone.digest, None, never)


def _files(alone: Alone, store: Store) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(store.read_bytes(alone.digest))["files"]
    return found


def test_a_difference_without_its_base_is_refused(models: Models) -> None:
    with pytest.raises(CompressionError, match="difference from its base") as refused:
        Loader(models.store).compressed(models.artifact_digest, None, never)
    assert refused.value.code == "missing_base"


def test_a_pointer_to_it_answers_with_full_precision_beside_it(alone: Alone) -> None:
    base, variants = alone.models.base_digest, Variants()
    switch = Switch("production", variants, Loader(alone.models.store), lambda: None)
    pointer = Pointer(
        environment="production", alias="support", generation=1, kind="compressed", variant_digest=base,
        base_digest=base, artifact_digest=alone.digest, digest=alone.digest,
    )  # fmt: skip
    switch.see(pointer)
    wait_for(switch, "serving", 1, alone.digest)
    assert variants.resident_digests() == sorted([alone.digest, base])
    switch.see(replace(pointer, generation=2, kind="rollback", base_digest=None, artifact_digest=None, digest=base))
    wait_for(switch, "serving", 2, base)


def test_a_pointer_to_a_difference_that_names_no_base_does_not_pass_for_full_precision(models: Models) -> None:
    variants = Variants()
    switch = Switch("production", variants, Loader(models.store), lambda: None)
    pointer = Pointer(
        environment="production", alias="support", generation=1, kind="compressed", base_digest=None,
        variant_digest=models.variant_digest, artifact_digest=models.artifact_digest, digest=models.artifact_digest,
    )  # fmt: skip
    switch.see(pointer)
    wait_for(switch, "fallback", 1, models.variant_digest)
    assert "difference from its base" in switch.status().message


@pytest.fixture(scope="module")
def folders(alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An artifact that stands alone, and a difference."""
    out = tmp_path_factory.mktemp("artifacts")
    write_folder(out / "whole", alone.models.store, alone.output.blobs)
    write_folder(out / "delta", alone.models.store, alone.models.artifact.blobs)
    return out / "whole", out / "delta"


def test_folders_answer_with_and_without_a_base(alone: Alone, folders: tuple[Path, Path], tmp_path: Path) -> None:
    whole, delta = folders
    variants = Variants()
    load_folders(variants, None, {"small": whole}, scratch=tmp_path / "a")
    assert [handle.alias for handle in variants.handles()] == ["small"]
    with variants.checkout("small") as answering:
        assert greedy(answering.resident, alone.models.prompt) == alone.answer

    base = alone.models.store.root.parent / "imports" / "base"
    both = Variants()
    load_folders(both, base, {"small": whole, "support": delta}, scratch=tmp_path / "b")
    with both.checkout("small") as small, both.checkout("support") as support:
        assert greedy(small.resident, alone.models.prompt) == alone.answer
        assert greedy(support.resident, alone.models.prompt) == alone.models.answers[alone.models.artifact_digest]


def test_a_difference_among_folders_without_a_base_is_named_before_anything_is_loaded(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    variants = Variants()
    with pytest.raises(CompressionError, match="artifact of 'support' is a difference from its base: give --base"):
        load_folders(variants, None, {"small": folders[0], "support": folders[1]}, scratch=tmp_path)
    assert variants.handles() == []


def test_the_command_serves_it_without_a_base(alone: Alone, folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = [*SERVE, "--variant", f"small={folders[0]}", "--port", "0"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        until(lambda: "listening on" in log.read_text() or process.poll() is not None, 240)
        port = int(log.read_text().split("listening on http://127.0.0.1:")[1].split("/")[0])
        client = Client(port)
        until(lambda: _alive(client), 20, log.read_text)
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["small"]
        assert client.complete("small", alone.models.prompt, max_tokens=24).text == alone.answer
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
