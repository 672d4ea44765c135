"""Uploaded sample sets: what comes out, and what the error says where nothing can."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression_worker.contracts import CompressionError, Json
from compression_worker.samples import BLOCK_CHARACTERS, joined_text, parse_samples, read_samples


def choice_line(**changes: object) -> bytes:
    sample = {"question": "The sky is", "choices": ["blue", "green"], "answer": 0} | changes
    return json.dumps({key: value for key, value in sample.items() if value is not None}).encode()


def refusal(data: bytes, kind: str) -> CompressionError:
    with pytest.raises(CompressionError) as caught:
        parse_samples(data, kind)
    return caught.value


def only(data: bytes, kind: str) -> Json:
    return read_samples(parse_samples(data, kind).data)[0]


def test_a_short_text_is_one_sample() -> None:
    parsed = parse_samples(b"Once upon a time.\n", "text")
    assert parsed.data == b'{"text":"Once upon a time.\\n"}\n'
    assert parsed.info.kind == "text"
    assert parsed.info.samples == 1
    assert parsed.info.preview == [{"text": "Once upon a time.\n"}]


def test_a_long_text_is_cut_behind_paragraphs_and_comes_back_whole() -> None:
    text = "".join(f"Paragraph {n} {'word ' * 60}\n\n" for n in range(40))
    samples = read_samples(parse_samples(text.encode(), "text").data)
    assert len(samples) > 5
    assert all(len(sample["text"]) <= BLOCK_CHARACTERS for sample in samples)
    assert all(sample["text"].startswith("Paragraph") for sample in samples)
    assert joined_text(samples) == text


def test_a_long_paragraph_is_cut_behind_line_ends() -> None:
    text = "".join(f"line {n} of a poem without a blank line\n" for n in range(400))
    samples = read_samples(parse_samples(text.encode(), "text").data)
    assert len(samples) > 3
    assert all(sample["text"].endswith("line\n") for sample in samples)
    assert joined_text(samples) == text


@given(st.lists(st.text(alphabet="ab \n", max_size=900), max_size=12))
def test_the_samples_of_any_text_add_up_to_it(parts: list[str]) -> None:
    text = "x" + "".join(parts)
    samples = read_samples(parse_samples(text.encode(), "text").data)
    assert joined_text(samples).rstrip() == text.rstrip()
    assert all(sample["text"].strip() for sample in samples)


def test_documents_are_joined_by_a_blank_line() -> None:
    data = b'{"text": "One."}\n\n{"text": "Two.", "source": "x"}\n'
    samples = read_samples(parse_samples(data, "text").data)
    assert samples == [{"text": "One."}, {"text": "Two."}]
    assert joined_text(samples) == "One.\n\nTwo."


def test_windows_files_read_like_unix_files() -> None:
    assert parse_samples(b"\xef\xbb\xbfone\r\ntwo\r\n", "text").data == parse_samples(b"one\ntwo\n", "text").data


@pytest.mark.parametrize(("given", "index"), [(1, 1), ("B", 1), ("b", 1), ("A", 0)])
def test_an_answer_is_an_index_or_a_letter(given: object, index: int) -> None:
    expected = {"question": "The sky is", "choices": ["blue", "green"], "answer": index}
    assert only(choice_line(answer=given), "choice") == expected


def test_the_preview_is_short() -> None:
    info = parse_samples(b"\n".join([choice_line(question="q" * 5000)] * 10), "choice").info
    assert info.samples == 10
    assert len(info.preview) == 3
    assert len(info.preview[0]["question"]) == 300
    assert info.preview[0]["choices"] == ["blue", "green"]


@pytest.mark.parametrize(
    ("data", "kind", "code", "says"),
    [
        (b"", "text", "empty_file", "empty"),
        (b" \r\n \n", "text", "empty_file", "empty"),
        (b"fine\nbad \xff\n", "text", "not_utf8", "byte 9 (line 2)"),
        ("wide".encode("utf-16"), "text", "not_utf8", "UTF-16"),
        (b"one\n\0two", "text", "binary_file", "line 2"),
        (b"x" * 1_000_001, "text", "line_too_long", "line 1 has 1,000,001 characters"),
        (b'{"text": "a"}\n{"text": }\n', "text", "not_json", "line 2"),
        (b'{"text": "a"}\n[1]\n', "text", "not_an_object", "line 2"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "text", "missing_field", "line 2 lacks the field 'text'"),
        (b'{"text": "  "}\n', "text", "bad_field", "line 1"),
        (b'{"text": 3}\n', "text", "bad_field", "line 1"),
        (b'{"text": "\\ud800"}\n', "text", "bad_field", "line 1"),
        (b'{"text": "\\u0000"}\n', "text", "bad_field", "line 1"),
        (b"[" * 100_000, "choice", "not_json", "line 1"),
        (b'{"answer": ' + b"9" * 10_000 + b"}", "choice", "not_json", "line 1"),
        (choice_line(question=None), "choice", "missing_field", "it has choices, answer"),
        (choice_line(choices=None), "choice", "missing_field", "'choices'"),
        (choice_line(choices="blue"), "choice", "missing_field", "'choices'"),
        (choice_line(choices=["blue"]), "choice", "bad_choices", "1 choices"),
        (choice_line(choices=[str(n) for n in range(27)]), "choice", "bad_choices", "27 choices"),
        (choice_line(choices=["blue", ""]), "choice", "bad_field", "choice 2"),
        (choice_line(choices=["blue", 2]), "choice", "bad_field", "choice 2"),
        (choice_line(choices=["blue", "blue"]), "choice", "bad_choices", "equal"),
        (choice_line(answer=None), "choice", "bad_answer", "index from 0 to 1 or a letter from A to B"),
        (choice_line(answer=True), "choice", "bad_answer", "'answer'"),
        (choice_line(answer="blue"), "choice", "bad_answer", "'answer'"),
        (choice_line() + b"\n" + choice_line(answer=2), "choice", "bad_answer", "line 2 has an answer outside its 2"),
        (choice_line(answer=-1), "choice", "bad_answer", "outside"),
        (choice_line(answer="C"), "choice", "bad_answer", "outside"),
        (b"plain words", "choice", "not_json", "line 1"),
        (b"x", "pickle", "unknown_kind", "text or choice"),
    ],
)  # fmt: skip
def test_it_says_where_and_what_is_wrong(data: bytes, kind: str, code: str, says: str) -> None:
    error = refusal(data, kind)
    assert (error.code, says in error.message) == (code, True), error.message
    assert len(error.message) < 400


def test_a_large_upload_is_quick() -> None:
    data = b"\n".join([choice_line(question=f"question {n} " + "word " * 40) for n in range(50_000)])
    before = time.monotonic()
    assert parse_samples(data, "choice").info.samples == 50_000
    assert time.monotonic() - before < 10


def test_many_blank_lines_are_no_work() -> None:
    data = b"start\n" + b" \n" * 2_000_000 + b"end\n"
    before = time.monotonic()
    assert parse_samples(data, "text").info.samples >= 1
    assert time.monotonic() - before < 10
