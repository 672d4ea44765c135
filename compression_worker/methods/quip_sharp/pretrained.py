"""QuIP# artifacts for ``AutoModelForCausalLM.from_pretrained``: imported where transformers is (see ``quantizers``).

transformers makes the model and loads what is stored as it is; coded linears are modules without weights meanwhile, and
become dense on a CPU, or packed on a GPU, afterwards. They are read from the artifact whose folder is loaded, verified
by its manifest as ever.
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

QUANT_METHOD = "deltaworks_quip_sharp"


@register_quantization_config(QUANT_METHOD)
class QuipSharpPretrained(QuantizationConfigMixin):
    """What config.json of an artifact says under ``quantization_config``."""

    def __init__(self, bits: int = 2, **ignored: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.bits = bits


@register_quantizer(QUANT_METHOD)
class QuipSharpQuantizer(HfQuantizer):
    """Fills the coded linears of a model that transformers loads from an artifact's folder."""

    requires_calibration = True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if len(devices) > 1:
            raise ValueError(f"a QuIP# artifact is loaded onto one device, not over {', '.join(sorted(devices))}")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from compression_worker.artifact import Artifact
        from compression_worker.methods.quip_sharp.loading import packable
        from compression_worker.methods.quip_sharp.merge import LatticeTensors

        if not checkpoint_files:
            raise ValueError("a QuIP# artifact is loaded from its folder")
        artifact = Artifact.open_folder(Path(checkpoint_files[0]).parent)
        artifact.require_whole()
        with torch.device("cpu"):  # around it, everything new is on the meta device
            self._made = LatticeTensors(artifact)
            self._names = packable(self._made)
            self._stacks = _stacks(self._made)
        hollow_out(model, self._names.values())
        model._keys_to_ignore_on_load_unexpected |= {"#"}
        model._keys_to_ignore_on_load_missing |= {re.escape(name) for name in self._stacks}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from compression_worker.methods.quip_sharp.loading import pack

        with self._made as made, torch.no_grad():
            for stack, names in self._stacks.items():
                parameter = model.get_parameter(stack)
                rows = torch.cat([made.tensor(name, parameter.dtype) for name in names])
                parameter.data = rows.view(parameter.shape).to(parameter.device)
            if model.device.type == "cuda":
                pack(model, made, self._names)
                model.to(model.device)
                return
            paths = owners(model, self._names.values())
            for name, path in zip(self._names, paths, strict=True):
                hollow = model.get_submodule(path)
                (linear,) = hollow.stands_for
                weight = made.tensor(name, linear.weight.dtype).to(model.device)
                linear.weight, linear.bias = torch.nn.Parameter(weight, requires_grad=False), hollow.bias
                put_at(model, path, linear)

    def is_serializable(self) -> bool:
        """The artifact's folder is the saved form."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _stacks(made: Any) -> dict[str, list[str]]:
    """The parameters that hold the experts of a layer -> their matrices in order."""
    from compression_worker.architecture import describe

    architecture = describe(made.artifact.config).renamed_for(made.table)
    return {
        stack: [one.name for one in sorted(slices, key=lambda one: one.first)]
        for stack, slices in architecture.stacks.items()
    }
