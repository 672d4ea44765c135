"""Lines of an artifact's tensor table that all delta methods share, and the ledger over them.

Kinds: ``raw`` (stored as it is), ``base`` (byte-equal to the base's, in no file), ``rows`` (embeddings by changed row,
see :mod:`compression_worker.deltas.rows`), and whatever a method codes its linears as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from compression_worker import ledger
from compression_worker.contracts import Json
from compression_worker.tensors import ITEM_SIZES, Spec, header_bytes

RAW_FILE = "raw.safetensors"
ROWS_FILE = "rows.safetensors"
DIGEST = "0" * 64
"""Stands for a digest where only its length counts."""

Weigh = Callable[[Json], tuple[Mapping[str, int], int]]
"""A method's own line -> its bytes by part, and the weights that these stand for."""


def raw_entry(spec: Spec, part: str, sha256: str) -> Json:
    """The line of a tensor stored as it is."""
    return {
        "kind": "raw",
        "file": RAW_FILE,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "part": part,
        "sha256": sha256,
    }


def base_entry(spec: Spec, sha256: str) -> Json:
    """The line of a tensor that is byte-equal to the base's."""
    return {"kind": "base", "dtype": spec.dtype, "shape": list(spec.shape), "sha256": sha256}


def same_as_base(ours: Json | None, theirs: Json) -> bool:
    """Whether two manifests' lines of a tensor name the same bytes of the same shape."""
    return ours is not None and all(theirs[key] == ours[key] for key in ("dtype", "shape", "sha256"))


def codes_file(block: int) -> str:
    """The file that holds the codes of transformer block ``block``."""
    return f"codes-{block:05d}.safetensors"


def sides_of(entry: Json) -> tuple[int, int]:
    """``(N, K)`` of the linear that a line stands for."""
    first, second = entry["shape"]
    return (second, first) if entry.get("transposed") else (first, second)


def six_digits(value: float) -> float:
    """Figures are for people: six significant digits, so that they do not fill the manifest."""
    return float(f"{value:.6g}")


def relative_error(error: float, energy: float) -> float:
    """``|D - D_hat| / |D|`` (0 to about 1) from the squares of both norms."""
    return six_digits(math.sqrt(max(0.0, error) / energy)) if energy else 0.0


def book(
    tensors: Mapping[str, Json],
    files: Mapping[str, Json],
    side_files: Iterable[str],
    source: Json,
    weigh: Weigh,
    nominal_ratio: float | None = None,
) -> Json:
    """The manifest's ledger: bytes by part, adding up to all ``files``. ``source``: weight bytes and parameters.

    ``nominal_ratio`` is the paper's count; where it is None, it is taken from the bytes of codes and scales.
    """
    sizes = dict.fromkeys(ledger.PARTS, 0)
    coded_bytes = 0
    for tensor in tensors.values():
        if tensor["kind"] == "raw":
            sizes[tensor["part"]] += math.prod(tensor["shape"]) * ITEM_SIZES[tensor["dtype"]]
        elif tensor["kind"] == "rows":
            sizes[tensor["part"]] += tensor["bytes"]
        elif tensor["kind"] != "base":
            by_part, weights = weigh(tensor)
            for part, size in by_part.items():
                sizes[part] += size
            coded_bytes += weights * ITEM_SIZES[tensor["dtype"]]
    sizes["side files"] = sum(files[name]["size"] for name in side_files)
    sizes["headers"] = sum(entry["size"] for entry in files.values()) - sum(sizes.values())
    parts = ledger.listed(sizes)
    nominal = ledger.nominal_ratio(coded_bytes, parts) if nominal_ratio is None else nominal_ratio
    return {"parts": parts, "nominal_ratio": six_digits(nominal), **source}


def file_line(size: int) -> Json:
    """A file's line in a manifest that is only foretold."""
    return {"sha256": DIGEST, "size": size}


def file_size(specs: Mapping[str, Spec]) -> int:
    """Bytes of a safetensors file that holds ``specs``."""
    return len(header_bytes(specs)) + sum(spec.size for spec in specs.values())
