"""Tensors that steps hand to each other: safetensors blobs in the store, hashed again before any of them is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from compression_worker.contracts import StepContext
from compression_worker.tensors import Spec, TensorFile, raw_bytes, write_file

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


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
    """Write a blob of fp32 and bf16 tensors; its digest."""
    return write_pieces(
        context, {name: (Spec(_NAMES[t.dtype], tuple(t.shape)), [raw_bytes(t)]) for name, t in tensors.items()}
    )
