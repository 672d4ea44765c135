"""Real PEFT adapters for tiny models, made by the library, and the models that the library itself merges them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def make_adapter(base: Path, folder: Path, *, seed: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
    """Write an adapter on the checkpoint ``base`` to ``folder``; the weights, merged in float32 by the library.

    Every tensor of the adapter is random: a fresh one, whose second factor is zero, would change nothing.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for tensor in (tensor for tensor in adapted.parameters() if tensor.requires_grad):
            tensor.add_(0.05 * torch.randn(tensor.shape))
    adapted.save_pretrained(folder)
    merged = folder.with_name(f"{folder.name}-merged")
    adapted.merge_and_unload().save_pretrained(merged)
    return load_file(merged / "model.safetensors")


def edit_adapter_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_adapter_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Put tensors into the adapter, or take them out (None)."""
    path = folder / "adapter_model.safetensors"
    state: dict[str, torch.Tensor | None] = load_file(path) | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
