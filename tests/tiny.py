"""Tiny random Llama checkpoints with a trained tokenizer: what unit tests compress, evaluate and serve.

Written with torch, safetensors and tokenizers alone, because importing transformers takes longer than most tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, CONTEXT = 64, 128, 4, 2, 256
VOCAB = 288
SENTENCES = [
    "The quick brown fox jumps over the lazy dog while the small model learns to say very little.",
    "A delta is the difference between two models, and one bit of it says which way a weight has moved.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tiny_pair(
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 1,
    tied: bool = True,
    vocab: int = VOCAB,
    layers: int = 2,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Path, Path]:
    """Write ``folder/base`` and ``folder/variant``; the variant is the base plus a small delta on every tensor."""
    base_dir, variant_dir = folder / "base", folder / "variant"
    generator = torch.Generator().manual_seed(seed)
    base = tiny_state(generator, tied=tied, vocab=vocab, layers=layers, hidden=hidden)
    for path, state in ((base_dir, base), (variant_dir, fine_tuned(base, generator))):
        weights = {name: tensor.to(dtype) for name, tensor in state.items()}
        config = tiny_config(tied=tied, vocab=vocab, layers=layers, hidden=hidden, dtype=dtype)
        write_checkpoint(path, weights, config, shards=shards)
    return base_dir, variant_dir


def tiny_config(
    *,
    tied: bool = True,
    vocab: int = VOCAB,
    layers: int = 2,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, object]:
    """The config.json of a tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": hidden // HEADS,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": CONTEXT,
        "mlp_bias": False,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": vocab,
    }


def tiny_state(
    generator: torch.Generator, *, tied: bool, vocab: int, layers: int = 2, hidden: int = HIDDEN
) -> dict[str, torch.Tensor]:
    """Random float32 weights under Llama's names; without ``lm_head.weight`` when tied."""
    kv = hidden // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.mlp.down_proj.weight": (hidden, 2 * hidden),
            f"{prefix}.mlp.gate_proj.weight": (2 * hidden, hidden),
            f"{prefix}.mlp.up_proj.weight": (2 * hidden, hidden),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return {name: _random(shape, generator) for name, shape in shapes.items()}


def fine_tuned(state: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """``state`` plus a delta of about a tenth of its spread on every tensor."""
    return {name: tensor + 0.1 * 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def write_checkpoint(
    folder: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, object], *, shards: int = 1
) -> None:
    """A Hugging Face folder: ``shards`` safetensors files (with an index when more than one), config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    placed: dict[str, str] = {}
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name].contiguous() for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    write_tokenizer(folder, int(str(config["vocab_size"])))


def write_tokenizer(folder: Path, vocab: int = VOCAB) -> None:
    """A byte-level BPE of at most ``vocab`` tokens, trained on two sentences; any text encodes without a loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = 0.1 * torch.randn(shape, generator=generator)
    return values + 1.0 if len(shape) == 1 else values
