"""The artifact on disk: safetensors files and ``manifest.json``, written last by rename. Open, verify, restore, load.

An artifact lies in a folder, or as blobs in the store; :class:`Artifact` reads both. A reader refuses what it does not
know, and a manifest that was changed: it carries the digest of itself without that digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression_worker import catalog, gate, ledger
from compression_worker.contracts import CompressionError, Json, canonical_json, sha256
from compression_worker.store import FILE_NAME, Store

if TYPE_CHECKING:
    import torch

    from compression_worker.checkpoints import Checkpoint

FORMAT = "deltaworks-artifact-1"
MANIFEST = "manifest.json"
KINDS = frozenset({"sign", "sparse", "rows", "raw", "base", "grid", "lattice", "shared"})
SHARD_BYTES = 5_000_000_000
KEYS = frozenset(
    {
        *("format", "method", "config", "seed", "base", "variant", "files", "tensors", "aliases", "layout", "ledger"),
        *("figures", "side_files", "code_version", "libraries", "self_sha256"),
    }
)
SHARED = "shared"
"""Optional key: side files that are the base's own and lie in no file of the artifact, by name."""
QUANTIZATION = "quantization_config"
"""What config.json of an artifact that transformers loads by itself says more than the checkpoint's."""


@dataclass(frozen=True)
class Artifact:
    """A manifest that was checked, and where its files lie."""

    manifest: Json
    manifest_bytes: int
    digest: str
    paths: Mapping[str, Path]

    @classmethod
    def open_folder(cls, folder: Path) -> Artifact:
        """The artifact in ``folder``. Raises :class:`CompressionError` where its manifest is not whole."""
        try:
            raw = (folder / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise CompressionError(
                "no_artifact", f"'{folder}' has no {MANIFEST}: it is no artifact, or its compression did not finish"
            ) from None
        manifest = parse_manifest(raw)
        return cls(manifest, len(raw), sha256(raw), {name: folder / name for name in manifest["files"]})

    @classmethod
    def open_store(cls, store: Store, digest: str) -> Artifact:
        """The artifact whose ``manifest.json`` is the blob ``digest``."""
        raw = store.read_bytes(digest)
        manifest = parse_manifest(raw)
        listed = {**manifest["files"], **manifest.get(SHARED, {})}
        paths = {name: store.path(entry["sha256"]) for name, entry in listed.items()}
        return cls(manifest, len(raw), digest, paths)

    def with_base(self, base: Checkpoint | None) -> Artifact:
        """The same with the side files that it shares with ``base``, which has to be its base."""
        self.require_base(base)
        if base is None or self.stands_alone:
            return self
        shared = self.manifest.get(SHARED, {})
        paths = {name: base.store.path(entry["sha256"]) for name, entry in shared.items()}
        return replace(self, paths={**self.paths, **paths})

    @property
    def stands_alone(self) -> bool:
        """Whether the artifact holds the whole model, and not its difference from a base."""
        return not catalog.method(self.manifest["method"]).needs_base

    @cached_property
    def config(self) -> Json:
        """The config.json of the checkpoint that was compressed."""
        said = gate.parse_json("config.json", self.paths["config.json"].read_bytes())
        if self.stands_alone:
            said.pop(QUANTIZATION, None)
        return gate.check_config("config.json", canonical_json(said))

    @property
    def parts(self) -> list[Json]:
        """The whole ledger, the manifest included."""
        return ledger.with_manifest(self.manifest["ledger"]["parts"], self.manifest_bytes)

    def summary(self) -> Json:
        """What ``inspect --json`` prints."""
        book, size = self.manifest["ledger"], ledger.total(self.parts)
        return {
            "method": self.manifest["method"],
            "config": self.manifest["config"],
            "source_bytes": book["source_bytes"],
            "artifact_bytes": size,
            "true_ratio": ledger.true_ratio(book["source_bytes"], size),
            "nominal_ratio": book["nominal_ratio"],
            "bits_per_weight": ledger.bits_per_weight(size, book["parameters"]),
            "parts": self.parts,
            "base_fingerprint": self.manifest["base"]["fingerprint"],
            "variant_fingerprint": self.manifest["variant"]["fingerprint"],
        }

    def require_base(self, base: Checkpoint | None) -> None:
        """Refuse any base but the one that the delta was taken from; an artifact that stands alone needs none."""
        if self.stands_alone:
            return
        if base is None:
            raise CompressionError("missing_base", "this artifact is a difference from its base: name the base as well")
        wanted = self.manifest["base"]["fingerprint"]
        if base.fingerprint != wanted:
            raise CompressionError(
                "base_mismatch",
                f"this artifact was made against the base with fingerprint {wanted}, and the base given has "
                f"{base.fingerprint}: use the base that the variant was tuned from",
            )

    def problems(self) -> list[str]:
        """What is wrong with the files: missing, of another size, changed, or not of this artifact."""
        found = []
        for name, entry in self.manifest["files"].items():
            path = self.paths[name]
            if not path.is_file():
                found.append(f"'{name}' is missing")
            elif path.stat().st_size != entry["size"]:
                found.append(f"'{name}' has {path.stat().st_size:,} bytes, not {entry['size']:,}")
            elif _file_sha256(path) != entry["sha256"]:
                found.append(f"'{name}' does not match its digest: it was changed or damaged")
        return found

    def require_whole(self) -> None:
        """Hash every file; refuse the artifact when one is missing or damaged."""
        if found := self.problems():
            raise CompressionError("damaged_artifact", f"the artifact is not whole: {'; '.join(found)}")

    def side_files(self) -> dict[str, Path]:
        """The variant's config, tokenizer and other small files, by name."""
        return {name: self.paths[name] for name in self.manifest["side_files"] if name in self.paths}


def make_manifest(
    *,
    method: str,
    config: Json,
    seed: int,
    base: Json,
    variant: Json,
    files: Mapping[str, Json],
    tensors: Mapping[str, Json],
    aliases: list[list[str]],
    layout: Json,
    book: Json,
    figures: Json,
    side_files: Iterable[str],
    code_version: str,
    libraries: Mapping[str, str],
    shared: Mapping[str, Json] | None = None,
) -> bytes:
    """The bytes of ``manifest.json``. ``shared``: side files that are the base's own, by name."""
    value: Json = {
        "format": FORMAT,
        "method": method,
        "config": config,
        "seed": seed,
        "base": base,
        "variant": variant,
        "files": dict(files),
        "tensors": dict(tensors),
        "aliases": aliases,
        "layout": layout,
        "ledger": book,
        "figures": figures,
        "side_files": sorted(side_files),
        "code_version": code_version,
        "libraries": dict(libraries),
    }
    if shared:
        value[SHARED] = dict(shared)
    return canonical_json(value | {"self_sha256": sha256(canonical_json(value))})


def parse_manifest(raw: bytes) -> Json:
    """The manifest in ``raw``; refuses another format, a change of any byte, and names that are no plain file names."""
    try:
        value = gate.parse_json(MANIFEST, raw)
    except CompressionError as error:
        raise CompressionError("damaged_manifest", f"{error.message}: the artifact is damaged") from error
    if value.get("format") != FORMAT:
        known = f"this version reads {FORMAT} only"
        raise CompressionError("unknown_format", f"the artifact has format {value.get('format')!r}; {known}")
    body = {key: item for key, item in value.items() if key != "self_sha256"}
    known_keys = value.keys() - {SHARED} == KEYS
    if not known_keys or value["self_sha256"] != sha256(canonical_json(body)) or raw != canonical_json(value):
        raise CompressionError(
            "damaged_manifest", f"{MANIFEST} does not match its own digest: it was changed or damaged"
        )
    for name in (*value["files"], *value.get(SHARED, {})):
        if not FILE_NAME.fullmatch(name):
            raise CompressionError("bad_path", f"{MANIFEST} names the file {name!r}, which is no plain file name")
    for name, tensor in value["tensors"].items():
        if tensor["kind"] not in KINDS or tensor.get("file", "config.json") not in value["files"]:
            raise CompressionError(
                "unknown_format", f"{MANIFEST} stores tensor {name!r} in a way unknown to this version"
            )
    shared = value.get(SHARED, {}).keys()
    if "config.json" not in value["files"] or not set(value["side_files"]) <= value["files"].keys() | shared:
        raise CompressionError("damaged_manifest", f"{MANIFEST} lacks files that it speaks of")
    catalog.method(value["method"])
    return value


def write_folder(out: Path, store: Store, files: Mapping[str, str]) -> None:
    """Put blobs into the new folder ``out`` under their names; ``manifest.json`` comes last, by rename.

    They are copied; blobs of a store that will be thrown away are linked. Nothing is left behind when it fails, which
    it says as ``disk_full`` when there is no room.
    """
    with NewFolder(out) as folder:
        for name in sorted(files, key=lambda name: name == MANIFEST):
            temporary = folder / f".{name}"
            _copy(store.path(files[name]), temporary, link=not store.durable)
            os.rename(temporary, folder / name)


def require_new(out: Path) -> None:
    """Refuse a place where something already lies."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise CompressionError("out_exists", f"'{out}' exists and is not empty: give a new folder")


class NewFolder:
    """A folder that appears at ``out``, whole, when the block ends without an error; otherwise nothing remains."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def __enter__(self) -> Path:
        require_new(self._out)
        parent = self._out.absolute().parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._out.name}-", dir=parent))
            self._folder.chmod(0o755)
        except OSError as error:
            raise CompressionError("unwritable", f"'{parent}' cannot be written: {error.strerror}") from error
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                os.rename(self._folder, self._out.absolute())
                return
            except OSError as failure:
                shutil.rmtree(self._folder, ignore_errors=True)
                raise CompressionError("out_exists", f"'{self._out}' cannot be made: {failure.strerror}") from failure
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CompressionError(
                "disk_full", f"no room left for '{self._out}': free some and run again; nothing was left behind"
            ) from error


def restore(base: Checkpoint | None, artifact: Artifact, out: Path, progress: Callable[[int, int, str], None]) -> None:
    """Write the compressed model to ``out`` as a plain Hugging Face folder, tensor by tensor.

    Block linears are computed in fp32 and rounded once to the dtype they had; all else is the checkpoint's own bytes.
    ``base`` may be None for an artifact that stands alone.
    """
    from compression_worker.tensors import write_file

    artifact = artifact.with_base(base)
    artifact.require_whole()
    implementation = _implementation(artifact)
    with implementation.open_merged(base, artifact) as merged, NewFolder(out) as folder:
        shards = _shards(merged.specs())
        for name, path in artifact.side_files().items():
            _copy(path, folder / name)
        if artifact.stands_alone:
            (folder / "config.json").write_text(json.dumps(artifact.config, indent=2) + "\n", encoding="utf-8")
        total, done = len(merged.specs()), 0
        for index, names in enumerate(shards):
            with (folder / _shard_name(index, len(shards))).open("wb") as file:
                write_file(file, {name: (merged.specs()[name], merged.data(name)) for name in names}, {"format": "pt"})
                file.flush()
                os.fsync(file.fileno())
            done += len(names)
            progress(done, total, "tensors")
        if len(shards) > 1:
            (folder / gate.INDEX_FILE).write_bytes(_index(shards, merged.specs()))


def load_compressed_model(
    store: Store,
    base_checkpoint: str | None,
    artifact: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """The compressed model, ready to answer (eval mode, no gradients), from digests in the store.

    ``base_checkpoint`` is the digest of the base's checkpoint manifest (None for an artifact that stands alone),
    ``artifact`` that of the artifact's ``manifest.json``; both manifests and all their files are blobs of ``store``.
    Refuses (CompressionError ``base_mismatch``) a base whose fingerprint is not the one that the artifact names, and
    (``damaged_artifact``) an artifact whose files do not match their digests. ``dtype`` None keeps the checkpoint's own
    dtype; float32 keeps what was decoded unrounded. On a CPU the weights are made once and dense; on CUDA the block
    linears stay packed where the method has a kernel.

    The tokenizer of the variant: :func:`load_artifact_tokenizer`.
    """
    from compression_worker.checkpoints import Checkpoint

    base = Checkpoint.open(store, base_checkpoint) if base_checkpoint else None
    return load_model(base, Artifact.open_store(store, artifact), device, dtype)


def load_model(
    base: Checkpoint | None, artifact: Artifact, device: str = "cpu", dtype: torch.dtype | None = None
) -> torch.nn.Module:
    """As :func:`load_compressed_model`, for a base and an artifact that are open already."""
    artifact.require_base(base)
    artifact.require_whole()
    model: torch.nn.Module = _implementation(artifact).load_model(base, artifact, device, dtype)
    return model


def load_artifact_tokenizer(artifact: Artifact) -> Any:
    """The variant's tokenizer, from the files that the artifact carries and those that it shares with its base.

    An artifact in a folder knows the latter through :meth:`Artifact.with_base`.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, path in artifact.side_files().items():
            shutil.copyfile(path, Path(folder) / name)
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the Rust library raises plain Exception for a file that it cannot read
            raise CompressionError(
                "unreadable_tokenizer", f"transformers cannot load the tokenizer: {error}"
            ) from error


def _implementation(artifact: Artifact) -> Any:
    return import_module(catalog.method(artifact.manifest["method"]).implementation)


def _shards(specs: Mapping[str, Any]) -> list[list[str]]:
    """Tensor names in files of at most :data:`SHARD_BYTES` each (more only for a tensor that is larger itself)."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name in sorted(specs):
        if specs[name].size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= specs[name].size
    return shards


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _index(shards: list[list[str]], specs: Mapping[str, Any]) -> bytes:
    weight_map = {name: _shard_name(index, len(shards)) for index, names in enumerate(shards) for name in names}
    metadata = {"total_size": sum(spec.size for spec in specs.values())}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2).encode()


def _copy(source: Path, target: Path, *, link: bool = False) -> None:
    """A copy that is on the disk when this returns; with ``link`` a second name for the same bytes, if that can be."""
    linked = False
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target)
            linked = True
    if not linked:
        shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
