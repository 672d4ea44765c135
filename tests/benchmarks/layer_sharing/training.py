"""The same lesson for every peer: the full model's answers on the same windows in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from compression_worker.quantization.divergence import divergence
from compression_worker.quantization.learning import LARGEST_GRADIENT, rate_at
from compression_worker.quantization.teacher import TopLogits
from tests.benchmarks.layer_sharing.peers import Thin, linears_of

TEACHER_LOGITS = 128


class Lesson:
    """Windows and what the full model answers there, kept once for all peers."""

    def __init__(self, teacher: Any, windows: torch.Tensor, batch: int) -> None:
        self._windows, self._batch = windows, batch
        with torch.no_grad():
            self._answers = [TopLogits.of(teacher(one, use_cache=False).logits, TEACHER_LOGITS) for one in self._all()]

    def _all(self) -> Iterator[torch.Tensor]:
        return iter(self._windows.split(self._batch))

    def teach(self, model: Any, trained: list[torch.nn.Parameter], rate: float) -> list[float]:
        """One reading of the windows with AdamW; the losses before each step."""
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        losses = []
        for step, (windows, answers) in enumerate(zip(self._all(), self._answers, strict=True)):
            loss = divergence(model(windows, use_cache=False).logits, answers, windows).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
            optimizer.param_groups[0]["lr"] = rate_at(rate, step, len(self._answers))
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses


def prepared(model: Any, trainable: int) -> list[torch.nn.Parameter]:
    """What a peer trains: its thin matrices, or LoRA on all block linears with about ``trainable`` parameters."""
    model.requires_grad_(False)
    thin = [one for module in model.modules() if isinstance(module, Thin) for one in module.parameters()]
    if thin:
        for one in thin:
            one.requires_grad_(True)
        return thin
    from peft import LoraConfig, inject_adapter_in_model

    linears = dict(linears_of(model))
    rank = max(1, round(trainable / sum(sum(linear.weight.shape) for linear in linears.values())))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linears))
    inject_adapter_in_model(config, model)
    return [one for one in model.parameters() if one.requires_grad]


def merged(model: Any) -> Any:
    """The model with its adapters in its weights, and their number of parameters as if they had never been."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model.eval().requires_grad_(False)
