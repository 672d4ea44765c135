"""A Llama whose answers are known on paper: every next token has the same distribution, whatever came before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.tiny import CONTEXT, VOCAB, write_tokenizer

HIDDEN = 8


def unigram_model(logits: Mapping[int, float], *, vocab: int = VOCAB) -> Any:
    """``logits`` of a few tokens; all others have logit 0."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name or "embed" in name else 0.0)
        for token, logit in logits.items():
            model.lm_head.weight[token] = logit / HIDDEN
    return model


def byte_tokenizer(folder: Path) -> Any:
    write_tokenizer(folder, VOCAB)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def token(tokenizer: Any, text: str) -> int:
    """The one token that ``text`` is."""
    (token_id,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(token_id)
