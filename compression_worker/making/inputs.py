"""The checkpoints that a step is given, and what their configuration promises."""

from __future__ import annotations

from functools import lru_cache

from compression_worker.architecture import Architecture, describe
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import StepContext
from compression_worker.store import Store


def opened(context: StepContext, name: str) -> Checkpoint:
    """The checkpoint given as input ``name``."""
    return _opened(context.store, context.spec.inputs[name])


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    """What a checkpoint's config.json promises, under the names that its tensors have."""
    return describe(checkpoint.manifest["config"]).renamed_for(checkpoint.manifest["tensors"])


@lru_cache(maxsize=4)
def _opened(store: Store, digest: str) -> Checkpoint:
    """Remembered, because every layer of a job asks for the same two manifests."""
    return Checkpoint.open(store, digest)
