"""Tiny random pairs of every family that the delta methods promise, as transformers itself writes them to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import fine_tuned, write_tokenizer

VOCAB = 288
_LLAMA = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": VOCAB, "pad_token_id": 1},
    **{"bos_token_id": 0, "eos_token_id": 1},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "odd": (
        "llama",
        {"hidden_size": 33, "intermediate_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
    ),
    "mistral": ("mistral", {"head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi": ("phi", {"num_key_value_heads": None}),
    "phi3": ("phi3", {}),
    "gpt2": (
        "gpt2",
        {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 128, "vocab_size": VOCAB}
        | {"bos_token_id": 0, "eos_token_id": 1},
    ),
    "mixtral": ("mixtral", {"hidden_size": 32, "intermediate_size": 40, "num_local_experts": 4, "head_dim": 8}),
    "qwen3-moe": (
        "qwen3_moe",
        {"hidden_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
}
"""Name -> model type, and the sizes that differ from :data:`_LLAMA`'s."""
MIXTURES = ("mixtral", "qwen3-moe")


def make_model(family: str, *, seed: int = 0) -> Any:
    """A random model of ``family`` in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, sizes = FAMILIES[family]
    settings = sizes if kind == "gpt2" else _LLAMA | sizes
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**settings), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # Biases and norms of a fresh model are zeros and ones, which would hide it if they were lost.
            spread = 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(spread if tensor.ndim > 1 or name.endswith("bias") else tensor + spread)
    return model.eval()


def make_family_pair(
    folder: Path, family: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, Path]:
    """Write ``folder/base`` and ``folder/variant``; every tensor of the variant differs a little."""
    base, variant = folder / "base", folder / "variant"
    model = make_model(family, seed=seed).to(dtype)
    for side in (base, variant):
        model.save_pretrained(side)
        write_tokenizer(side, VOCAB)
    generator = torch.Generator().manual_seed(seed + 1)
    edit_weights(variant, lambda state: fine_tuned(state, generator))
    return base, variant


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]) -> None:
    """Change the weights of a checkpoint of one file: ``change`` edits the state, or gives another; dtypes are kept."""
    path = folder / "model.safetensors"
    state = load_file(path)
    dtypes = {name: tensor.dtype for name, tensor in state.items()}
    changed = change(state) or state
    kept = {name: tensor.to(dtypes.get(name, tensor.dtype)).contiguous() for name, tensor in changed.items()}
    save_file(kept, path, metadata={"format": "pt"})
