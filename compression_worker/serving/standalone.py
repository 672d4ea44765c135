"""Serving without a database: one base folder, and artifacts made against it, each under a name of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint, attach_folder
from compression_worker.serving.loading import Loader, on_base
from compression_worker.serving.variants import Handle, Resident, Variants
from compression_worker.store import Store


def load_folders(
    variants: Variants, base: Path, artifacts: Mapping[str, Path], *, scratch: Path, device: str = "cpu"
) -> None:
    """Let the folder ``base`` answer under its own name, and each artifact folder under the name it was given.

    ``scratch`` takes links to the base's files; nothing of the weights is copied to it.
    """
    store = Store(scratch)
    digest = attach_folder(store, base)
    _answer(variants, base.absolute().name, Loader(store, device=device).full_precision(digest, _never))
    for name, folder in artifacts.items():
        with Checkpoint.open(store, digest) as checkpoint:
            _answer(variants, name, on_base(checkpoint, Artifact.open_folder(folder), device, _never))


def _answer(variants: Variants, name: str, resident: Resident) -> None:
    variants.swap(Handle(environment=name, alias=name, generation=1, resident=resident))


def _never() -> bool:
    return False
