"""Writes the demo's sample sets from the committed texts: ``python -m deploy.demo.samples``.

Deterministic: the same texts and seed give the same bytes. Held-out sets come from text that no model of the demo
has seen; the calibration sets come from training text, as calibration data should.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.demo import texts

SETS = Path(__file__).parent / "sets"
PASSAGE_CHARACTERS = 900
"""About one context of the demo models."""
TEXT_SAMPLES = 60
CALIBRATION_SAMPLES = 120
CHOICE_SAMPLES = 120
CHOICES = 4
CONTEXT_LINES = 3
SENTENCE_END = re.compile(r"[.!?]['\"]?$")


def passages(text: str, characters: int = PASSAGE_CHARACTERS) -> list[str]:
    """Neighbouring speeches joined up to about ``characters``."""
    found: list[str] = []
    for speech in texts.speeches(text):
        if found and len(found[-1]) + len(speech) + 2 <= characters:
            found[-1] += "\n\n" + speech
        else:
            found.append(speech)
    return found


def text_set(samples: list[str]) -> list[dict[str, Any]]:
    return [{"text": sample} for sample in samples]


def next_line_set(text: str, chooser: random.Random) -> list[dict[str, Any]]:
    """Which line really follows? The three others follow elsewhere, have about its length, and are real lines too."""
    places = list(_places(text))
    chooser.shuffle(places)
    return [_question(place, places, chooser) for place in places[:CHOICE_SAMPLES]]


def _places(text: str) -> Iterator[tuple[str, str]]:
    """Beginnings of a speech that stop in the middle of a sentence, and the rest of that line with the next one."""
    for speech in texts.speeches(text):
        lines = speech.split("\n")
        if len(lines) < CONTEXT_LINES + 3 or SENTENCE_END.search(lines[CONTEXT_LINES]):
            continue
        words = lines[CONTEXT_LINES + 1].split()
        if len(words) < 5 or SENTENCE_END.search(" ".join(words[:2])):
            continue
        question = "\n".join([*lines[: CONTEXT_LINES + 1], " ".join(words[:2])])
        yield question, "\n".join([" ".join(words[2:]), lines[CONTEXT_LINES + 2]])


def _question(place: tuple[str, str], places: list[tuple[str, str]], chooser: random.Random) -> dict[str, Any]:
    question, right = place
    others = sorted({line for other, line in places if other != question and line != right})
    others.sort(key=lambda line: (abs(len(line) - len(right)), line))
    choices = [right, *chooser.sample(others[: CHOICES * 4], CHOICES - 1)]
    chooser.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def every_set(seed: int) -> dict[str, list[dict[str, Any]]]:
    """All sets by file name."""
    training, heldout = texts.shakespeare_split()
    chooser = random.Random(seed)
    return {
        "shakespeare-heldout": text_set(passages(heldout)[:TEXT_SAMPLES]),
        "word-problems-heldout": text_set(texts.word_problems("word_problems_heldout")),
        "shakespeare-calibration": text_set(chooser.sample(passages(training), CALIBRATION_SAMPLES)),
        "word-problems-calibration": text_set(chooser.sample(texts.word_problems(), CALIBRATION_SAMPLES)),
        "shakespeare-next-line": next_line_set(heldout, chooser),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=SETS)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, samples in every_set(args.seed).items():
        lines = [json.dumps(sample, ensure_ascii=False, sort_keys=True) + "\n" for sample in samples]
        (args.out / f"{name}.jsonl").write_text("".join(lines))
        print(f"{name}: {len(samples)} samples")


if __name__ == "__main__":
    main()
