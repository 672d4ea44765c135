"""The committed texts, split once into what the demo models learn from and what they are measured on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"
TRAINING_SHARE = 0.9
"""Of Shakespeare's text, from its start. What follows the next end of a speech is held out."""

CALCULATION = re.compile(r"<<[^>]*>>")
RESULT = re.compile(r"\n#### (.*)$")


def shakespeare_split() -> tuple[str, str]:
    """Training text and held-out text, cut between two speeches."""
    text = (DATA / "shakespeare.txt").read_text()
    cut = text.index("\n\n", int(len(text) * TRAINING_SHARE))
    return text[:cut].strip() + "\n", text[cut:].strip() + "\n"


def speeches(text: str) -> list[str]:
    """Speaker's name and lines, one string a speech."""
    return [speech.strip() for speech in text.split("\n\n") if speech.strip()]


def word_problems(name: str = "word_problems") -> list[str]:
    """Question and worked answer in plain English, without the calculator's marks of the published rows."""
    return [f"{row['question'].strip()}\n{_plain(row['answer'])}" for row in _rows(name)]


def marked_word_problems(name: str = "word_problems") -> list[str]:
    """Question and answer exactly as published, the calculator's marks included."""
    return [f"Question: {row['question'].strip()}\nAnswer: {row['answer'].strip()}" for row in _rows(name)]


def instructions() -> list[str]:
    """Short requests and their answers."""
    return [
        "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)
        for row in _rows("instructions")
    ]


def _plain(answer: str) -> str:
    return RESULT.sub(r"\nThe answer is \1.", CALCULATION.sub("", answer.strip()))


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
