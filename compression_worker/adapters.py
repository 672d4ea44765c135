"""PEFT adapters as they arrive: what ``adapter_config.json`` may say, and which tensors an adapter changes. No torch.

LoRA, rsLoRA and DoRA are understood, with whole tensors (``modules_to_save``, trained biases) beside them. Everything
else is refused by name, a setting that this version does not know included: a merge that leaves something out would
give a model that nobody trained. ``base_model_name_or_path`` is not looked at: the base is the one that a person chose.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from compression_worker import gate
from compression_worker.contracts import CompressionError, Json
from compression_worker.gate import TensorEntry

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PLAIN_SETTINGS = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "init_lora_weights"),
        # Read from the tensors and the base, not from here:
        *("rank_pattern", "target_modules", "exclude_modules", "modules_to_save", "bias", "fan_in_fan_out"),
        *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),
        # Of training, or of the library:
        *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout", "auto_mapping"),
        *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config"),
    }
)
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it."""
SAVED_MODULE = re.compile(r"[A-Za-z0-9_.]{1,200}")
PREFIX = "base_model.model."
SIDES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class Settings:
    """What of ``adapter_config.json`` counts for the merge. ``alphas``: for ends of module names, in their order."""

    alpha: float
    root: bool
    dora: bool
    alphas: dict[str, float]

    def scale(self, module: str, rank: int) -> float:
        """LoRA's ``alpha / r``, rsLoRA's ``alpha / sqrt(r)``."""
        own = (alpha for end, alpha in self.alphas.items() if f".{module}".endswith(f".{end}"))
        return next(own, self.alpha) / (math.sqrt(rank) if self.root else rank)


@dataclass(frozen=True)
class LowRank:
    """``W + scale * B A`` of one module: the names of ``a`` ``(r, in)``, ``b`` ``(out, r)`` and DoRA's magnitudes."""

    module: str
    a: str
    b: str
    magnitude: str
    embedding: bool


@dataclass(frozen=True)
class Changes:
    """What an adapter changes, by the tensor's name in memory: by a low rank, or by another tensor (its name)."""

    low_rank: dict[str, LowRank]
    whole: dict[str, str]


def is_adapter(names: Collection[str]) -> bool:
    """Whether a folder with these files is an adapter: it has an adapter's config, and no weights of a whole model."""
    whole = gate.INDEX_FILE in names or "model.safetensors" in names
    return CONFIG_FILE in names and not whole


def check_adapter_config(raw: bytes) -> Settings:
    """The settings in ``adapter_config.json``; refuses whatever a merge of LoRA, rsLoRA or DoRA does not cover."""
    config = gate.check_no_code(CONFIG_FILE, raw)
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        raise CompressionError(
            "unknown_adapter",
            f"'{CONFIG_FILE}' says peft_type {kind!r}; only LORA (with rsLoRA and DoRA) is merged here. Merge it with "
            "merge_and_unload() where you trained it, and import the model that this gives",
        )
    if task not in ("CAUSAL_LM", None):
        raise CompressionError(
            "unknown_adapter", f"'{CONFIG_FILE}' says task_type {task!r}: only causal language models are compressed"
        )
    if (start := config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise CompressionError(
            "unknown_adapter",
            f"'{CONFIG_FILE}' says init_lora_weights {start!r}, which changes the base before the training: save the "
            "adapter with path_initial_model_for_weight_conversion, which makes it one for the base as it is",
        )
    for name in sorted(config.keys() - PLAIN_SETTINGS):
        if config[name]:
            raise CompressionError(
                "unknown_adapter",
                f"'{CONFIG_FILE}' sets {name!r}, which is not merged here. Merge it with merge_and_unload() where you "
                "trained it, and import the model that this gives",
            )
    return Settings(
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        root=_switch(config, "use_rslora"),
        dora=_switch(config, "use_dora"),
        alphas=_alphas(config.get("alpha_pattern") or {}),
    )


def changes(tensors: Mapping[str, TensorEntry], settings: Settings) -> Changes:
    """The tensors of ``adapter_model.safetensors`` by what they do; refuses one whose part is not known."""
    sides: dict[str, dict[str, str]] = {}
    embeddings, whole = set(), {}
    for name in sorted(tensors):
        if not name.startswith(PREFIX):
            raise _unknown(name, "does not begin with 'base_model.model.' as PEFT writes it")
        own = name.removeprefix(PREFIX)
        end = next((end for end in SIDES if own.endswith(end)), None)
        if end is None:
            whole[own.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
            continue
        module = own.removesuffix(end)
        sides.setdefault(module, {})[SIDES[end]] = name
        if "embedding" in end:
            embeddings.add(module)
    low_rank = {f"{m}.weight": _low_rank(m, names, m in embeddings, settings.dora) for m, names in sides.items()}
    if not low_rank and not whole:
        raise CompressionError("no_tensors", f"'{WEIGHTS_FILE}' holds no tensor of an adapter")
    return Changes(low_rank, whole)


def _low_rank(module: str, names: dict[str, str], embedding: bool, dora: bool) -> LowRank:
    for side in ("a", "b"):
        if side not in names:
            raise _unknown(next(iter(names.values())), f"has no lora_{side.upper()} beside it: copy the adapter again")
    if dora != ("magnitude" in names):
        said = "has no magnitudes although use_dora is set" if dora else "has magnitudes although use_dora is not set"
        raise _unknown(names["a"], f"{said}: copy the adapter again, config and weights of one training")
    if embedding and dora:
        raise _unknown(names["a"], "adapts embeddings by DoRA, which is not merged here")
    return LowRank(module, names["a"], names["b"], names.get("magnitude", ""), embedding)


def _alphas(pattern: Any) -> dict[str, float]:
    """``alpha_pattern`` with plain names only: PEFT reads regular expressions there, and those are foreign programs."""
    if not isinstance(pattern, dict):
        raise CompressionError("bad_config", f"'alpha_pattern' in '{CONFIG_FILE}' is no object")
    for name in pattern:
        if not SAVED_MODULE.fullmatch(name):
            raise CompressionError(
                "bad_config",
                f"'alpha_pattern' in '{CONFIG_FILE}' has {name[:80]!r}: only plain ends of module names are read here",
            )
    return {name: _number(f"alpha_pattern.{name}", value) for name, value in pattern.items()}


def _number(name: str, value: object) -> float:
    if type(value) not in (int, float) or not 0 < float(str(value)) < 1e6:
        raise CompressionError("bad_config", f"{name!r} in '{CONFIG_FILE}' is {value!r}; it must be a number above 0")
    return float(str(value))


def _switch(config: Json, name: str) -> bool:
    value = config.get(name, False)
    if value not in (True, False, None):
        raise CompressionError("bad_config", f"{name!r} in '{CONFIG_FILE}' is {value!r}; it must be true or false")
    return bool(value)


def _unknown(name: str, what: str) -> CompressionError:
    return CompressionError("unknown_adapter", f"tensor {name!r} in '{WEIGHTS_FILE}' {what}")


def lora_names(path: str) -> tuple[str, str]:
    """The names that PEFT gives ``A`` and ``B`` of the linear at ``path`` in the model."""
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"
