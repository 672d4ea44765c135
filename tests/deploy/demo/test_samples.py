"""The demo's sample sets: deterministic, valid, and of text that no model of the demo has seen."""

from __future__ import annotations

import json
import random

import pytest

from compression_worker.samples import parse_samples
from deploy.demo import samples, texts

HELD_OUT = ["shakespeare-heldout", "word-problems-heldout"]


@pytest.fixture(scope="module")
def every_set() -> dict[str, list[dict[str, object]]]:
    return samples.every_set(7)


def training_text() -> str:
    return "\n".join(
        [texts.shakespeare_split()[0], *texts.word_problems(), *texts.marked_word_problems(), *texts.instructions()]
    )


@pytest.mark.parametrize("name", HELD_OUT)
def test_no_held_out_sample_occurs_in_the_training_text(name: str, every_set: dict[str, list[dict[str, str]]]) -> None:
    text = training_text()
    assert [sample for sample in every_set[name] if sample["text"] in text] == []


def test_no_held_out_question_occurs_in_the_training_text(every_set: dict[str, list[dict[str, object]]]) -> None:
    text = training_text()
    for sample in every_set["shakespeare-next-line"]:
        assert str(sample["question"]) not in text


def test_hardly_a_long_line_of_the_held_out_plays_was_learned() -> None:
    training, heldout = (set(text.split("\n")) for text in texts.shakespeare_split())
    long_lines = {line for line in heldout if len(line) > 30}
    shared = long_lines & training
    assert len(shared) < 0.005 * len(long_lines), sorted(shared)


def test_the_split_cuts_between_speeches_and_loses_nothing() -> None:
    training, heldout = texts.shakespeare_split()
    whole = (texts.DATA / "shakespeare.txt").read_text()
    assert texts.speeches(training) + texts.speeches(heldout) == texts.speeches(whole)


def test_calibration_comes_from_the_training_text(every_set: dict[str, list[dict[str, str]]]) -> None:
    training = texts.shakespeare_split()[0]
    assert all(sample["text"] in training for sample in every_set["shakespeare-calibration"])


def test_the_committed_sets_are_what_the_script_makes(every_set: dict[str, list[dict[str, object]]]) -> None:
    for name, rows in every_set.items():
        committed = (samples.SETS / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in committed] == rows, name


def test_every_set_passes_the_gate_of_uploads() -> None:
    for path in sorted(samples.SETS.glob("*.jsonl")):
        kind = "choice" if path.stem == "shakespeare-next-line" else "text"
        assert parse_samples(path.read_bytes(), kind).info.samples >= 60, path


def test_each_question_has_four_different_choices_and_the_right_one_among_them() -> None:
    heldout = texts.shakespeare_split()[1]
    rows = samples.next_line_set(heldout, random.Random(1))
    for row in rows:
        assert len(set(row["choices"])) == samples.CHOICES
        assert f"{row['question']} {row['choices'][row['answer']]}" in heldout
    answers = {row["answer"] for row in rows}
    assert answers == {0, 1, 2, 3}


def test_the_calculator_marks_are_gone_from_plain_word_problems() -> None:
    plain, marked = texts.word_problems(), texts.marked_word_problems()
    assert "<<" in marked[0]
    assert not any("<<" in text or "####" in text for text in plain)
    assert plain[0].endswith("The answer is 72.")
