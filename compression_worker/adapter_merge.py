"""A PEFT adapter merged into its base: a checkpoint like any other, written shard by shard into the store.

``W' = W + s B A`` in float32, rounded once to the base's dtype; with DoRA ``W' = m (W + s B A) / |W + s B A|``, the
norm over the inputs of each output. A few rows of one matrix are in memory at a time, so that a base of any size is
merged where it would not fit; the PEFT library would hold all of it in float32. What the adapter does not touch keeps
its bytes, and a shard without a change stays the blob that it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from compression_worker import gate, intake
from compression_worker.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Changes,
    LowRank,
    Settings,
    changes,
    check_adapter_config,
)
from compression_worker.architecture import Architecture, describe
from compression_worker.checkpoints import (
    VOCABULARY_FILES,
    Checkpoint,
    Progress,
    check_texts,
    make_manifest,
    require_room,
)
from compression_worker.contracts import CompressionError, Json, sha256
from compression_worker.store import Store
from compression_worker.tensors import DTYPES, Spec, TensorFile, TensorFiles, checkpoint_files, raw_bytes, write_file

TILE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Product:
    """The delta of a stored matrix: ``left (rows, r) @ right (r, columns)``. DoRA: magnitudes along ``axis``."""

    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None
    axis: int


def take_adapter(store: Store, sources: dict[str, intake.Source], base: str, licence: str, progress: Progress) -> Json:
    """The manifest of the checkpoint ``base`` with the adapter in ``sources`` merged; its files lie in ``store``."""
    if not base:
        raise CompressionError(
            "adapter_without_base",
            "the folder holds a PEFT adapter, which is no model without its base: name the base that it was trained on",
        )
    if WEIGHTS_FILE not in sources:
        raise CompressionError("no_weights", f"the folder has '{CONFIG_FILE}' and no '{WEIGHTS_FILE}': copy it too")
    if strangers := sorted(name for name in sources if name.endswith(".safetensors") and name != WEIGHTS_FILE):
        raise CompressionError("unexpected_file", f"'{strangers[0]}' is no file of an adapter: remove it")
    settings = check_adapter_config(sources[CONFIG_FILE].read_text())
    shard = intake.read_header(sources[WEIGHTS_FILE])
    found = changes({tensor.name: tensor for tensor in shard.tensors}, settings)
    opened = Checkpoint.open(store, base)
    texts = _texts(store, sources, opened)
    require_room(store, shard.source.size + opened.manifest["weight_bytes"])
    with store.writer() as blob:
        intake.take_shard(shard, blob, lambda count: None)
    with TensorFile(store.path(blob.digest)) as adapter, checkpoint_files(opened) as weights:
        merge = Merge(opened, weights, adapter, found, settings)
        files, tensors = merge.write(store, progress)
    texts["config.json"], config = _config(texts["config.json"], merge.vocabulary)
    if gate.INDEX_FILE in texts:
        texts[gate.INDEX_FILE] = _index(tensors, merge.total_bytes)
    files |= {name: {"sha256": store.write_bytes(text), "size": len(text)} for name, text in texts.items()}
    source = {
        "kind": "adapter",
        "base": opened.fingerprint,
        "changed_tensors": merge.changed,
        "files": {CONFIG_FILE: sha256(sources[CONFIG_FILE].read_text()), WEIGHTS_FILE: blob.digest},
    }
    return make_manifest(files, tensors, config, licence) | {"source": source}


class Merge:
    """What each tensor of the base becomes. Everything is checked before the first weight is read.

    A tensor may be replaced and changed by a low rank at once: PEFT saves the embeddings beside their own adapter.
    """

    def __init__(
        self, base: Checkpoint, weights: TensorFiles, adapter: TensorFile, found: Changes, settings: Settings
    ) -> None:
        self._base, self._weights, self._adapter, self._settings = base, weights, adapter, settings
        architecture = describe(base.manifest["config"]).renamed_for(base.manifest["tensors"])
        aliases = dict(base.manifest["aliases"])
        stored = {architecture.memory.get(name, name): name for name in architecture.shapes} | {
            name: name for name in (*base.manifest["tensors"], *aliases)
        }
        for stack in architecture.stacks:
            if any(change.module.startswith(stack.rpartition(".")[0]) for change in found.low_rank.values()):
                raise CompressionError(
                    "unknown_adapter",
                    f"the adapter changes the experts in '{stack}' all at once (target_parameters), which is not "
                    "merged here. Merge it with merge_and_unload() where you trained it, and import the model that "
                    "this gives",
                )
        _require_known({**found.low_rank, **found.whole}, stored)
        self._low_rank = {stored[name]: change for name, change in found.low_rank.items()}
        self._whole = {stored[name]: name_in_adapter for name, name_in_adapter in found.whole.items()}
        self._check_tied(aliases)
        transposed = {linear.name for linear in architecture.linears() if linear.transposed}
        self._products = {name: self._shaped(name, one, name in transposed) for name, one in self._low_rank.items()}
        self.vocabulary = self._check_whole(architecture)
        self.total_bytes = 0
        self.changed = len(self._products.keys() | self._whole.keys())

    def write(self, store: Store, progress: Progress) -> tuple[dict[str, Json], dict[str, Json]]:
        """Every weight file with its changes; files and tensors as a manifest names them."""
        manifest = self._base.manifest
        files = {name: dict(entry) for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
        tensors = {name: dict(entry) for name, entry in manifest["tensors"].items()}
        done, total = 0, sum(entry["size"] for entry in files.values())
        for file, entry in files.items():
            # Wide types first, so that each tensor lies at a multiple of its width.
            names = sorted(
                (name for name, one in tensors.items() if one["file"] == file),
                key=lambda name: (-DTYPES[tensors[name]["dtype"]].itemsize, name),
            )
            if any(name in self._products or name in self._whole for name in names):
                store.verify(entry["sha256"])
                with store.writer() as blob:
                    write_file(blob, {name: self._data(name, tensors[name]) for name in names}, {"format": "pt"})
                files[file] = {"sha256": blob.digest, "size": store.size(blob.digest)}
            done += entry["size"]
            progress(done, total, "bytes")
        self.total_bytes = sum(self._spec(name).size for name in tensors)
        return files, tensors

    def _spec(self, name: str) -> Spec:
        own = self._weights.spec(name)
        return Spec(own.dtype, self._adapter.entries[self._whole[name]].spec.shape) if name in self._whole else own

    def _data(self, name: str, entry: Json) -> tuple[Spec, Iterator[memoryview]]:
        """The tensor's bytes; on the way its line of the manifest gets shape and digest."""
        spec = self._spec(name)
        if name in self._products:
            chunks = self._merged(name, self._products[name])
        elif name in self._whole:
            chunks = self._replaced(self._whole[name], DTYPES[spec.dtype])
        else:
            return spec, self._weights.file(name).chunks(name)
        return spec, _recorded(name, spec, chunks, entry)

    def _replaced(self, name: str, dtype: torch.dtype) -> Iterator[memoryview]:
        yield raw_bytes(self._adapter.tensor(name).to(dtype))

    def _merged(self, name: str, made: Callable[[], Product]) -> Iterator[memoryview]:
        product = made()
        dtype = DTYPES[self._weights.spec(name).dtype]
        factor = self._factor(name, product)
        for rows, tile in self._sums(name, product):
            if factor is not None:
                tile *= factor[rows].unsqueeze(1) if product.axis == 0 else factor
            yield raw_bytes(tile.to(dtype))

    def _sums(self, name: str, product: Product) -> Iterator[tuple[slice, torch.Tensor]]:
        """``W + left @ right`` in float32, some rows at a time."""
        step = max(1, TILE_ELEMENTS // product.right.shape[1])
        row = 0
        for tile in self._tiles(name, step):
            rows = slice(row, row + len(tile))
            yield rows, tile.to(torch.float32, copy=True).add_(product.left[rows] @ product.right)
            row += len(tile)

    def _tiles(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """The matrix below the product: the base's, or the one that the adapter brings (embeddings of new tokens)."""
        if name in self._whole:
            yield from self._adapter.tensor(self._whole[name]).split(rows)
        else:
            yield from self._weights.file(name).row_tiles(name, rows)

    def _factor(self, name: str, product: Product) -> torch.Tensor | None:
        """DoRA's ``m / |W + s B A|`` for each output."""
        if product.magnitude is None:
            return None
        squares = torch.zeros_like(product.magnitude)
        for rows, tile in self._sums(name, product):
            if product.axis == 0:
                squares[rows] = tile.square().sum(dim=1)
            else:
                squares += tile.square().sum(dim=0)
        return product.magnitude / squares.sqrt()

    def _shaped(self, name: str, change: LowRank, transposed: bool) -> Callable[[], Product]:
        """How to make the product; its shapes are checked now, its tensors are read when their turn comes."""
        a, b = (self._adapter.entries[side].spec.shape for side in (change.a, change.b))
        shape = list(self._spec(name).shape)
        turned = transposed or change.embedding
        if len(a) != 2 or len(b) != 2 or len(shape) != 2:
            raise _misfit(change.module, f"has A {list(a)} and B {list(b)} for a tensor {shape}")
        outputs, inputs = reversed(shape) if turned else shape
        if a[1] != inputs or b[0] != outputs or a[0] != b[1] or not a[0]:
            raise _misfit(change.module, f"is {b[0]} × {a[1]} in the adapter and {outputs} × {inputs} in the base")
        if change.magnitude and self._adapter.entries[change.magnitude].spec.shape != (outputs,):
            raise _misfit(change.module, f"has magnitudes for another number of outputs than {outputs}")
        scale = self._settings.scale(change.module, a[0])

        def made() -> Product:
            one, other = (self._adapter.tensor(side).float() for side in (change.a, change.b))
            magnitude = self._adapter.tensor(change.magnitude).float() if change.magnitude else None
            left, right = (one.T, other.T) if turned else (other, one)
            return Product(left * scale, right.contiguous(), magnitude, axis=1 if turned else 0)

        return made

    def _check_whole(self, architecture: Architecture) -> int | None:
        """Refuse whole tensors of another shape, but for a vocabulary that grew or shrank; its new size."""
        ends = {name for name, part in architecture.parts.items() if part in ("embeddings", "head")}
        sizes = {}
        for name, own in self._whole.items():
            shape, theirs = self._base.manifest["tensors"][name]["shape"], self._adapter.entries[own].spec.shape
            if list(theirs) == shape:
                continue
            if name not in ends or list(theirs[1:]) != shape[1:]:
                raise _misfit(name, f"is {list(theirs)} in the adapter and {shape} in the base")
            sizes[name] = theirs[0]
        if not sizes:
            return None
        rows = self._base.manifest["config"].get("vocab_size")
        tables = {name for name in ends if self._base.manifest["tensors"].get(name, {}).get("shape", [0])[0] == rows}
        if len(set(sizes.values())) > 1 or sizes.keys() != tables:
            raise _misfit(next(iter(sizes)), "has another vocabulary than other tensors of the model")
        return next(iter(sizes.values()))

    def _check_tied(self, aliases: dict[str, str]) -> None:
        """A head tied to the embeddings is one tensor: an adapter that changes one of them alone cannot be merged."""
        for head, embedding in aliases.items():
            low, own = {head, embedding} & self._low_rank.keys(), {head, embedding} & self._whole.keys()
            if not low and not own:
                continue
            both = len(own) == 2 and torch.equal(*(self._adapter.tensor(self._whole[name]) for name in sorted(own)))
            if low or not both:
                raise CompressionError(
                    "tied_weights_differ",
                    f"the adapter changes '{next(iter(low or own))}' alone, and the base ties its output head to its "
                    "embeddings: untie them, merge with merge_and_unload(), and import the model that this gives",
                )
            if head not in self._base.manifest["tensors"]:
                del self._whole[head]


def _require_known(found: dict[str, LowRank | str], stored: dict[str, str]) -> None:
    if missing := sorted(found.keys() - stored.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CompressionError(
            "adapter_mismatch",
            f"the adapter changes '{missing[0]}'{more}, which the base does not have: choose the base that the adapter "
            "was trained on",
        )


def _misfit(name: str, what: str) -> CompressionError:
    return CompressionError("adapter_mismatch", f"'{name}' {what}: choose the base that the adapter was trained on")


def _recorded(name: str, spec: Spec, chunks: Iterator[memoryview], entry: Json) -> Iterator[memoryview]:
    hasher = hashlib.sha256()
    for chunk in chunks:
        if any(intake.count_not_finite(chunk, spec.dtype)):
            raise CompressionError(
                "not_finite", f"'{name}' is not finite after the merge in {spec.dtype}: the adapter is broken"
            )
        hasher.update(chunk)
        yield chunk
    entry |= {"shape": list(spec.shape), "sha256": hasher.hexdigest()}


def _texts(store: Store, sources: dict[str, intake.Source], base: Checkpoint) -> dict[str, bytes]:
    """The base's small files, and the adapter's tokenizer in the place of the base's where it brings one."""
    own = {name: source.read_text() for name, source in sources.items() if name in gate.TOKENIZER_FILES}
    theirs = {
        name: store.read_bytes(entry["sha256"])
        for name, entry in base.manifest["files"].items()
        if not name.endswith(".safetensors")
        and not (own.keys() & set(VOCABULARY_FILES) and name in gate.TOKENIZER_FILES)
    }
    texts = theirs | own
    check_texts(texts)
    return texts


def _config(raw: bytes, vocabulary: int | None) -> tuple[bytes, Json]:
    config = gate.check_config("config.json", raw)
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
        raw = json.dumps(config, indent=2).encode()
        config = gate.check_config("config.json", raw)
    return raw, config


def _index(tensors: dict[str, Json], total: int) -> bytes:
    weight_map = {name: entry["file"] for name, entry in sorted(tensors.items())}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
