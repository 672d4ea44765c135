"""What an artifact of DeltaLLM says of itself: who follows whom, what that saves, and what it does not save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compression_worker.contracts import Json, StepContext
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import Weigh, sides_of, six_digits
from compression_worker.methods.deltallm.config import SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.layout import delta_operations, delta_parameters
from compression_worker.methods.deltallm.replacement import probability
from compression_worker.methods.deltallm.sources import base_input
from compression_worker.tensors import ITEM_SIZES


def made(
    context: StepContext,
    config: DeltaLLMConfig,
    table: Mapping[str, Json],
    errors: Mapping[str, float],
    scales: Mapping[str, float],
    weigh: Weigh,
) -> Json:
    """All figures. ``table``: the lines of all tensors; ``errors`` and ``scales``: of shared weights.

    ``weigh``: how a line weighs.
    """
    chosen, manifest = context.input("chosen").data, opened(context, "variant").manifest
    base = base_input(context)
    linears = [linear.name for linear in architecture_of(opened(context, "variant")).linears()]
    sizes = {name: _stored(table[name], weigh) for name in linears}
    whole = sum(_weights(table[name]) * ITEM_SIZES[table[name]["dtype"]] for name in linears)
    weights, size = sum(_weights(table[name]) for name in linears), sum(sizes.values())
    theirs = {line["name"]: line for line in base.manifest["figures"]["matrices"]} if base else {}
    return {
        "matrices": [_matrix(name, table[name], sizes[name], errors, theirs) for name in linears],
        "linears": {"bits_per_weight": six_digits(8 * size / weights), "true_ratio": six_digits(whole / size)},
        "sharing": {
            "groups": _groups(chosen["groups"]),
            **({"left_out": chosen["left_out"]} if chosen.get("left_out") else {}),
            "form": config.share_form,
            "blocks": len(architecture_of(opened(context, "variant")).blocks),
            **{name: value for name, value in context.spec.params.items() if name in ("rank", "group_ranks")},
            "rounds": chosen["rounds"],
            "kl_before_training": chosen["curve"][-1]["kl"],
            "parameters": parameters(manifest["parameters"], table),
            "operations": operations(table, manifest),
            **({"ranks": ranks(chosen["ranks"], manifest["parameters"], table)} if "ranks" in chosen else {}),
            **({"scales": dict(scales)} if scales else {}),
        },
        "training": _training(context, config),
    }


def parameters(before: int, table: Mapping[str, Json]) -> Json:
    """Parameters before and after, and the share that is gone."""
    shared = [entry for entry in table.values() if entry["kind"] == "shared"]
    after = before - sum(_weights(entry) - delta_parameters(entry) for entry in shared)
    return {"before": before, "after": after, "reduction": six_digits(1 - after / before)}


def ranks(points: Sequence[Json], before: int, table: Mapping[str, Json]) -> list[Json]:
    """Each measured rank with the parameters that it leaves: the highest, and the lowest where matrices differ."""
    shared = {name: entry for name, entry in table.items() if entry["kind"] == "shared"}
    found = []
    for point in points:
        parts = point["parts"]
        cut = {name: entry | {"rank": entry["rank"] // parts if parts else 0} for name, entry in shared.items()}
        low, high = (pick(cut[name]["rank"] for name in cut if shared[name]["rank"]) for pick in (min, max))
        found.append(
            {
                "rank": high,
                **({"lowest": low} if low < high else {}),
                "parameters": parameters(before, cut)["after"],
                "kl": point["kl"],
            }
        )
    return found


def operations(table: Mapping[str, Json], manifest: Json) -> Json:
    """Multiplications and additions of products with weights, for each token, before and after.

    Never fewer, unless blocks are left out: every other follower multiplies with its anchor's weight and with its
    factors as well. Attention's products of tokens
    with each other are the same in both and are not counted, nor are the experts that a token does not reach.
    """
    matrices = [entry for entry in table.values() if len(entry["shape"]) == 2 and entry.get("part") != "embeddings"]
    before = sum(2 * _weights(entry) for entry in matrices)
    tied = [target for _, target in manifest["aliases"]]
    before += sum(2 * _weights(table[name]) for name in tied)
    added = [delta_operations(entry) for entry in matrices if entry["kind"] == "shared"]
    return {"before": before, "after": before + sum(added)}


def _training(context: StepContext, config: DeltaLLMConfig) -> Json:
    """The curve over tokens on held-out text, before and after; without training it is one point."""
    text, start = context.input("text").data, context.input("chosen").data["curve"]
    trained = context.input("trained").data if "trained" in context.spec.inputs else {"curve": start, "losses": []}
    first, last = start[-1], trained["curve"][-1]
    total = config.steps * config.epochs
    vocabulary = opened(context, "variant").manifest["config"].get("vocab_size") or config.teacher_logits
    if total and last["kl"] >= first["kl"]:
        context.log(
            f"on held-out text training brought the model no nearer to what it was: KL {first['kl']:.4g} before, "
            f"{last['kl']:.4g} after",
            "warning",
        )
    return {
        "tokens": last["tokens"],
        "losses": trained["losses"],
        "curve": [{key: value for key, value in point.items() if key != "windows"} for point in trained["curve"]],
        "kl_before": first["kl"],
        "kl_after": last["kl"],
        "ce_before": first["ce"],
        "ce_after": last["ce"],
        "kl_fell": last["kl"] < first["kl"],
        "ce_fell": last["ce"] < first["ce"],
        "teacher_logits": min(config.teacher_logits, vocabulary),
        "probabilities": [six_digits(probability(config, step, total)) for step in range(total)],
        "windows": {name: text[name] for name in ("windows", "distinct", "held_out", "length")},
        "held_out_kl": {"before": first["windows"], "after": last["windows"]},
    }


def _groups(groups: Mapping[str, int]) -> Json:
    """Anchor -> its followers."""
    found: dict[str, list[int]] = {}
    for follower, anchor in groups.items():
        found.setdefault(str(anchor), []).append(int(follower))
    return {anchor: sorted(followers) for anchor, followers in sorted(found.items(), key=lambda one: int(one[0]))}


def _matrix(name: str, entry: Json, size: int, errors: Mapping[str, float], theirs: Mapping[str, Json]) -> Json:
    """A shared weight by what it is made of, another as the packed base says, or as it was."""
    if entry["kind"] == "shared":
        return {"name": name, "coding": _coding(entry), "bytes": size, "relative_error": errors[name]}
    if name in errors:
        return {"name": name, "coding": "whole, tuned", "bytes": size, "relative_error": errors[name]}
    return dict(theirs.get(name) or {"name": name, "coding": "whole", "bytes": size, "relative_error": 0.0})


def _coding(entry: Json) -> str:
    """How a shared weight is made, in words that pages read."""
    if entry["form"] == SIGN:
        return f"signs on '{entry['anchor']}'"
    return f"rank {entry['rank']} on '{entry['anchor']}'" if entry["rank"] else "left out"


def _stored(entry: Json, weigh: Weigh) -> int:
    """Bytes of a linear."""
    if entry["kind"] == "raw":
        return _weights(entry) * ITEM_SIZES[entry["dtype"]]
    return sum(weigh(entry)[0].values())


def _weights(entry: Json) -> int:
    first, second = sides_of(entry)
    return first * second
