"""Sample sets: check what people upload, and turn it into JSON lines of one shape.

Two kinds. A *text* set is plain UTF-8 text, or JSON lines with a ``text`` field. A *choice* set is JSON lines with
``question``, ``choices`` and ``answer`` (an index from 0, or a letter from A). The result has one JSON object a line:
``{"text": …}`` or ``{"question": …, "choices": […], "answer": 2}``. No torch here: the web process calls this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from compression_worker.contracts import CompressionError, Json, canonical_json

TEXT = "text"
CHOICE = "choice"
MAX_BYTES = 64 << 20
MAX_LINE_CHARACTERS = 1_000_000
MAX_SAMPLES = 200_000
MAX_CHOICES = 26
BLOCK_CHARACTERS = 2_000  # plain text becomes samples of about this size
PREVIEW_SAMPLES = 3
PREVIEW_CHARACTERS = 300

_PARAGRAPH_START = re.compile(r"(?<=\n\n)(?=[^\n])")
_LINE = re.compile(r"[^\n]*\n+|[^\n]+")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
_JSON_LINE = re.compile(r'\s*\{\s*["}]')
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, kw_only=True)
class SampleSetInfo:
    """What a page says about a set: its kind, its size, and its first samples with long texts cut."""

    kind: str
    samples: int
    preview: list[Json]


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """A checked set: its normalised JSON lines and what to say about them."""

    data: bytes
    info: SampleSetInfo


def parse_samples(data: bytes, kind: str) -> SampleFile:
    """Check an uploaded file. Raises :class:`CompressionError` that names the line and what to do."""
    readers: dict[str, Callable[[str], Iterator[Json]]] = {TEXT: _text_samples, CHOICE: _choice_samples}
    if kind not in readers:
        raise CompressionError("unknown_kind", f"there is no sample set of kind '{kind}'; choose text or choice")
    samples = []
    for sample in readers[kind](_decoded(data)):
        samples.append(sample)
        if len(samples) > MAX_SAMPLES:
            raise CompressionError("too_many_samples", f"the set has more than {MAX_SAMPLES:,} samples: split the file")
    if not samples:
        raise CompressionError("empty_file", "the file has no samples, only blank lines: add some and upload it again")
    normalised = b"".join(canonical_json(sample) + b"\n" for sample in samples)
    preview = [{key: _cut(value) for key, value in sample.items()} for sample in samples[:PREVIEW_SAMPLES]]
    return SampleFile(data=normalised, info=SampleSetInfo(kind=kind, samples=len(samples), preview=preview))


def read_samples(data: bytes) -> list[Json]:
    """The samples of a normalised set."""
    return [json.loads(line) for line in data.splitlines()]


def joined_text(samples: list[Json]) -> str:
    """A text set as one running text.

    Plain text was cut behind line ends, which its samples keep, so it comes back as it was; samples that do not end
    a line are documents of their own and get a blank line between them.
    """
    last = len(samples) - 1
    ends = ("" if sample["text"].endswith("\n") or at == last else "\n\n" for at, sample in enumerate(samples))
    return "".join(sample["text"] + end for sample, end in zip(samples, ends, strict=True))


def _decoded(data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise CompressionError("file_too_large", f"the file has {len(data):,} bytes; at most {MAX_BYTES:,} are taken")
    if data.startswith(_WIDE_BOMS):
        raise CompressionError("not_utf8", "the file is UTF-16: save it as UTF-8 and upload it again")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"byte {error.start} (line {line})"
        raise CompressionError(
            "not_utf8", f"the file is not UTF-8 at {where}: save it as UTF-8 and upload it"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise CompressionError("binary_file", f"line {line} has a NUL character: this is no text file; upload text")
    if not text.strip():
        raise CompressionError("empty_file", "the file is empty: add samples and upload it again")
    _check_line_lengths(text)
    return text


def _check_line_lengths(text: str) -> None:
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > MAX_LINE_CHARACTERS:
            size = f"{len(line):,} characters; at most {MAX_LINE_CHARACTERS:,} are taken"
            raise CompressionError("line_too_long", f"line {number} has {size}: break it into several lines")


def _text_samples(text: str) -> Iterator[Json]:
    if not _JSON_LINE.match(text):
        yield from ({"text": block} for block in _blocks(text))
        return
    for number, value in _json_lines(text):
        yield {"text": _string(value, "text", number, "text")}


def _blocks(text: str) -> Iterator[str]:
    """Cut running text behind paragraph ends, or behind line ends inside a long paragraph. Their sum is ``text``."""
    block: list[str] = []
    size, filled = 0, False
    for piece in _pieces(text):
        if filled and size + len(piece) > BLOCK_CHARACTERS:
            yield "".join(block)
            block, size, filled = [], 0, False
        block.append(piece)
        size += len(piece)
        filled = filled or not piece.isspace()
    if filled:
        yield "".join(block)


def _pieces(text: str) -> Iterator[str]:
    for paragraph in _PARAGRAPH_START.split(text):
        if len(paragraph) <= BLOCK_CHARACTERS:
            yield paragraph
        else:
            yield from _LINE.findall(paragraph)


def _choice_samples(text: str) -> Iterator[Json]:
    for number, value in _json_lines(text):
        question = _string(value, "question", number, CHOICE)
        choices = _choices(value, number)
        yield {"question": question, "choices": choices, "answer": _answer(value, len(choices), number)}


def _json_lines(text: str) -> Iterator[tuple[int, Json]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be read"
            raise _refused("not_json", number, f"is not JSON ({reason}): write one JSON object on each line") from None
        if not isinstance(value, dict):
            raise _refused("not_an_object", number, "is JSON but no object: write one {…} object on each line")
        yield number, value


def _string(value: Json, name: str, number: int, kind: str) -> str:
    if name not in value:
        needed = "question, choices, answer" if kind == CHOICE else "text"
        found = ", ".join(list(value)[:8])[:200] or "nothing"
        raise _refused("missing_field", number, f"lacks the field '{name}': each line needs {needed}; it has {found}")
    return _checked_string(value[name], f"the field '{name}'", number)


def _checked_string(value: object, what: str, number: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _refused("bad_field", number, f"has {what} that is not a text with words in it: fill it in")
    if _UNSTORABLE.search(value):
        raise _refused("bad_field", number, f"has {what} with a NUL or half a character pair (\\ud800…): remove it")
    return value


def _choices(value: Json, number: int) -> list[str]:
    choices = value.get("choices")
    if not isinstance(choices, list):
        raise _refused("missing_field", number, "lacks the field 'choices', a list of texts: add it")
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise _refused("bad_choices", number, f"has {len(choices)} choices: give 2 to {MAX_CHOICES}")
    texts = [_checked_string(choice, f"choice {at}", number) for at, choice in enumerate(choices, start=1)]
    if len(set(texts)) < len(texts):
        raise _refused("bad_choices", number, "has two equal choices: make each one different")
    return texts


def _answer(value: Json, choices: int, number: int) -> int:
    answer = value.get("answer")
    last = chr(ord("A") + choices - 1)
    allowed = f"an index from 0 to {choices - 1} or a letter from A to {last}"
    if isinstance(answer, str) and len(answer.strip()) == 1 and "A" <= answer.strip().upper() <= "Z":
        answer = ord(answer.strip().upper()) - ord("A")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise _refused("bad_answer", number, f"lacks a usable field 'answer': give {allowed}")
    if not 0 <= answer < choices:
        raise _refused("bad_answer", number, f"has an answer outside its {choices} choices: give {allowed}")
    return answer


def _refused(code: str, number: int, what: str) -> CompressionError:
    return CompressionError(code, f"line {number} {what}")


def _cut(value: str | int | list[str]) -> str | int | list[str]:
    if isinstance(value, list):
        return [str(_cut(item)) for item in value]
    if isinstance(value, str) and len(value) > PREVIEW_CHARACTERS:
        return value[: PREVIEW_CHARACTERS - 1] + "…"
    return value
