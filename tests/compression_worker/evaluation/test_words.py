"""Differences of words between two answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compression_worker.evaluation.words import word_diff


def test_equal_answers_are_one_part() -> None:
    assert word_diff("the same words", "the same words") == [["equal", "the same words"]]
    assert word_diff("", "") == []


def test_a_replaced_word_is_deleted_and_inserted() -> None:
    assert word_diff("a red cat sat", "a blue cat sat") == [
        ["equal", "a "],
        ["delete", "red"],
        ["insert", "blue"],
        ["equal", " cat sat"],
    ]


def test_added_words_are_inserted() -> None:
    assert word_diff("one", "one two") == [["equal", "one"], ["insert", " two"]]
    assert word_diff("", "all new") == [["insert", "all new"]]


def test_japanese_differs_by_character() -> None:
    assert word_diff("犬が好き", "猫が好き") == [["delete", "犬"], ["insert", "猫"], ["equal", "が好き"]]


@given(st.text(alphabet="ab犬 \n,.", max_size=40), st.text(alphabet="ab犬 \n,.", max_size=40))
def test_the_parts_spell_both_answers(before: str, after: str) -> None:
    parts = word_diff(before, after)
    assert "".join(text for tag, text in parts if tag != "insert") == before
    assert "".join(text for tag, text in parts if tag != "delete") == after
