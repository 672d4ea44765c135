"""The gate for foreign files: what a safetensors header, a JSON file or a file name must be before anything trusts it.

Everything here works on bytes and names alone, so that it can be fuzzed. What this gate accepts, the safetensors
library accepts too; the library accepts more (duplicate keys, 80 MB headers, odd names), which is why it looks second.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

from compression_worker.contracts import CompressionError, Json

MAX_HEADER_BYTES = 8_000_000
MAX_TENSORS = 20_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48
MAX_NAME_LENGTH = 512
MAX_CONFIG_BYTES = 8_000_000
ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4}

CONFIG_LIMITS = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 27,
    "num_attention_heads": 1 << 12,
    "num_hidden_layers": 1 << 10,
    "num_key_value_heads": 1 << 12,
    "vocab_size": 1 << 23,
}
"""The largest value of each size in config.json: a billion layers would fill the memory before the first weight."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
INDEX_FILE = "model.safetensors.index.json"
KEPT_FILES = frozenset({"config.json", "generation_config.json", INDEX_FILE, *TOKENIZER_FILES})
IGNORED_FILES = frozenset(
    {".cache", ".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "README.md"}
)
SAFETENSORS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,180}\.safetensors")
NOTE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,180}\.(json|md|txt)")
"""``training.json``, ``trainer_state.json``, ``all_results.json`` …: never opened, never copied."""
PICKLE_SUFFIXES = (".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth")
ARCHIVE_SUFFIXES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst")
MAGIC = (
    (0, b"PK\x03\x04", "a zip archive (a PyTorch pickle is one)"),
    (0, b"PK\x05\x06", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"7z\xbc\xaf", "a 7z archive"),
    (0, b"Rar!", "a rar archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x93NUMPY", "a numpy file, which may hold a pickle"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"GGUF", "a GGUF file"),
    *((0, bytes([0x80, protocol]), "a Python pickle") for protocol in range(2, 6)),
)
HOW_TO_CONVERT = "load it where you trust it and save it again with save_pretrained(..., safe_serialization=True)"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors header; ``begin`` and ``end`` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def is_ignored(name: str) -> bool:
    """Whether a file is left where it lies: model cards, licences, and the plain notes that training leaves behind."""
    return name in IGNORED_FILES or (name not in KEPT_FILES and NOTE_NAME.fullmatch(name) is not None)


def check_file_name(name: str) -> None:
    """Refuse a name that an import does not know, with what to do about it."""
    lower = name.lower()
    if name in KEPT_FILES or is_ignored(name) or SAFETENSORS_NAME.fullmatch(name):
        return
    if lower.endswith(PICKLE_SUFFIXES):
        raise CompressionError(
            "pickle_file",
            f"'{name}' is a pickle file, which can run code when it is opened: {HOW_TO_CONVERT}, then remove '{name}'",
        )
    if lower.endswith(ARCHIVE_SUFFIXES):
        raise CompressionError("archive_file", f"'{name}' is an archive: unpack it yourself, then remove it")
    raise CompressionError(
        "unexpected_file",
        f"{name!r} is no file of a checkpoint; remove it. Known: *.safetensors, {', '.join(sorted(KEPT_FILES))}",
    )


def check_magic(name: str, start: bytes) -> None:
    """Refuse pickles and archives by their first bytes, whatever they are called."""
    for offset, magic, what in MAGIC:
        if start[offset : offset + len(magic)] == magic:
            code = "pickle_file" if "pickle" in what else "archive_file"
            raise CompressionError(code, f"'{name}' is {what}, not what its name says: {HOW_TO_CONVERT}")


def header_length(name: str, start: bytes, file_size: int) -> int:
    """The length of the JSON header that the first nine bytes of a safetensors file promise."""
    if len(start) < 9:
        raise CompressionError("truncated_file", f"'{name}' has only {file_size} bytes: copy it again")
    (length,) = struct.unpack("<Q", start[:8])
    if start[8:9] != b"{":
        check_magic(name, start)
        raise CompressionError("bad_header", f"'{name}' does not start with a safetensors header")
    if length > MAX_HEADER_BYTES:
        raise CompressionError(
            "header_too_large",
            f"the header of '{name}' claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read. Save the "
            "checkpoint again in smaller shards",
        )
    if 8 + length > file_size:
        raise CompressionError(
            "truncated_file", f"'{name}' ends inside its header ({file_size:,} bytes): copy it again"
        )
    return int(length)


def parse_header(name: str, raw: bytes, data_size: int) -> list[TensorEntry]:
    """The tensors of the header ``raw``, in file order; they cover all ``data_size`` bytes without overlap or hole."""
    header = parse_json(name, raw, max_objects=MAX_TENSORS + 2)
    _check_metadata(name, header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise _too_many_tensors(name)
    if not header:
        raise CompressionError("no_tensors", f"'{name}' holds no tensor: remove it")
    entries = [_entry(name, tensor, info) for tensor, info in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_cover(name, entries, data_size)
    return entries


def parse_json(name: str, raw: bytes, *, max_objects: int = sys.maxsize) -> Json:
    """The JSON object in ``raw``: UTF-8, no key twice, nothing deep, no number that is not finite."""
    objects = 0

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        nonlocal objects
        objects += 1
        if objects > max_objects:
            raise _too_many_tensors(name)
        value = dict(pairs)
        if len(value) != len(pairs):
            raise CompressionError("duplicate_key", f"'{name}' has the key {_first_duplicate(pairs)!r} twice")
        for key in value:
            key.encode()
        return value

    def refuse_constant(text: str) -> NoReturn:
        raise CompressionError("bad_json", f"'{name}' holds {text}, which is no JSON number")

    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=unique,
            parse_constant=refuse_constant,
            parse_int=_whole_number,
        )
    except UnicodeError:
        raise CompressionError("not_utf8", f"'{name}' holds text that is not UTF-8: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise CompressionError("bad_json", f"'{name}' holds no readable JSON ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise CompressionError("bad_json", f"'{name}' holds no JSON object")
    return value


def check_config(name: str, raw: bytes) -> Json:
    """The parsed config.json; refuses code, quantized weights and sizes that cannot be meant."""
    config = check_no_code(name, raw)
    if "quantization_config" in config:
        raise CompressionError(
            "quantized_checkpoint", f"'{name}' says the weights are quantized already: give the full-precision model"
        )
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and len(architectures) == 1 and _is_identifier(architectures[0])):
        raise CompressionError("bad_config", f"'{name}' must name exactly one architecture, not {architectures!r}")
    if not isinstance(config.get("model_type"), str):
        raise CompressionError("bad_config", f"'{name}' has no 'model_type': it is no config of transformers")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise CompressionError("bad_config", f"'tie_word_embeddings' in '{name}' must be true or false")
    for key, limit in CONFIG_LIMITS.items():
        value = config.get(key, 1)
        if value is not None and (type(value) is not int or not 0 < value <= limit):
            raise CompressionError("bad_config", f"'{key}' in '{name}' is {value!r}; it must be 1 to {limit:,}")
    return config


def check_no_code(name: str, raw: bytes) -> Json:
    """The parsed JSON file; refuses ``auto_map`` at any depth, which would have Python code of the folder run."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise CompressionError("bad_config", f"'{name}' has {len(raw):,} bytes; at most {MAX_CONFIG_BYTES:,} are read")
    value = parse_json(name, raw)
    pending: list[Any] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "auto_map" in item:
                raise CompressionError(
                    "auto_map",
                    f"'{name}' has 'auto_map', which runs Python code from the folder: remove the key; only "
                    "architectures that transformers itself knows are imported",
                )
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return value


def check_index(name: str, raw: bytes) -> dict[str, str]:
    """The weight map (tensor name to file name) of a shard index, with plain file names only."""
    weight_map = parse_json(name, raw).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CompressionError("bad_index", f"'{name}' has no 'weight_map'")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not SAFETENSORS_NAME.fullmatch(file):
            raise CompressionError("bad_path", f"'{name}' places {tensor!r} in {file!r}, which is no plain file name")
    return weight_map


def check_text(name: str, raw: bytes) -> None:
    """Refuse bytes that are not UTF-8 text."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise CompressionError(
            "not_utf8", f"'{name}' is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None


def _entry(file: str, name: str, info: object) -> TensorEntry:
    _check_tensor_name(file, name)
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise CompressionError(
            "bad_header", f"tensor {name!r} in '{file}' must have dtype, shape and data_offsets only"
        )
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CompressionError(
            "wrong_dtype",
            f"tensor {name!r} in '{file}' has dtype {dtype!r}; known: {', '.join(ITEM_SIZE)}. Save the checkpoint "
            "again in one of these",
        )
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CompressionError("bad_header", f"tensor {name!r} in '{file}' has a shape or offsets that are no sizes")
    expected = _element_count(file, name, shape) * ITEM_SIZE[dtype]
    begin, end = offsets
    if end - begin != expected:
        raise CompressionError(
            "bad_header", f"tensor {name!r} in '{file}' needs {expected:,} bytes and is given {end - begin:,}"
        )
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def _element_count(file: str, name: str, shape: list[int]) -> int:
    if len(shape) > MAX_DIMENSIONS:
        raise CompressionError("bad_header", f"tensor {name!r} in '{file}' has {len(shape)} dimensions, not up to 8")
    count = 1
    for size in shape:
        count *= size
        # Checked before a later zero could hide it: other readers multiply in the same order and overflow.
        if size > MAX_ELEMENTS or count > MAX_ELEMENTS:
            raise CompressionError("bad_header", f"tensor {name!r} in '{file}' has an impossible shape {shape}")
    return count


def _check_cover(file: str, entries: list[TensorEntry], data_size: int) -> None:
    position = 0
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CompressionError("bad_header", f"tensor {entry.name!r} in '{file}' {what}")
        position = entry.end
    if position > data_size:
        missing = position - data_size
        raise CompressionError("truncated_file", f"'{file}' is {missing:,} bytes too short: copy it again")
    if position < data_size:
        raise CompressionError("tail_bytes", f"'{file}' has {data_size - position:,} bytes that belong to no tensor")


def _check_tensor_name(file: str, name: str) -> None:
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise CompressionError("bad_header", f"{name[:80]!r} in '{file}' is no name for a tensor")
    if ".." in name or "/" in name or "\\" in name:
        raise CompressionError("bad_path", f"tensor name {name!r} in '{file}' looks like a path")


def _check_metadata(file: str, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CompressionError("bad_header", f"'__metadata__' in '{file}' must map text to text")
    try:
        "".join(metadata.values()).encode()
    except UnicodeError:
        raise CompressionError("not_utf8", f"'__metadata__' in '{file}' is not UTF-8") from None


def _whole_number(text: str) -> int:
    # serde reads "-0" as a float and no 5,000-digit number at all; neither is a size.
    if len(text) > 300 or text == "-0":
        raise ValueError(f"{text[:20]} is no whole number")
    return int(text)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_identifier(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isidentifier()


def _first_duplicate(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise AssertionError("no key is there twice")


def _too_many_tensors(name: str) -> CompressionError:
    return CompressionError("too_many_tensors", f"'{name}' holds more than {MAX_TENSORS:,} tensors: use smaller shards")
