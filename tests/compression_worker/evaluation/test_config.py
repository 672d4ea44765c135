"""The settings of an evaluation."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from compression_worker.contracts import CompressionError
from compression_worker.evaluation.config import EvaluationConfig


def test_the_defaults_come_back_from_json() -> None:
    config = EvaluationConfig()
    assert EvaluationConfig.from_json(asdict(config)) == config
    assert EvaluationConfig.from_json({}) == config
    assert (config.window_tokens, config.max_windows, config.max_choices) == (256, 40, 100)


def test_prompts_are_lines_or_a_list() -> None:
    assert EvaluationConfig(prompts=" One \n\nTwo\r\n").prompt_list == ["One", "Two"]
    assert EvaluationConfig.from_json({"prompts": ["One", "Two"]}).prompt_list == ["One", "Two"]


def test_each_setting_has_a_label_and_a_help_text() -> None:
    assert all(each.metadata["label"] and each.metadata["help"].endswith(".") for each in fields(EvaluationConfig))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"window_tokens": 4}, "window_tokens is 4; give 8 to 8192"),
        ({"max_windows": 1}, "max_windows"),
        ({"max_choices": "100"}, "whole number"),
        ({"seed": True}, "whole number"),
        ({"bootstrap_resamples": 10**9}, "200 to 20000"),
        ({"prompts": "p\n" * 51}, "50 lines"),
        ({"prompts": "a\0b"}, "NUL"),
        ({"prompts": 5}, "one prompt a line"),
        ({"windows": 5}, "no setting 'windows'"),
    ],
)
def test_it_refuses_what_cannot_work(value: dict[str, object], says: str) -> None:
    with pytest.raises(CompressionError) as caught:
        EvaluationConfig.from_json(value)
    assert caught.value.code == "bad_setting"
    assert says in caught.value.message
