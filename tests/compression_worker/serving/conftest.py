"""A tiny model in memory, and the API around it on a real port."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compression_worker.serving.app import create_app
from compression_worker.serving.engine import Engine
from compression_worker.serving.variants import Handle, Resident, Variants
from tests.compression_worker.serving.client import Client, running
from tests.compression_worker.serving.stored import Models, make_models
from tests.tiny import make_tiny_pair

POISON = 200
"""A token whose embedding is infinite in the poisoned model."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_pair(tmp_path_factory.mktemp("tiny"), tied=False, dtype=torch.float32)


def resident_from(folder: Path, digest: str) -> Resident:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Resident(digest, model, AutoTokenizer.from_pretrained(folder), model.config.max_position_embeddings)


@pytest.fixture(scope="session")
def full_precision(tiny_folders: tuple[Path, Path]) -> Resident:
    return resident_from(tiny_folders[1], "a" * 64)


@pytest.fixture(scope="session")
def poisoned(tiny_folders: tuple[Path, Path]) -> Resident:
    """The base with one token that makes every number after it NaN: a model that breaks at run time."""
    resident = resident_from(tiny_folders[0], "b" * 64)
    with torch.no_grad():
        resident.model.get_input_embeddings().weight[POISON] = float("inf")
    return resident


def handle(resident: Resident, generation: int = 1, **fields: Any) -> Handle:
    return Handle(environment="production", alias="support", generation=generation, resident=resident, **fields)


@pytest.fixture
def variants(full_precision: Resident) -> Variants:
    table = Variants()
    table.swap(handle(full_precision))
    return table


@pytest.fixture
def client(variants: Variants) -> Iterator[Client]:
    engine = Engine(variants, answers=2, queue=4)
    with running(create_app(variants, engine, lambda: (True, {}))) as client:
        yield client
    engine.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base, a variant and an artifact in a store, made once."""
    return make_models(tmp_path_factory.mktemp("world"))
