"""What an artifact of INT2.1 says of itself: its matrices, what adapters add, and how the training went."""

from __future__ import annotations

from collections.abc import Mapping

from compression_worker import catalog
from compression_worker.artifact import Artifact
from compression_worker.contracts import Json, StepContext
from compression_worker.making.inputs import opened
from compression_worker.making.table import Weigh, six_digits
from compression_worker.methods.int21.config import Int21Config
from compression_worker.methods.int21.estimate import training_peaks
from compression_worker.methods.int21.layout import ITEM_BYTES, adapter_parameters
from compression_worker.methods.int21.overhead import overhead
from compression_worker.preflight import Model
from compression_worker.tensors import ITEM_SIZES


def made(context: StepContext, config: Int21Config, base: Artifact, lines: Mapping[str, Json], weigh: Weigh) -> Json:
    """All figures. ``lines``: the coded tensors, which say their ``rank`` where they carry an adapter."""
    found = dict(base.manifest["figures"])
    left = context.input("start").data["left"] if "start" in context.spec.inputs else {}
    found["matrices"] = [_matrix(one, lines.get(one["name"], {}), config, left) for one in found["matrices"]]
    sizes = {"codes": 0, "scales": 0, "adapter": 0}
    weights = whole = 0
    for entry in lines.values():
        by_part, count = weigh(entry)
        for part in sizes:
            sizes[part] += by_part.get(part, 0)
        weights += count
        whole += count * ITEM_SIZES[entry["dtype"]]
    parameters = base.manifest["ledger"]["parameters"]
    rest = sum(one["bytes"] for one in base.parts if one["name"] in ("embeddings", "head", "norms", "biases", "other"))
    added = overhead(
        **sizes, rest=rest, weights=weights, others=parameters - weights, item_bytes=round(whole / weights)
    )
    stored = sum(sizes.values())
    found["linears"] = {
        "bits_per_weight": six_digits(8 * stored / weights),
        "true_ratio": six_digits(whole / stored),
    }
    found["overhead"] = {where: {name: six_digits(one) for name, one in how.items()} for where, how in added.items()}
    found["base"] = {"method": config.base_method, "label": catalog.METHODS[config.base_method].label}
    found["training"] = _training(context, config, sizes["adapter"] // ITEM_BYTES[config.adapter_dtype])
    found["training"] |= _memory(context, config, sizes["codes"] + sizes["scales"])
    return found


def _matrix(line: Json, entry: Json, config: Int21Config, left: Mapping[str, float]) -> Json:
    """A matrix of the base, with its adapter counted."""
    if not entry.get("rank"):
        return line
    size = line["bytes"] + ITEM_BYTES[config.adapter_dtype] * adapter_parameters(entry, entry["rank"])
    more = {"left_by_start": left[line["name"]]} if line["name"] in left else {}
    return {**line, "bytes": size, "coding": f"{line['coding']}, rank {entry['rank']}", **more}


def _training(context: StepContext, config: Int21Config, parameters: int) -> Json:
    """The curve over tokens on held-out text, before and after; and what to say where text and teacher disagree."""
    trained, text = context.input("trained").data, context.input("text").data
    curve = [{key: value for key, value in point.items() if key != "windows"} for point in trained["curve"]]
    first, last = trained["curve"][0], trained["curve"][-1]
    kl_fell, ce_fell = last["kl"] < first["kl"], last["ce"] < first["ce"]
    if not kl_fell:
        words = " although the text itself is predicted better" if ce_fell else ""
        context.log(
            f"on held-out text the model did not come nearer to its teacher{words}: KL {first['kl']:.4g} before, "
            f"{last['kl']:.4g} after",
            "warning",
        )
    vocabulary = opened(context, "variant").manifest["config"].get("vocab_size") or config.teacher_logits
    return {
        "tokens": last["tokens"],
        "losses": trained["losses"],
        "curve": curve,
        "kl_before": first["kl"],
        "kl_after": last["kl"],
        "ce_before": first["ce"],
        "ce_after": last["ce"],
        "kl_fell": kl_fell,
        "ce_fell": ce_fell,
        "teacher_logits": min(config.teacher_logits, vocabulary),
        "parameters": parameters,
        "windows": {name: text[name] for name in ("windows", "distinct", "held_out", "length")},
        "held_out_kl": {"before": first["windows"], "after": last["windows"]},
    }


def _memory(context: StepContext, config: Int21Config, packed_bytes: int) -> Json:
    """Bytes of tensors at the peak of training, and of three ways that keep dense weights, on the same pass.

    All are computed from shapes; none where those are not known. Activations are float32 on a CPU, else as the model.
    """
    manifest = opened(context, "variant").manifest
    model = Model(**{name: manifest[name] for name in ("config", "parameters", "weight_bytes", "size_bytes")})
    item_bytes = 4 if context.device == "cpu" else round(model.width)
    found = training_peaks(config, model, packed_bytes, item_bytes, context.input("text").data["length"])
    if found is None:
        return {}
    return {
        "peak_bytes": found.packed,
        "lora_fp16_bytes": found.lora_fp16,
        "lora_fp32_bytes": found.lora_fp32,
        "full_finetune_bytes": found.full_finetune,
        "activation_bytes": item_bytes,
    }
