"""From digests to models in memory: every byte is hashed again before it is believed, and a smoke prompt has to answer.

What comes out lies in memory of its own: a blob that is damaged, cut or deleted later cannot reach a model that
answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compression_worker.artifact import Artifact, load_artifact_tokenizer
from compression_worker.artifact import load_model as load_compressed
from compression_worker.checkpoints import Checkpoint, load_model, load_tokenizer
from compression_worker.contracts import CompressionError
from compression_worker.faults import failpoint
from compression_worker.serving.generation import NonFinite, smoke
from compression_worker.serving.variants import Resident
from compression_worker.store import Store

Abandoned = Callable[[], bool]


class LoadAbandoned(Exception):
    """A newer generation came: this load is of no use any more."""


class Loader:
    """Loads checkpoints and artifacts of one store onto one device."""

    def __init__(self, store: Store, *, device: str = "cpu") -> None:
        self._store = store
        self._device = device

    def full_precision(self, digest: str, abandoned: Abandoned) -> Resident:
        """The checkpoint whose manifest is ``digest``. Raises :class:`CompressionError`, :class:`LoadAbandoned`."""
        with self._verified("checkpoint", digest, abandoned) as checkpoint:
            model = load_model(checkpoint, device=self._device, dtype=answering_dtype(self._device))
            return finished(digest, model, load_tokenizer(checkpoint), abandoned)

    def compressed(self, digest: str, base: str | None, abandoned: Abandoned) -> Resident:
        """The artifact whose manifest is ``digest``, on the checkpoint ``base``.

        One that stands alone needs no base: whatever is named as such is neither read nor hashed.
        """
        what = f"artifact {digest[:12]}"
        with _named(f"the manifest of {what}"):
            artifact = Artifact.open_store(self._store, digest)
        if base is None or artifact.stands_alone:
            with _named(what):
                return compressed_resident(None, artifact, self._device, abandoned)
        with self._verified("base checkpoint", base, abandoned) as checkpoint, _named(what):
            return compressed_resident(checkpoint, artifact, self._device, abandoned)

    def _verified(self, what: str, digest: str, abandoned: Abandoned) -> Checkpoint:
        """The checkpoint, its manifest and every file hashed again; a refusal says which file."""
        with _named(f"the manifest of {what} {digest[:12]}"):
            checkpoint = Checkpoint.open(self._store, digest)
        for name, entry in sorted(checkpoint.manifest["files"].items()):
            if abandoned():
                raise LoadAbandoned
            failpoint("server.verify")
            with _named(f"'{name}' of {what} {digest[:12]}"):
                self._store.verified_path(entry["sha256"])  # of a bucket: the copy that is loaded in a moment
        return checkpoint


def answering_dtype(device: str) -> torch.dtype | None:
    """float32 on a CPU, as evaluations measure: a sum ``base + scale * sign`` rounded to bfloat16 is another model.

    On a GPU the delta is added by the kernel in float32 and the checkpoint's own dtype stays (None).
    """
    return torch.float32 if device == "cpu" else None


def compressed_resident(base: Checkpoint | None, artifact: Artifact, device: str, abandoned: Abandoned) -> Resident:
    """A compressed model from what was opened already; hashes the artifact's files.

    Raises :class:`CompressionError` (``missing_base``) for a difference without its ``base``.
    """
    if abandoned():
        raise LoadAbandoned
    model = load_compressed(base, artifact, device, answering_dtype(device))
    return finished(artifact.digest, model, load_artifact_tokenizer(artifact.with_base(base)), abandoned)


def finished(digest: str, model: Any, tokenizer: Any, abandoned: Abandoned) -> Resident:
    """A loaded model made fit to answer: in memory of its own, tried with a prompt, its context length known."""
    if abandoned():
        raise LoadAbandoned
    own_memory(model)
    failpoint("server.loaded")
    try:
        smoke(model, tokenizer)
    except NonFinite as error:
        message = f"{digest[:12]} answers the smoke prompt with numbers that are not finite: compress it again"
        raise CompressionError("not_finite", message) from error
    return Resident(digest, model, tokenizer, int(model.config.max_position_embeddings))


def own_memory(model: Any) -> None:
    """Copy the tensors out of memory-mapped files: a file cut short would otherwise end the process (SIGBUS)."""
    copies: dict[tuple[object, ...], Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            tensor.data = copies.setdefault(place, tensor.data.clone())


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Put the name of what is being read before whatever is wrong with it."""
    try:
        yield
    except CompressionError as error:
        raise CompressionError(error.code, f"{what}: {error.message}") from error
    except OSError as error:
        raise CompressionError("unreadable_file", f"{what} cannot be read: {error}") from error
