"""Tensors that steps hand to each other come back as they were, and a damaged blob is refused unread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_worker.contracts import CompressionError, StepContext, StepSpec
from compression_worker.making.blobs import open_blob, read_blob, write_blob
from compression_worker.store import Store


def context(store: Store) -> StepContext:
    quiet: Any = lambda *_: None  # noqa: E731
    return StepContext(
        store=store, spec=StepSpec(kind="", params={}, inputs={}), progress=quiet, log=quiet, measure=quiet
    )


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(raw)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    at = context(Store(tmp_path, durable=False))
    tensors = {"rows": torch.randn(3, 5), "fine": torch.randn(7).bfloat16(), "none": torch.zeros(0)}
    digest = write_blob(at, tensors)
    found = read_blob(at, digest)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert write_blob(at, tensors) == digest


@pytest.mark.parametrize("read", [open_blob, read_blob])
def test_a_damaged_blob_is_refused(tmp_path: Path, read: Callable[[StepContext, str], Any]) -> None:
    at = context(Store(tmp_path, durable=False))
    digest = write_blob(at, {"scales": torch.ones(40)})
    damage(at.store.path(digest))
    with pytest.raises(CompressionError) as refused:
        read(at, digest)
    assert refused.value.code == "damaged_blob"
