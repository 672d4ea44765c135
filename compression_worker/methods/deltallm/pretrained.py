"""DeltaLLM artifacts for ``AutoModelForCausalLM.from_pretrained``: imported where transformers is (see ``quantizers``).

transformers makes the model and loads what is stored as it is; followers, and the linears of a packed base, are modules
without weights meanwhile. Afterwards followers use their anchors' weights: the model in memory is the shared form. Its
files are verified by the artifact's manifest as ever.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compression_worker.making.hollow import hollow_out, owners, put_at
from compression_worker.methods.deltallm.layout import QUANT_METHOD


@register_quantization_config(QUANT_METHOD)
class DeltaLLMPretrained(QuantizationConfigMixin):
    """What config.json of an artifact says under ``quantization_config``."""

    def __init__(self, rank: int = 0, **ignored: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.rank = rank


@register_quantizer(QUANT_METHOD)
class DeltaLLMQuantizer(HfQuantizer):
    """Lets followers share in a model that transformers loads from an artifact's folder."""

    requires_calibration = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if len(devices) > 1:
            raise ValueError(f"a DeltaLLM artifact is loaded onto one device, not over {', '.join(sorted(devices))}")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from compression_worker.architecture import describe
        from compression_worker.artifact import Artifact

        if not checkpoint_files:
            raise ValueError("a DeltaLLM artifact is loaded from its folder")
        self._artifact = Artifact.open_folder(Path(checkpoint_files[0]).parent)
        self._artifact.require_whole()
        table = self._artifact.manifest["tensors"]
        architecture = describe(self._artifact.config).renamed_for(table)
        stacked, memory = architecture.stacked(), architecture.memory
        made = {name for name, entry in table.items() if entry["kind"] != "raw"}
        self._weights = [memory.get(name, name) for name in sorted(made - stacked)]
        self._stacks = [own for own, slices in architecture.stacks.items() if slices[0].name in made]
        hollow_out(model, self._weights)
        model._keys_to_ignore_on_load_missing |= {re.escape(name) for name in self._stacks}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from compression_worker.methods.deltallm.merge import SharedTensors, load_model, load_packed, share

        device = model.device
        if self._artifact.manifest["layout"]["base"] is None:
            with SharedTensors(self._artifact) as made, torch.no_grad():
                share(model, made)
        else:
            load = load_packed if device.type == "cuda" else _on_cpu(load_model)
            donor: Any = load(self._artifact, "cpu", model.dtype)
            for path in owners(model, self._weights):
                put_at(model, path, donor.get_submodule(path))
            for stack in self._stacks:
                model.get_parameter(stack).data = donor.get_parameter(stack).data
        model.to(device)

    def is_serializable(self) -> bool:
        """The artifact's folder is the saved form."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _on_cpu(load: Any) -> Any:
    return lambda artifact, device, dtype: load(None, artifact, device, dtype)
