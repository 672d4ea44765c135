"""Writes the demo's sample sets from the committed texts: ``python -m deploy.demo.samples``.

Deterministic: the same texts and seed give the same bytes. Held-out sets come from text that no model of the demo
has seen; the calibration sets come from training text, as calibration data should.
"""

from __future__ import annotations

import argparse
import json
import random
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
CONTEXT_LINES = 4
WORD_CLASSES = {
    "noun follows": "the my thy his her our your their a an this that",
    "verb follows": "to will shall would should must may can cannot",
    "person speaks": "i thou he she we they",
}
CLASS_OF = {word: name for name, words in WORD_CLASSES.items() for word in words.split()}
REST = range(2, 4)
"""Words of the line that are left to guess."""


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
    """How does the line really go on? The three others go on elsewhere in the plays, after words of another class."""
    places = list(_places(text))
    chooser.shuffle(places)
    return [_question(place, places, chooser) for place in places[:CHOICE_SAMPLES]]


def _places(text: str) -> Iterator[tuple[str, str, str]]:
    """Beginnings of a speech up to a small word inside a line, that word's class, and the rest of the line."""
    for speech in texts.speeches(text):
        lines = speech.split("\n")
        for number in range(2, len(lines)):
            words = lines[number].split()
            cuts = [at for at in range(1, len(words)) if words[at - 1].lower() in CLASS_OF and len(words) - at in REST]
            if cuts:
                before = "\n".join([*lines[max(0, number - CONTEXT_LINES) : number], " ".join(words[: cuts[0]])])
                yield before, CLASS_OF[words[cuts[0] - 1].lower()], " ".join(words[cuts[0] :])
                break


def _question(
    place: tuple[str, str, str], places: list[tuple[str, str, str]], chooser: random.Random
) -> dict[str, Any]:
    question, word_class, right = place
    others = sorted({rest for _, its_class, rest in places if its_class != word_class and rest != right})
    others.sort(key=lambda rest: (abs(len(rest) - len(right)), rest))
    choices = [right, *chooser.sample(others[: CHOICES * 6], CHOICES - 1)]
    chooser.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def every_set(seed: int) -> dict[str, list[dict[str, Any]]]:
    """All sets by file name."""
    training, heldout = texts.shakespeare_split()
    chooser = random.Random(seed)
    return {
        "shakespeare-heldout": text_set(passages(heldout)[:TEXT_SAMPLES]),
        "word-problems-heldout": text_set(texts.marked_word_problems("word_problems_heldout")),
        "shakespeare-calibration": text_set(chooser.sample(passages(training), CALIBRATION_SAMPLES)),
        "word-problems-calibration": text_set(chooser.sample(texts.marked_word_problems(), CALIBRATION_SAMPLES)),
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
