"""Greedy answers and where their prompts come from."""

from __future__ import annotations

from pathlib import Path

from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.generation import chosen_prompts, greedy_answers
from tests.compression_worker.evaluation.unigram import byte_tokenizer, token, unigram_model
from tests.tiny import CONTEXT


def silent(done: int, total: int, unit: str) -> None:
    assert unit == "prompts"


def test_it_repeats_the_likeliest_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    model = unigram_model({token(tokenizer, "q"): 4.0})
    assert greedy_answers(model, tokenizer, ["Once", "Twice"], 6, silent) == ["qqqqqq", "qqqqqq"]


def test_it_stops_at_the_end_token(tmp_path: Path) -> None:
    assert greedy_answers(unigram_model({1: 4.0}), byte_tokenizer(tmp_path), ["Once"], 6, silent) == [""]


def test_a_long_prompt_leaves_room_for_the_answer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    model = unigram_model({token(tokenizer, "q"): 4.0})
    (answer,) = greedy_answers(model, tokenizer, ["w" * 2 * CONTEXT], 10, silent)
    assert answer == "q" * 10


def test_prompts_come_from_the_settings_then_the_text_then_the_questions() -> None:
    text = [{"text": "\nOne two three four five six seven eight nine ten eleven twelve thirteen\nNext"}, {"text": "B"}]
    choices = [{"question": "Why?", "choices": ["a", "b"], "answer": 0}]
    given = EvaluationConfig(prompts="First\nSecond")
    assert chosen_prompts(given, text, choices) == ["First", "Second"]
    beginning = "One two three four five six seven eight nine ten eleven twelve"
    assert chosen_prompts(EvaluationConfig(), text, choices) == [beginning, "B"]
    assert chosen_prompts(EvaluationConfig(), [], choices) == ["Why?"]
    assert chosen_prompts(EvaluationConfig(max_new_tokens=0), text, choices) == []
