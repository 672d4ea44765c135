"""What is beneath the adapters: which linears carry one, and the digest of all that was packed.

An artifact of INT2.1 holds every file of the base's artifact and the adapter. Its manifest's ``layout`` says which
method made the base, with which settings, and the digest of all that was packed: an adapter says the same digest and
fits no other base.
"""

from __future__ import annotations

from collections.abc import Mapping

from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError, Json, canonical_json, sha256
from compression_worker.making.beneath import architecture_of_artifact, as_base, base_of
from compression_worker.making.table import sides_of
from compression_worker.methods.int21.config import Int21Config

NAME, VERSION = "int21", 1


def layout_of(base: Artifact, config: Int21Config) -> Json:
    """What the manifest says of the base and the adapter on it."""
    return {
        "name": NAME,
        "version": VERSION,
        "base": base_of(base),
        "packed_base": packed_digest(base.manifest["tensors"]),
        "rank": config.rank,
        "alpha": config.lora_alpha,
    }


def packed_digest(tensors: Mapping[str, Json]) -> str:
    """SHA-256 over the lines of all tensors beneath the adapters, which carry shapes, codings and digests."""
    return sha256(canonical_json({name: _beneath(entry) for name, entry in tensors.items()}))


def beneath(artifact: Artifact) -> Artifact:
    """The base of an artifact of INT2.1 as an artifact of its own method, read from the same files."""
    layout = artifact.manifest["layout"]
    if (layout.get("name"), layout.get("version")) != (NAME, VERSION):
        raise CompressionError(
            "unknown_format", "the artifact's adapters have a layout that this version does not know"
        )
    tensors = {name: _beneath(entry) for name, entry in artifact.manifest["tensors"].items()}
    if packed_digest(tensors) != layout["packed_base"]:
        raise CompressionError(
            "base_mismatch", "the adapter was trained on another packed base: use the artifact that both came in"
        )
    return as_base(artifact, tensors)


def adapted(artifact: Artifact) -> dict[str, str]:
    """Name -> path in the model of the coded linears that carry an adapter: those that are modules of their own."""
    architecture = architecture_of_artifact(artifact)
    stacked = architecture.stacked()
    table = artifact.manifest["tensors"]
    names = [linear.name for linear in architecture.linears() if linear.name not in stacked]
    found = {name: architecture.memory.get(name, name) for name in names if table[name]["kind"] != "raw"}
    return {name: own.removesuffix(".weight") for name, own in found.items()}


def sides(artifact: Artifact) -> dict[str, tuple[int, int]]:
    """Path in the model -> ``(N, K)`` of the linears that carry an adapter."""
    table = artifact.manifest["tensors"]
    return {path: sides_of(table[name]) for name, path in adapted(artifact).items()}


def _beneath(entry: Json) -> Json:
    return {key: value for key, value in entry.items() if key != "rank"}
