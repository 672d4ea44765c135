"""The files of an artifact: everything that is left of the checkpoint, and the factors in the place of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from compression_worker.contracts import CompressionError, Json, StepContext, sha256
from compression_worker.making.blobs import write_pieces
from compression_worker.making.inputs import opened
from compression_worker.making.table import RAW_FILE, relative_error
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.layout import DELTAS_FILE
from compression_worker.methods.deltallm.matrices import SharedMatrix
from compression_worker.methods.deltallm.student import Factors, keys
from compression_worker.quantization.rest import TRANSFORMERS
from compression_worker.tensors import Spec, checkpoint_files, raw_bytes, whole, write_file

Pair = tuple[SharedMatrix, SharedMatrix]
"""A follower's matrix and its anchor's."""


class Stored:
    """Writes the blobs; ``lines`` are those of shared weights, ``raw`` says the part of every other tensor.

    ``errors``: ``|W - (W_a + B A)| / |W|`` of each shared weight.
    """

    def __init__(self, context: StepContext, config: DeltaLLMConfig, pairs: Sequence[Pair]) -> None:
        self.lines: dict[str, Json] = {}
        self.raw: dict[str, str] = {}
        self.errors: dict[str, float] = {}
        self._context, self._config, self._pairs = context, config, pairs
        self._checkpoint = opened(context, "variant")

    def deltas(self, factors: Mapping[str, Factors]) -> str:
        """The file of all factors; its digest."""
        dtype: torch.dtype = getattr(torch, self._config.delta_dtype)
        flat: dict[str, torch.Tensor] = {}
        with checkpoint_files(self._checkpoint) as files:
            for done, (follower, anchor) in enumerate(self._pairs, start=1):
                a, b = (one.to("cpu", dtype).contiguous() for one in factors[follower.name])
                first, second = keys(follower.name)
                flat |= {first: a, second: b}
                self.lines[follower.name] = self._line(follower, anchor, a, b)
                own, theirs = (_oriented(one, files.file(one.name).tensor(one.name)) for one in (follower, anchor))
                self.errors[follower.name] = _error(own, theirs, a, b)
                self._context.progress(done, len(self._pairs), "matrices")
        return write_pieces(self._context, {name: whole(one) for name, one in sorted(flat.items())})

    def rest(self, parts: Mapping[str, str]) -> dict[str, str]:
        """Every tensor of the checkpoint but shared weights and second names, byte for byte: file -> digest."""
        tensors = self._checkpoint.manifest["tensors"]
        left = {*self.lines, *dict(self._checkpoint.manifest["aliases"])}
        names = [name for name in sorted(tensors) if name not in left]
        self.raw = {name: parts.get(name, "other") for name in names}
        with checkpoint_files(self._checkpoint) as files, self._context.store.writer() as blob:

            def watched(at: int, name: str) -> Iterator[memoryview]:
                yield from files.file(name).chunks(name)
                self._context.progress(at + 1, len(names), "tensors")

            data = {
                name: (Spec(tensors[name]["dtype"], tuple(tensors[name]["shape"])), watched(at, name))
                for at, name in enumerate(names)
            }
            write_file(blob, data, TRANSFORMERS)
        return {RAW_FILE: blob.digest}

    def _line(self, follower: SharedMatrix, anchor: SharedMatrix, a: torch.Tensor, b: torch.Tensor) -> Json:
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise CompressionError(
                "not_finite",
                f"a factor of '{follower.name}' does not fit {self._config.delta_dtype}: set delta_dtype=bfloat16",
            )
        line: Json = {
            "kind": "shared",
            "file": DELTAS_FILE,
            "dtype": self._checkpoint.manifest["tensors"][follower.name]["dtype"],
            "shape": list(follower.linear.shape),
            "anchor": anchor.name,
            "rank": len(a),
            "delta_dtype": self._config.delta_dtype,
            "sha256": sha256(bytes(raw_bytes(a)) + bytes(raw_bytes(b))),
        }
        return line | {"transposed": True} if follower.linear.transposed else line


def _oriented(matrix: SharedMatrix, weight: torch.Tensor) -> torch.Tensor:
    """``W (N, K)`` in fp32."""
    return (weight.T if matrix.linear.transposed else weight).to(torch.float32)


def _error(weight: torch.Tensor, anchor: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    off = weight - torch.addmm(anchor, b.float(), a.float())
    return relative_error(float(off.double().square().sum()), float(weight.double().square().sum()))
