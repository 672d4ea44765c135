"""Choices through the harness: a model whose preference is known answers questions whose best answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_worker.contracts import CompressionError
from compression_worker.evaluation.choice import SLICE, answer_choices
from tests.compression_worker.evaluation.unigram import byte_tokenizer, token, unigram_model


def silent(done: int, total: int, unit: str) -> None:
    assert 0 < done <= total
    assert unit == "choices"


def test_it_chooses_what_the_model_finds_likeliest(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    model = unigram_model({token(tokenizer, "q"): 4.0, token(tokenizer, "z"): -4.0})
    samples = [
        {"question": "Which one?", "choices": ["zzz", "qqq", "www"], "answer": 1},
        {"question": "Which {{one}} now?", "choices": ["qqq", "zzz"], "answer": 1},
        {"question": "12", "choices": ["www", "zzz"], "answer": 0},
    ] * SLICE
    answers = answer_choices(model, tokenizer, samples, silent)
    assert answers[:3] == [
        {"chosen": 1, "correct": 1},
        {"chosen": 0, "correct": 0},
        {"chosen": 0, "correct": 1},
    ]
    assert answers == answers[:3] * SLICE


def test_a_longer_choice_pays_for_each_token(tmp_path: Path) -> None:
    """acc takes sums: with equal tokens the shorter choice is the likelier one."""
    tokenizer = byte_tokenizer(tmp_path)
    samples = [{"question": "Which one?", "choices": ["wwww", "ww", "www"], "answer": 1}]
    assert answer_choices(unigram_model({}), tokenizer, samples, silent) == [{"chosen": 1, "correct": 1}]


def test_it_refuses_a_choice_longer_than_the_context(tmp_path: Path) -> None:
    samples = [{"question": "Which one?", "choices": ["ok", "q" * 300], "answer": 0}]
    with pytest.raises(CompressionError, match="choice sample 1 has a choice of 301 tokens") as caught:
        answer_choices(unigram_model({}), byte_tokenizer(tmp_path), samples, silent)
    assert caught.value.code == "choice_too_long"
