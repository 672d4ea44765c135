"""Greedy answers to a few prompts, so that people can read what the figures mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compression_worker.contracts import Json
from compression_worker.evaluation.config import EvaluationConfig

DEFAULT_PROMPTS = 4
PROMPT_WORDS = 12
PROMPT_CHARACTERS = 80


def chosen_prompts(config: EvaluationConfig, text: list[Json], choices: list[Json]) -> list[str]:
    """The prompts of ``config``; else the beginnings of the first text samples; else the first questions."""
    if config.max_new_tokens == 0:
        return []
    if config.prompt_list:
        return config.prompt_list
    if text:
        beginnings = [_beginning(sample["text"]) for sample in text]
        return list(dict.fromkeys(beginnings))[:DEFAULT_PROMPTS]
    return [sample["question"] for sample in choices[:DEFAULT_PROMPTS]]


def _beginning(text: str) -> str:
    """The first few words of a sample (of its first line), or characters where a language has no spaces."""
    line = text.strip().split("\n")[0]
    return " ".join(line.split()[:PROMPT_WORDS])[:PROMPT_CHARACTERS].rstrip()


@torch.inference_mode()
def greedy_answers(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, progress: Callable[[int, int, str], None]
) -> list[str]:
    """What the model adds to each prompt when it always takes the most likely token."""
    answers = []
    for prompt in prompts:
        answers.append(_greedy_answer(model, tokenizer, prompt, max_new_tokens))
        progress(len(answers), len(prompts), "prompts")
    return answers


def _greedy_answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    keep = max(1, context - max_new_tokens)
    ids = tokenizer(prompt, verbose=False)["input_ids"][-keep:]
    end = _end_tokens(model, tokenizer)
    added: list[int] = []
    step, cache = torch.tensor([ids], device=model.device), None
    while len(added) < min(max_new_tokens, context - len(ids)):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        token = int(output.logits[0, -1].argmax())
        if token in end:
            break
        added.append(token)
        step, cache = torch.tensor([[token]], device=model.device), output.past_key_values
    # Decoding only what was added would lose a leading space in some tokenizers.
    whole = tokenizer.decode(ids + added, skip_special_tokens=True)
    return str(whole[len(tokenizer.decode(ids, skip_special_tokens=True)) :])


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    known = model.config.eos_token_id
    ends = set(known) if isinstance(known, list | tuple) else {known}
    return {token for token in ends | {tokenizer.eos_token_id} if token is not None}
