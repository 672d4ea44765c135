"""A compressed model in memory: dense, or with its coded linears left packed for a kernel."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from compression_worker.architecture import parsed
from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError
from compression_worker.making.reading import ArtifactTensors
from compression_worker.tensors import DTYPES

PackedModule = Callable[[str, Any], torch.nn.Module | None]
"""Name of a weight and the linear that holds the base's -> the module that keeps it packed, or None to merge it."""


def dense_model(
    made: ArtifactTensors,
    dtype: torch.dtype | None,
    leave: Callable[[str], bool] = lambda name: False,
    *,
    shared: bool = False,
) -> Any:
    """The model's architecture with dense weights; those that ``leave`` names hold a placeholder.

    So do those that use another's weight, unless ``shared`` has them made too. ``dtype`` None keeps the variant's own.
    """

    def stays_away(name: str) -> bool:
        return leave(name) or (made.table[name]["kind"] == "shared" and not shared)

    weights = {}
    for name, entry in made.table.items():
        own = dtype or DTYPES[entry["dtype"]]
        weights[name] = made.placeholder(name).to(own) if stays_away(name) else made.tensor(name, own)
    return _filled(made.artifact, weights, dtype)


def pack_modules(model: Any, names: Mapping[str, str], packed: PackedModule) -> None:
    """Put what ``packed`` makes in the place of the linear of each of ``names`` (name -> name in memory)."""
    modules = dict(model.named_modules())
    for name, weight in names.items():
        path = module_path(weight, modules, model.base_model_prefix)
        parent, _, child = path.rpartition(".")
        if module := packed(name, modules[path]):
            setattr(modules[parent], child, module)


def module_path(tensor: str, modules: dict[str, Any], prefix: str) -> str:
    """The module that owns the weight ``tensor``; some checkpoints leave out the model's prefix."""
    path = tensor.removesuffix(".weight")
    return path if path in modules else f"{prefix}.{path}"


def _filled(artifact: Artifact, weights: dict[str, torch.Tensor], dtype: torch.dtype | None) -> Any:
    """The variant's architecture holding ``weights``; refuses a gap, which transformers would fill at random."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = parsed(artifact.config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    own = dtype or max(weights.values(), key=torch.Tensor.numel).dtype
    model, report = kind.from_pretrained(None, config=config, state_dict=weights, dtype=own, output_loading_info=True)
    for part in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[part]):
            raise CompressionError(
                "damaged_artifact",
                f"{kind.__name__} and the artifact disagree on {len(names)} tensors ({names[0]} first)",
            )
    if generation := artifact.side_files().get("generation_config.json"):
        model.generation_config = GenerationConfig.from_dict(json.loads(generation.read_bytes()))
    return model
