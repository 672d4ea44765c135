"""The format on disk: codes and headers in safetensors files, small files as they were, and ``manifest.json``.

==================== =================================================================================================
``codes-N``          a row of bytes for each tensor that is coded: its chunks one after the other (``coding.py``)
``headers``          the first bytes of each weight file, as they were, so that the restored file is the same file
``checkpoint.json``  the manifest of the checkpoint: every file and tensor of it by digest
all others           the small files beside the weights: configuration, tokenizer, index
==================== =================================================================================================

A tensor is stored as a *difference* to a base tensor (of which the first ``shared`` weights are used), *plain* where
the base has none like it, as the *base*'s own bytes, or as a *copy* of another tensor of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compression_worker import gate, ledger
from compression_worker.checkpoints import FORMAT as CHECKPOINT_FORMAT
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json, canonical_json, sha256
from compression_worker.escrow.coding import LAYOUTS
from compression_worker.store import FILE_NAME, Store

FORMAT = "deltaworks-escrow-1"
MANIFEST, CHECKPOINT, HEADERS = "manifest.json", "checkpoint.json", "headers.safetensors"
DIFFERENCE, PLAIN, BASE, COPY = "difference", "plain", "base", "copy"
LINE_KEYS = {
    DIFFERENCE: {"kind", "of", "shared", "file"},
    PLAIN: {"kind", "file"},
    BASE: {"kind", "of"},
    COPY: {"kind", "of"},
}
KEYS = frozenset(
    {
        *("format", "base", "variant", "files", "tensors", "chunk_elements", "ledger", "code_version", "libraries"),
        "self_sha256",
    }
)
MOST_CHUNK_ELEMENTS = 1 << 24
"""What a reader holds of a tensor is some multiple of a chunk: a manifest may not ask for more memory than that."""


@dataclass(frozen=True)
class Escrow:
    """A manifest that was checked, and where its files lie."""

    manifest: Json
    manifest_bytes: int
    digest: str
    paths: Mapping[str, Path]

    @classmethod
    def open_folder(cls, folder: Path) -> Escrow:
        """The escrow in ``folder``. Raises :class:`CompressionError` where its manifest is not whole."""
        try:
            raw = (folder / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise CompressionError("no_escrow", f"'{folder}' has no {MANIFEST}: it is no escrow") from None
        manifest = parse_manifest(raw)
        return cls(manifest, len(raw), sha256(raw), {name: folder / name for name in manifest["files"]})

    @classmethod
    def open_store(cls, store: Store, digest: str) -> Escrow:
        """The escrow whose ``manifest.json`` is the blob ``digest``."""
        raw = store.read_bytes(digest)
        manifest = parse_manifest(raw)
        return cls(manifest, len(raw), digest, {n: store.path(e["sha256"]) for n, e in manifest["files"].items()})

    @cached_property
    def checkpoint(self) -> Json:
        """The manifest of the checkpoint that is kept here, as it was."""
        path = self.paths[CHECKPOINT]
        raw = path.read_bytes() if path.is_file() else b""
        value: Json = json.loads(raw) if sha256(raw) == self.manifest["variant"]["checkpoint"] else {}
        if value.get("format") != CHECKPOINT_FORMAT or value["tensors"].keys() != self.manifest["tensors"].keys():
            raise CompressionError("damaged_escrow", f"{CHECKPOINT} does not fit the escrow: it was changed or damaged")
        return value

    @property
    def parts(self) -> list[Json]:
        """Every byte of it by part, the manifest included."""
        return ledger.with_manifest(self.manifest["ledger"]["parts"], self.manifest_bytes)

    @property
    def side_files(self) -> dict[str, Path]:
        """The small files beside the weights, by name."""
        return {name: self.paths[name] for name in self.checkpoint["files"] if not is_weights(name)}

    @property
    def weight_files(self) -> list[str]:
        return [name for name in self.checkpoint["files"] if is_weights(name)]

    def summary(self) -> Json:
        """As ``inspect --json`` prints it."""
        book, size = self.manifest["ledger"], ledger.total(self.parts)
        return {
            "method": "escrow",
            "config": {},
            "source_bytes": book["source_bytes"],
            "artifact_bytes": size,
            "true_ratio": ledger.true_ratio(book["source_bytes"], size),
            "nominal_ratio": ledger.nominal_ratio(book["source_bytes"], self.parts),
            "bits_per_weight": ledger.bits_per_weight(size, book["parameters"]),
            "parts": self.parts,
            "base_fingerprint": self.manifest["base"]["fingerprint"],
            "variant_fingerprint": self.manifest["variant"]["fingerprint"],
        }

    def require_base(self, base: Checkpoint) -> None:
        """Refuse any base but the one that the differences were taken from."""
        wanted = self.manifest["base"]["fingerprint"]
        if base.fingerprint != wanted:
            raise CompressionError(
                "base_mismatch",
                f"this escrow was made against the base with fingerprint {wanted}, and the base given has "
                f"{base.fingerprint}: use the base that the checkpoint was tuned from",
            )

    def problems(self) -> list[str]:
        """What is wrong with the files: missing, of another size, or changed."""
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
        """Hash every file; refuse the escrow when one is missing or damaged."""
        if found := self.problems():
            raise CompressionError("damaged_escrow", f"the escrow is not whole: {'; '.join(found)}")


def is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def elements(tensor: Json) -> int:
    """Weights of a tensor that a checkpoint's manifest describes."""
    return math.prod(tensor["shape"])


def pieces(count: int, shared: int, chunk: int) -> Iterator[tuple[int, int, bool]]:
    """The chunks of ``count`` weights, of which the first ``shared`` have a base: first weight, how many, has one."""
    for begin, end, has_base in ((0, shared, True), (shared, count, False)):
        for start in range(begin, end, chunk):
            yield start, min(chunk, end - start), has_base


def make_manifest(
    *,
    base: Checkpoint,
    variant: Checkpoint,
    files: Mapping[str, Json],
    tensors: Mapping[str, Json],
    chunk_elements: int,
    header_bytes: int,
    code_version: str,
    libraries: Mapping[str, str],
) -> bytes:
    """The bytes of ``manifest.json``. ``header_bytes``: of the headers of code files."""
    codes = sum(entry["size"] for name, entry in files.items() if is_weights(name) and name != HEADERS)
    side = sum(entry["size"] for name, entry in files.items() if not is_weights(name))
    sizes = {
        "codes": codes - header_bytes,
        "headers": files[HEADERS]["size"] + header_bytes,
        "side files": side - files[CHECKPOINT]["size"],
        "other": files[CHECKPOINT]["size"],
    }
    book = {
        "parts": ledger.listed(sizes),
        "source_bytes": variant.manifest["weight_bytes"],
        "parameters": variant.manifest["parameters"],
    }
    value: Json = {
        "format": FORMAT,
        "base": {"fingerprint": base.fingerprint, "checkpoint": base.digest},
        "variant": {"fingerprint": variant.fingerprint, "checkpoint": variant.digest},
        "files": dict(files),
        "tensors": dict(tensors),
        "chunk_elements": chunk_elements,
        "ledger": book,
        "code_version": code_version,
        "libraries": dict(libraries),
    }
    return canonical_json(value | {"self_sha256": sha256(canonical_json(value))})


def is_escrow(folder: Path) -> bool:
    """Whether the manifest in ``folder`` says that it is one, of whatever version."""
    try:
        value = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and str(value.get("format", "")).startswith("deltaworks-escrow-")


def parse_manifest(raw: bytes) -> Json:
    """The manifest in ``raw``; refuses another format, a change of any byte, and whatever a reader does not know."""
    try:
        value = gate.parse_json(MANIFEST, raw)
    except CompressionError as error:
        raise CompressionError("damaged_escrow", f"{error.message}: the escrow is damaged") from error
    if value.get("format") != FORMAT:
        raise CompressionError(
            "unknown_format", f"the escrow has format {value.get('format')!r}; this version reads {FORMAT} only"
        )
    body = {key: item for key, item in value.items() if key != "self_sha256"}
    if value.keys() != KEYS or value["self_sha256"] != sha256(canonical_json(body)) or raw != canonical_json(value):
        raise CompressionError("damaged_escrow", f"{MANIFEST} does not match its own digest: it was changed or damaged")
    for name in value["files"]:
        if not FILE_NAME.fullmatch(name):
            raise CompressionError("bad_path", f"{MANIFEST} names the file {name!r}, which is no plain file name")
    unknown = list(_unknown(value))
    if unknown or not 0 < value["chunk_elements"] <= MOST_CHUNK_ELEMENTS:
        raise CompressionError(
            "unknown_format", f"{MANIFEST} stores {', '.join(unknown[:3]) or 'chunks'} in a way unknown to this version"
        )
    return value


def _unknown(value: Json) -> Iterable[str]:
    """What the manifest speaks of in ways that there are not."""
    files, tensors = value["files"], value["tensors"]
    yield from (name for name in (CHECKPOINT, HEADERS) if name not in files)
    for name, line in tensors.items():
        known = line.keys() == LINE_KEYS.get(line.get("kind")) and line.get("file", HEADERS) in files
        if not known or (line["kind"] == COPY and tensors.get(line["of"], line)["kind"] == COPY):
            yield repr(name)


def check_dtype(name: str, dtype: str) -> None:
    """Refuse a dtype whose bit patterns are not known here."""
    if dtype not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise CompressionError("wrong_dtype", f"'{name}' has dtype {dtype}; an escrow knows {known}")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
