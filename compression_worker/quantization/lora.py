"""LoRA through the PEFT library on linears of any kind, packed ones among them.

    y = x W^^T + (alpha / r) (x A^T) B^T,    A (r, K),  B (N, r)

``W^`` stays in its codes, forward and backward; ``A`` and ``B`` are fp32 and are cast to the dtype of ``x`` on use. For
the backward pass a layer keeps ``x``, ``x A^T`` and the factors: nothing of the size of ``W^``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from compression_worker.adapters import lora_names

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
        first, second = lora_names(path)
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
        first, second = lora_names(path)
        found[first] = torch.empty(rank, inputs)
        torch.nn.init.kaiming_uniform_(found[first], a=math.sqrt(5), generator=generator)
        found[second] = torch.zeros(outputs, rank)
    return found
