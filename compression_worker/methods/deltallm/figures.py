"""What an artifact of DeltaLLM says of itself: who follows whom, what that saves, and what it does not save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compression_worker.contracts import Json, StepContext
from compression_worker.making.inputs import opened
from compression_worker.making.table import sides_of, six_digits
from compression_worker.methods.deltallm.layout import delta_parameters, weigh
from compression_worker.tensors import ITEM_SIZES


def made(context: StepContext, table: Mapping[str, Json], errors: Mapping[str, float], linears: Sequence[str]) -> Json:
    """All figures. ``table``: the lines of all tensors; ``errors``: of shared weights; ``linears``: block linears."""
    chosen = context.input("chosen").data
    sizes = {name: _stored(table[name]) for name in linears}
    whole = {name: _weights(table[name]) * ITEM_SIZES[table[name]["dtype"]] for name in linears}
    weights = sum(_weights(table[name]) for name in linears)
    return {
        "matrices": [_matrix(name, table[name], sizes[name], errors.get(name, 0.0)) for name in linears],
        "linears": {
            "bits_per_weight": six_digits(8 * sum(sizes.values()) / weights),
            "true_ratio": six_digits(sum(whole.values()) / sum(sizes.values())),
        },
        "sharing": {
            "groups": _groups(chosen["groups"]),
            "rank": next(entry["rank"] for entry in table.values() if entry["kind"] == "shared"),
            "rounds": chosen["rounds"],
            "kl_before_training": chosen["start"]["kl"],
            "parameters": parameters(opened(context, "variant").manifest["parameters"], table),
            "operations": operations(table, opened(context, "variant").manifest),
        },
    }


def parameters(before: int, table: Mapping[str, Json]) -> Json:
    """Parameters before and after, and the share that is gone."""
    shared = [entry for entry in table.values() if entry["kind"] == "shared"]
    after = before - sum(_weights(entry) - delta_parameters(entry) for entry in shared)
    return {"before": before, "after": after, "reduction": six_digits(1 - after / before)}


def operations(table: Mapping[str, Json], manifest: Json) -> Json:
    """Multiplications and additions of products with weights, for each token, before and after: never fewer.

    Every follower multiplies with its anchor's weight and with its factors as well. Attention's products of tokens
    with each other are the same in both and are not counted, nor are the experts that a token does not reach.
    """
    matrices = [entry for entry in table.values() if len(entry["shape"]) == 2 and entry.get("part") != "embeddings"]
    before = sum(2 * _weights(entry) for entry in matrices)
    tied = [target for _, target in manifest["aliases"]]
    before += sum(2 * _weights(table[name]) for name in tied)
    after = before + sum(2 * delta_parameters(entry) for entry in matrices if entry["kind"] == "shared")
    assert after >= before, "sharing saves no arithmetic"
    return {"before": before, "after": after}


def _groups(groups: Mapping[str, int]) -> Json:
    """Anchor -> its followers."""
    found: dict[str, list[int]] = {}
    for follower, anchor in groups.items():
        found.setdefault(str(anchor), []).append(int(follower))
    return {anchor: sorted(followers) for anchor, followers in sorted(found.items(), key=lambda one: int(one[0]))}


def _matrix(name: str, entry: Json, size: int, error: float) -> Json:
    is_shared = entry["kind"] == "shared"
    coding = f"rank {entry['rank']} on '{entry['anchor']}'" if is_shared else "whole"
    return {"name": name, "coding": coding, "bytes": size, "relative_error": error}


def _stored(entry: Json) -> int:
    if entry["kind"] == "shared":
        return sum(weigh(entry)[0].values())
    return _weights(entry) * ITEM_SIZES[entry["dtype"]]


def _weights(entry: Json) -> int:
    first, second = sides_of(entry)
    return first * second
