"""Every byte of an artifact by part, and the ratios that follow.

*True ratio*: bytes of the variant's weight files / bytes of the whole artifact, manifest and tokenizer included (a
vocabulary that is the base's own, byte for byte, lies with the base and is not stored again).
*Nominal ratio*: bytes of the compressed matrices in the variant's dtype / bytes of their codes and scales, padding
included. It says what the method does to the weights it touches (about 16 for one bit in place of bf16) and is silent
about embeddings, head and norms, which is why it stands beside the true ratio and never instead of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compression_worker.contracts import Json

PARTS = (
    "codes",
    "scales",
    "adapter",
    "deltas",
    "linears",
    "embeddings",
    "head",
    "norms",
    "biases",
    "other",
    "headers",
    "side files",
    "manifest",
)
"""The order in which parts are listed. ``manifest`` is added by readers: a file cannot hold its own size."""


def listed(sizes: Mapping[str, int]) -> list[Json]:
    """``sizes`` as ledger lines in the order of :data:`PARTS`, without empty parts."""
    unknown = sizes.keys() - set(PARTS)
    if unknown:
        raise ValueError(f"no parts of a ledger: {sorted(unknown)}")
    return [{"name": name, "bytes": sizes[name]} for name in PARTS if sizes.get(name)]


def with_manifest(parts: Iterable[Json], manifest_bytes: int) -> list[Json]:
    """The ledger of a whole artifact."""
    return [*parts, {"name": "manifest", "bytes": manifest_bytes}]


def total(parts: Iterable[Json]) -> int:
    """All bytes that the ledger names."""
    return sum(part["bytes"] for part in parts)


def true_ratio(source_bytes: int, artifact_bytes: int) -> float:
    return source_bytes / artifact_bytes


def nominal_ratio(compressed_source_bytes: int, parts: Iterable[Json]) -> float:
    """``compressed_source_bytes``: the compressed matrices in the variant's dtype."""
    stored = sum(part["bytes"] for part in parts if part["name"] in ("codes", "scales"))
    return compressed_source_bytes / stored if stored else 1.0


def bits_per_weight(artifact_bytes: int, parameters: int) -> float:
    """Bits of the whole artifact for each parameter of the variant."""
    return 8 * artifact_bytes / parameters
