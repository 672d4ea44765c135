"""Checkpoints: full-precision models in the store. Import a foreign folder, pair two of them, read one, load one.

A checkpoint is known by the digest of its manifest, a document that names every file and every tensor by digest. Two
checkpoints with one fingerprint hold the same tensors, config and tokenizer, however they were sharded.

torch and transformers are imported only by the functions that need them: an import runs without either.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from compression_worker import gate, intake
from compression_worker.adapters import CONFIG_FILE, is_adapter
from compression_worker.contracts import CompressionError, Json, StepContext, StepOutput, canonical_json, sha256
from compression_worker.faults import failpoint
from compression_worker.store import NoRoom, Store
from compression_worker.unstacking import index_of, unstacked

if TYPE_CHECKING:
    import torch

FORMAT = "deltaworks-checkpoint-1"
MANIFEST = "manifest.json"
SPARE_BYTES = 64 << 20
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""The files that say which text becomes which token. The others hold templates and defaults, which tunes change."""

Progress = Callable[[int, int, str], None]


def import_step(context: StepContext) -> StepOutput:
    """Take the folder that ``params`` names into the store; list how it differs from the input ``base``."""
    params = context.spec.params
    root = context.import_roots.get(params["root"])
    if root is None:
        known = ", ".join(sorted(context.import_roots)) or "none"
        raise CompressionError("unknown_root", f"there is no import root '{params['root']}'; known: {known}")
    base = read_manifest(context.store, context.spec.inputs["base"]) if "base" in context.spec.inputs else None
    with intake.open_folder(root, params["folder"]) as folder:
        failpoint("import.open")
        at = context.spec.inputs.get("base", "")
        manifest = _take(context.store, folder, None, at, params.get("licence", ""), context.progress)
    failpoint("import.manifest")
    digest = context.store.write_bytes(canonical_json(manifest))
    context.log(f"{len(manifest['tensors']):,} tensors, {manifest['parameters']:,} parameters", "info")
    differences = pair(base, manifest) if base else []
    data = {
        "checkpoint": digest,
        "manifest": {key: value for key, value in manifest.items() if key != "tensors"},
        "base": context.spec.inputs.get("base", ""),
        "differences": differences,
        "tokenizer_differs": base is not None and tokenizer_differs(base, manifest),
    }
    return StepOutput(blobs={MANIFEST: digest, **_digests(manifest)}, data=data)


def attach_folder(
    store: Store, folder: Path, *, base: str = "", licence: str = "", progress: Progress | None = None
) -> str:
    """Gate and hash a folder of the person at the keyboard, without copying its weights; the checkpoint's digest.

    The weights become symbolic links in the store, so the folder must stay as it is while the store is used: take a
    store of one run. The rules of an import hold, except that files may have hard links. A PEFT adapter is merged into
    the checkpoint ``base``, and that is written.
    """
    with intake.open_path(folder) as handle:
        manifest = _take(store, handle, folder, base, licence, progress or (lambda done, total, unit: None))
    return store.write_bytes(canonical_json(manifest))


def pair(base: Mapping[str, Any], variant: Mapping[str, Any]) -> list[Json]:
    """How the variant's tensors differ from the base's by name, shape and dtype; empty when they fit.

    Each difference names the tensor, its ``kind`` (missing, added, shape, dtype), both sides, and says it in words.
    """
    ours, theirs = _unique(base), _unique(variant)
    differences = [_difference("missing", name, _shown(ours[name]), "") for name in sorted(ours.keys() - theirs.keys())]
    differences += [
        _difference("added", name, "", _shown(theirs[name])) for name in sorted(theirs.keys() - ours.keys())
    ]
    for name in sorted(ours.keys() & theirs.keys()):
        one, other = ours[name], theirs[name]
        if one["shape"] != other["shape"]:
            words = _vocabulary_change(base, variant, one["shape"], other["shape"])
            differences.append(_difference("shape", name, _shown(one), _shown(other), words))
        elif one["dtype"] != other["dtype"]:
            differences.append(_difference("dtype", name, _shown(one), _shown(other)))
    return differences


def tokenizer_differs(base: Mapping[str, Any], variant: Mapping[str, Any]) -> bool:
    """Whether the two cut text into tokens by different files."""
    return bool(base["tokenizer_sha256"] != variant["tokenizer_sha256"])


def require_pair(base: Mapping[str, Any], variant: Mapping[str, Any]) -> None:
    """Refuse a variant whose tensors do not all fit the base's; the message lists the first differences."""
    if base["architecture"] != variant["architecture"]:
        raise CompressionError(
            "architecture_mismatch",
            f"the base is a {base['architecture']}, the variant a {variant['architecture']}: choose the base that the "
            "variant was tuned from",
        )
    if differences := pair(base, variant):
        shown = "; ".join(difference["text"] for difference in differences[:5])
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CompressionError(
            f"{differences[0]['kind']}_mismatch",
            f"base and variant do not fit: {shown}{more}. Choose the base that the variant was tuned from",
        )


def read_manifest(store: Store, digest: str) -> Json:
    """The checkpoint manifest ``digest``, verified."""
    manifest: Json = json.loads(store.read_bytes(digest))
    if manifest.get("format") != FORMAT:
        raise CompressionError("unknown_format", f"{digest} is no checkpoint manifest of format {FORMAT}")
    return manifest


class Checkpoint:
    """A checkpoint in the store, read tensor by tensor without copies.

    Tensors are views of memory-mapped files: they cost no memory until touched, and are read-only in meaning (a write
    would stay in this process). :meth:`close` lets go of the files; tensors handed out stay valid.
    """

    def __init__(self, store: Store, digest: str, manifest: Json) -> None:
        self.store = store
        self.digest = digest
        self.manifest = manifest
        self._aliases = dict(manifest["aliases"])
        self._handles: dict[str, Any] = {}

    @classmethod
    def open(cls, store: Store, digest: str) -> Checkpoint:
        return cls(store, digest, read_manifest(store, digest))

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def names(self) -> list[str]:
        """All tensors that lie in the files, sorted; an alias is not among them unless it is stored as well."""
        return sorted(self.manifest["tensors"])

    @cached_property
    def folder(self) -> Path:
        """The checkpoint as a Hugging Face folder."""
        return self.store.view(_digests(self.manifest))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor ``name`` (or the one it is an alias of), memory-mapped, on the CPU."""
        tensors = self.manifest["tensors"]
        stored = name if name in tensors else self._aliases.get(name, "")
        if stored not in tensors:
            raise CompressionError("missing_tensor", f"the checkpoint {self.digest[:12]} has no tensor '{name}'")
        tensor: torch.Tensor = self._handle(tensors[stored]["file"]).get_tensor(stored)
        return tensor

    def verify(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Hash every file again; raises :class:`CompressionError` on the first damaged one."""
        for entry in self.manifest["files"].values():
            self.store.verify(entry["sha256"])
            advance(entry["size"])

    def close(self) -> None:
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            from safetensors import safe_open

            path = self.store.path(self.manifest["files"][file]["sha256"])
            if not path.is_file():
                raise CompressionError("missing_blob", f"the store lacks '{file}' of this checkpoint: import it again")
            self._handles[file] = safe_open(path, framework="pt", device="cpu")
        return self._handles[file]


def load_model(checkpoint: Checkpoint, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The checkpoint as a transformers model in evaluation mode; ``dtype`` None keeps the stored one.

    Refuses a checkpoint that does not fill the architecture exactly: transformers alone would fill a gap with random
    weights, or drop a tensor, and only warn.
    """
    return load_folder(checkpoint.folder, device=device, dtype=dtype)


def load_folder(folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """As :func:`load_model`, for a folder of ours."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CompressionError("unloadable_model", f"transformers cannot load it: {_one_line(error)}") from error
    for part in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[part]):
            kind = part.removesuffix("_keys")
            raise CompressionError(
                f"{kind}_tensor",
                f"{type(model).__name__} and the checkpoint disagree: {len(names)} {kind} tensors, {names[0]} first. "
                "Correct config.json, or export the checkpoint again",
            )
    return model.to(device).eval()


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    if not checkpoint.manifest["tokenizer_sha256"]:
        raise CompressionError("missing_tokenizer", "the checkpoint was imported without tokenizer files: add them")
    folder = checkpoint.folder  # outside: a disk that is full is no fault of the tokenizer's
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises plain Exception for a file that it cannot read
        raise CompressionError("unreadable_tokenizer", f"transformers cannot load it: {_one_line(error)}") from error


def _take(store: Store, folder: int, link_from: Path | None, base: str, licence: str, progress: Progress) -> Json:
    adapter = is_adapter(os.listdir(folder))
    with contextlib.ExitStack() as stack:
        sources = intake.open_sources(
            folder, stack, single_link=link_from is None, also=(CONFIG_FILE,) if adapter else ()
        )
        readme = sources.pop("README.md", None)
        licence = licence or (intake.licence_of(readme.read_text()) if readme else "")
        if adapter:
            from compression_worker.adapter_merge import take_adapter

            return take_adapter(store, sources, base, licence, progress)
        weights = [source for name, source in sources.items() if name.endswith(".safetensors")]
        texts = {name: source.read_text() for name, source in sources.items() if source not in weights}
        config, weight_map = check_texts(texts)
        shards = [intake.read_header(source) for source in weights]
        intake.check_shards(shards, weight_map)
        shards = unstacked(shards, config)
        if weight_map and any(shard.start for shard in shards):
            texts[gate.INDEX_FILE] = index_of(shards)
        if link_from is None:
            require_room(store, sum(source.size for source in sources.values()))
        tensors, files = _take_weights(store, shards, link_from, progress)
    for name, text in texts.items():
        files[name] = {"sha256": store.write_bytes(text), "size": len(text)}
    return make_manifest(files, tensors, config, licence)


def make_manifest(files: Mapping[str, Json], tensors: Mapping[str, Json], config: Json, licence: str) -> Json:
    """The manifest of a checkpoint whose files and tensors are known by digest."""
    aliases = _aliases(tensors, config)
    totals = intake.total_bytes({name: tensor for name, tensor in tensors.items() if name not in dict(aliases)})
    tokenizer = {name: files[name]["sha256"] for name in VOCABULARY_FILES if name in files}
    tokenizer_sha256 = sha256(canonical_json(tokenizer)) if tokenizer else ""
    table = [[name, one["dtype"], one["shape"], one["sha256"]] for name, one in sorted(tensors.items())]
    return {
        "format": FORMAT,
        "files": dict(files),
        "tensors": dict(tensors),
        "aliases": aliases,
        "config": config,
        "architecture": config["architectures"][0],
        "dtype": max(totals, key=lambda dtype: totals[dtype]),
        "parameters": sum(size // gate.ITEM_SIZE[dtype] for dtype, size in totals.items()),
        "weight_bytes": sum(entry["size"] for name, entry in files.items() if name.endswith(".safetensors")),
        "size_bytes": sum(entry["size"] for entry in files.values()),
        "tokenizer_sha256": tokenizer_sha256,
        "licence": licence,
        "fingerprint": sha256(canonical_json({"tensors": table, "config": config, "tokenizer": tokenizer_sha256})),
    }


def check_texts(texts: Mapping[str, bytes]) -> tuple[Json, dict[str, str] | None]:
    """The gate for all small files of a checkpoint: its config.json and, where there is one, the map of its index."""
    if "config.json" not in texts:
        raise CompressionError("missing_config", "the folder has no config.json: copy the whole checkpoint")
    for name, text in texts.items():
        gate.check_magic(name, text[:512])
        if name in ("generation_config.json", "tokenizer_config.json"):
            gate.check_no_code(name, text)
        elif name.endswith(".json"):
            gate.parse_json(name, text)
        elif name != "tokenizer.model":
            gate.check_text(name, text)
    index = texts.get(gate.INDEX_FILE)
    config = gate.check_config("config.json", texts["config.json"])
    return config, gate.check_index(gate.INDEX_FILE, index) if index is not None else None


def _take_weights(
    store: Store, shards: list[intake.Shard], link_from: Path | None, progress: Progress
) -> tuple[dict[str, Json], dict[str, Json]]:
    total, done = sum(shard.size for shard in shards), 0
    tensors: dict[str, Json] = {}
    files: dict[str, Json] = {}

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total, "bytes")

    for shard in shards:
        with _sink(store, link_from / shard.name if link_from and not shard.start else None) as sink:
            tensors |= intake.take_shard(shard, sink, advance)
        failpoint("import.hashed")
        files[shard.name] = {"sha256": sink.digest, "size": shard.size}
    return tensors, files


@contextlib.contextmanager
def _sink(store: Store, link: Path | None) -> Iterator[intake.Sink]:
    if link is None:
        with store.writer() as blob:
            yield blob
        return
    hasher = intake.Hasher()
    yield hasher
    store.link(hasher.finish(), link)


def require_room(store: Store, needed: int) -> None:
    """Refuse what would fill the store, before anything of it is written."""
    free = store.free_bytes()
    if free < needed + SPARE_BYTES:
        raise NoRoom(f"the import needs {needed:,} bytes and the store has {free:,} free")


def _aliases(tensors: Mapping[str, Json], config: Json) -> list[list[str]]:
    """Names that share one tensor: an output head tied to the embeddings, stored or not."""
    embedding = next((name for name in sorted(tensors) if name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    head = tensors.get("lm_head.weight")
    if embedding is None or not config.get("tie_word_embeddings", head is None):
        return []
    if head is not None and any(head[key] != tensors[embedding][key] for key in ("sha256", "shape", "dtype")):
        raise CompressionError(
            "tied_weights_differ",
            f"config.json ties the output head to the embeddings, but 'lm_head.weight' differs from '{embedding}': "
            "set tie_word_embeddings to false, or remove the head",
        )
    return [["lm_head.weight", embedding]]


def _digests(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def _unique(manifest: Mapping[str, Any]) -> dict[str, Json]:
    """The tensors without second names: a tied head is no difference to one that was not stored."""
    aliases = dict(manifest["aliases"])
    return {name: tensor for name, tensor in manifest["tensors"].items() if name not in aliases}


def _difference(kind: str, tensor: str, base: str, variant: str, words: str = "") -> Json:
    says = {
        "missing": f"'{tensor}' ({base}) is missing in the variant",
        "added": f"'{tensor}' ({variant}) is in the variant only",
        "shape": f"'{tensor}' is {base} in the base and {variant} in the variant{words}",
        "dtype": f"'{tensor}' is {base} in the base and {variant} in the variant",
    }
    return {"tensor": tensor, "kind": kind, "base": base, "variant": variant, "text": says[kind]}


def _vocabulary_change(base: Mapping[str, Any], variant: Mapping[str, Any], ours: list[int], theirs: list[int]) -> str:
    before, after = base["config"].get("vocab_size"), variant["config"].get("vocab_size")
    if before == after or not ours or not theirs or ours[0] != before or theirs[0] != after or ours[1:] != theirs[1:]:
        return ""
    verb = "grew" if after > before else "shrank"
    return f" (the vocabulary {verb} from {before:,} to {after:,} tokens)"


def _shown(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['dtype']} {tensor['shape']}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
