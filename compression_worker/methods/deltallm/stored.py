"""The files of an artifact: everything that is left of the checkpoint or its packed base, and the factors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from compression_worker import gate
from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError, Json, StepContext, sha256
from compression_worker.making.blobs import write_blob
from compression_worker.making.inputs import opened
from compression_worker.making.table import RAW_FILE, relative_error, six_digits
from compression_worker.methods.deltallm.config import SCALED, SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.differences import Pieces, dense
from compression_worker.methods.deltallm.layout import DELTAS_FILE, keys
from compression_worker.methods.deltallm.matrices import SharedMatrix
from compression_worker.methods.deltallm.sources import Sources
from compression_worker.methods.deltallm.student import LORA_SCALE
from compression_worker.quantization.rest import TRANSFORMERS
from compression_worker.tensors import Spec, TensorFile, checkpoint_files, raw_bytes, write_file

Pair = tuple[SharedMatrix, SharedMatrix]
"""A follower's matrix and its anchor's."""


class Deltas:
    """The file of all factors; ``lines`` of the table, of each weight.

    ``errors``: how far each is from what it was, relative to it; ``scales``: what its anchor is multiplied with, in the
    form that does so, unless it is left out.
    """

    def __init__(
        self, context: StepContext, config: DeltaLLMConfig, pairs: Sequence[Pair], factors: Mapping[str, Pieces]
    ) -> None:
        self.lines: dict[str, Json] = {}
        self.errors: dict[str, float] = {}
        self.scales: dict[str, float] = {}
        self._config, self._theirs = config, opened(context, "variant").manifest["tensors"]
        dtype: torch.dtype = getattr(torch, config.delta_dtype)
        flat: dict[str, torch.Tensor] = {}
        with Sources.of(context) as sources:
            for done, (follower, anchor) in enumerate(pairs, start=1):
                pieces = factors[follower.name]
                if config.share_form != SIGN:
                    pieces = tuple(one.to("cpu", dtype).contiguous() for one in pieces)
                flat |= dict(zip(keys(follower.name, config.share_form), pieces, strict=True))
                self.lines[follower.name] = self._line(follower, anchor, pieces)
                if config.share_form == SCALED and len(pieces[0]):
                    self.scales[follower.name] = six_digits(float(pieces[-1]))
                made = dense(pieces, sources.anchor(anchor))
                self.errors[follower.name] = _distance(made, sources.own(follower))
                context.progress(done, len(pairs), "matrices")
        self.digest = write_blob(context, dict(sorted(flat.items())))

    def _line(self, follower: SharedMatrix, anchor: SharedMatrix, pieces: Pieces) -> Json:
        form = self._config.share_form
        if not all(bool(one.isfinite().all()) for one in pieces):
            raise CompressionError(
                "not_finite",
                f"a factor of '{follower.name}' does not fit {self._config.delta_dtype}: set delta_dtype=bfloat16",
            )
        line: Json = {
            "kind": "shared",
            "file": DELTAS_FILE,
            "dtype": self._theirs[follower.name]["dtype"],
            "shape": list(follower.linear.shape),
            "anchor": anchor.name,
            "form": form,
            "sha256": sha256(b"".join(bytes(raw_bytes(one)) for one in pieces)),
        }
        if form != SIGN:
            line |= {"rank": len(pieces[0]), "delta_dtype": self._config.delta_dtype}
        return line | {"transposed": True} if follower.linear.transposed else line


def raw_parts(context: StepContext, parts: Mapping[str, str], shared: Collection[str]) -> dict[str, str]:
    """Every tensor of the checkpoint but shared weights and second names -> its part of the ledger."""
    manifest = opened(context, "variant").manifest
    left = {*shared, *dict(manifest["aliases"])}
    return {name: parts.get(name, "other") for name in sorted(manifest["tensors"]) if name not in left}


def raw_file(
    context: StepContext, names: Collection[str], tuned: Mapping[str, Pieces] | None = None
) -> tuple[str, dict[str, tuple[str, float]]]:
    """The tensors ``names`` of the checkpoint, byte for byte; the file's digest.

    Adapters are merged into those of ``tuned``, name -> ``A`` and ``B`` of a product that lies as the weight does: the
    second value holds their new digests, and how far they went, ``|change| / |W|``.
    """
    checkpoint = opened(context, "variant")
    tensors = checkpoint.manifest["tensors"]
    changes: dict[str, tuple[str, float]] = {}
    with checkpoint_files(checkpoint) as files, context.store.writer() as blob:

        def watched(at: int, name: str) -> Iterator[memoryview]:
            if tuned and name in tuned:
                weight = files.file(name).tensor(name)
                made = _merged(weight, *tuned[name])
                changes[name] = (sha256(raw_bytes(made)), _distance(made, weight))
                yield raw_bytes(made)
            else:
                yield from files.file(name).chunks(name)
            context.progress(at + 1, len(names), "tensors")

        data = {
            name: (Spec(tensors[name]["dtype"], tuple(tensors[name]["shape"])), watched(at, name))
            for at, name in enumerate(names)
        }
        write_file(blob, data, TRANSFORMERS)
    return blob.digest, changes


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``W + s B A``, rounded once to the weight's dtype."""
    return (weight.float() + LORA_SCALE * (b.float() @ a.float())).to(weight.dtype).contiguous()


def base_files(context: StepContext, base: Artifact, shared: Collection[str]) -> dict[str, str]:
    """The files of a packed base by digest, written anew without the codes of shared weights where they hold any.

    What belongs to a weight is called ``<module>.<piece>`` or ``<weight>#<piece>``. The base's own config.json and
    index stay behind: they describe the whole base.
    """
    begins = tuple(start for name in shared for start in (f"{name.removesuffix('.weight')}.", f"{name}#"))
    away = {gate.INDEX_FILE, *base.manifest["side_files"]}
    found = {}
    for file, entry in base.manifest["files"].items():
        if file in away:
            continue
        coded = file.endswith(".safetensors") and file != RAW_FILE
        digest = _without(context, entry["sha256"], begins) if coded else entry["sha256"]
        if digest:
            found[file] = digest
    return found


def _without(context: StepContext, digest: str, begins: tuple[str, ...]) -> str:
    """The file without tensors whose names begin so; nothing where none is left."""
    with TensorFile(context.store.verified_path(digest)) as file:
        kept = [name for name in file.entries if not name.startswith(begins)]
        if len(kept) == len(file.entries):
            return digest
        if not kept:
            return ""
        with context.store.writer() as blob:
            write_file(blob, {name: (file.entries[name].spec, file.chunks(name)) for name in kept}, TRANSFORMERS)
        return blob.digest


def _distance(made: torch.Tensor, weight: torch.Tensor) -> float:
    """``|made - weight| / |weight|``"""
    off = made.double() - weight.double()
    return relative_error(float(off.square().sum()), float(weight.double().square().sum()))
