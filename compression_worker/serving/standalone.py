"""Serving without a database: artifact folders, each under a name of its own, and the base that deltas stand on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint, attach_folder
from compression_worker.contracts import CompressionError
from compression_worker.serving.loading import Loader, compressed_resident
from compression_worker.serving.variants import Handle, Resident, Variants
from compression_worker.store import Store


def load_folders(
    variants: Variants, base: Path | None, artifacts: Mapping[str, Path], *, scratch: Path, device: str = "cpu"
) -> None:
    """Let the folder ``base`` answer under its own name, and each artifact folder under the name it was given.

    Without a base every artifact has to stand alone. ``scratch`` takes links to the base's files; nothing of the
    weights is copied to it.
    """
    opened = {name: Artifact.open_folder(folder) for name, folder in artifacts.items()}
    _check_bases(opened, base)
    store = Store(scratch)
    digest = attach_folder(store, base) if base else ""
    if base:
        _answer(variants, base.absolute().name, Loader(store, device=device).full_precision(digest, _never))
    for name, artifact in opened.items():
        if artifact.stands_alone:
            _answer(variants, name, compressed_resident(None, artifact, device, _never))
            continue
        with Checkpoint.open(store, digest) as checkpoint:
            _answer(variants, name, compressed_resident(checkpoint, artifact, device, _never))


def _check_bases(opened: Mapping[str, Artifact], base: Path | None) -> None:
    """Refuse a difference without its base before anything is loaded."""
    wanting = [name for name, artifact in opened.items() if not artifact.stands_alone]
    if wanting and base is None:
        raise CompressionError(
            "missing_base", f"the artifact of '{wanting[0]}' is a difference from its base: give --base DIR as well"
        )


def _answer(variants: Variants, name: str, resident: Resident) -> None:
    variants.swap(Handle(environment=name, alias=name, generation=1, resident=resident))


def _never() -> bool:
    return False
