"""Tensors that steps hand to each other: safetensors blobs in the store, hashed again before any of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from compression_worker.contracts import StepContext
from compression_worker.tensors import Spec, TensorFile, whole, write_file


def open_blob(context: StepContext, digest: str) -> TensorFile:
    """The blob as an open file. Raises :class:`CompressionError` where its bytes are not those that it is named by."""
    return TensorFile(context.store.verified_path(digest))


def read_blob(context: StepContext, digest: str) -> dict[str, torch.Tensor]:
    """All tensors of a blob by name, in memory."""
    with open_blob(context, digest) as file:
        return {name: file.tensor(name) for name in file.entries}


def write_pieces(context: StepContext, tensors: Mapping[str, tuple[Spec, Iterable[memoryview]]]) -> str:
    """Write a blob from specs and bytes; its digest."""
    with context.store.writer() as blob:
        write_file(blob, tensors)
    return blob.digest


def write_blob(context: StepContext, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write a blob of tensors; its digest."""
    return write_pieces(context, {name: whole(tensor) for name, tensor in tensors.items()})
