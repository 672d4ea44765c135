"""LoRA through the PEFT library on linears that stay packed.

    y = x W^^T + (alpha / r) (x A^T) B^T,    A (r, K),  B (N, r)

``W^`` stays in its codes, forward and backward; ``A`` and ``B`` are fp32 and are cast to the dtype of ``x`` on use. For
the backward pass a layer keeps ``x``, ``x A^T`` and the factors: nothing of the size of ``W^``.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from compression_worker.adapters import CONFIG_FILE
from compression_worker.contracts import StepContext
from compression_worker.methods.int21.layout import PACKED_BASE, keys
from compression_worker.tensors import Spec, TensorFile, raw_bytes, write_file

ADAPTER = "default"


class PackedLora(torch.nn.Module, LoraLayer):
    """PEFT's LoRA layer around a linear of any packed kind, to which :func:`attach` gave its sides."""

    def __init__(
        self, base_layer: Any, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **more: Any
    ) -> None:
        torch.nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        for name in [] if self.disable_adapters else self.active_adapters:
            a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
            low = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
            y = torch.add(y, low, alpha=self.scaling[name])
        return y

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features


def attach(model: Any, sides: Mapping[str, tuple[int, int]], *, rank: int, alpha: int) -> Any:
    """Put adapters on linears, in place. ``sides``: path -> ``(N, K)``; until :func:`put` fills them, they do nothing.

    What packs a linear need not know its inputs, so each is told.
    """
    modules, device = dict(model.named_modules()), model.device
    linears = {path: modules[path] for path in sides}
    for path, (outputs, inputs) in sides.items():
        linears[path].out_features, linears[path].in_features = outputs, inputs
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(sides))
    config._register_custom_module({type(linear): PackedLora for linear in linears.values()})
    bare = [linear for linear in linears.values() if not (hasattr(linear, "qweight") or hasattr(linear, "weight"))]
    for linear in bare:
        linear.weight = torch.empty(0, device=device)  # where the library looks for a device
    inject_adapter_in_model(config, model, ADAPTER)
    for linear in bare:
        del linear.weight
    for parameter in factors(model, sides).values():
        parameter.data = parameter.data.to(device, torch.float32)
    return model


def factors(model: Any, paths: Collection[str]) -> dict[str, torch.nn.Parameter]:
    """The trainable factors by the names that PEFT writes, A before B, in the order of ``paths``."""
    modules = dict(model.named_modules())
    found = {}
    for path in paths:
        first, second = keys(path)
        found[first], found[second] = (side[ADAPTER].weight for side in (modules[path].lora_A, modules[path].lora_B))
    return found


def put(model: Any, paths: Collection[str], values: Mapping[str, torch.Tensor]) -> None:
    """Fill the factors with ``values`` by name."""
    with torch.no_grad():
        for name, parameter in factors(model, paths).items():
            parameter.copy_(values[name])


def fresh(sides: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Factors as PEFT begins them: ``A`` uniform (Kaiming), ``B`` zero. ``sides``: path -> ``(N, K)``."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path, (outputs, inputs) in sides.items():
        first, second = keys(path)
        found[first] = torch.empty(rank, inputs)
        torch.nn.init.kaiming_uniform_(found[first], a=math.sqrt(5), generator=generator)
        found[second] = torch.zeros(outputs, rank)
    return found


def config_file(paths: Collection[str], others: Collection[str], *, rank: int, alpha: int, transposed: bool) -> bytes:
    """``adapter_config.json`` as the library writes it, with names in order.

    ``others`` are the model's other modules: where one of them ends like a linear that carries an adapter, linears are
    named in full. ``transposed``: a stock model keeps its weights as ``(K, N)``, as GPT-2 does.
    """
    ends = {path.rpartition(".")[2] for path in paths}
    clash = any(other.rpartition(".")[2] in ends for other in others)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(paths if clash else ends),
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        said = json.loads((Path(folder) / CONFIG_FILE).read_text())
    said["target_modules"] = sorted(said["target_modules"])
    return json.dumps(said, indent=2, sort_keys=True).encode()


def stored(context: StepContext, state: str, paths: Collection[str], dtype: str, packed_base: str) -> str:
    """The factors in the blob ``state`` as ``adapter_model.safetensors``; its digest in the store."""
    kinds = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
    names = sorted(name for path in paths for name in keys(path))
    with TensorFile(context.store.verified_path(state)) as file:
        made = {name: file.tensor(name).to(getattr(torch, dtype)) for name in names}
    data = {name: (Spec(kinds[dtype], tuple(one.shape)), [raw_bytes(one)]) for name, one in made.items()}
    with context.store.writer() as blob:
        write_file(blob, data, {"format": "pt", PACKED_BASE: packed_base})
    return blob.digest
