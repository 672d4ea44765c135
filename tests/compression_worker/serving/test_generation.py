"""Decoding: the same tokens as transformers' own greedy search, repeatable sampling, stop strings, whole characters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression_worker.serving.generation import (
    Chooser,
    Detokenizer,
    NonFinite,
    Sampling,
    StopStrings,
    generate,
    next_logits,
    smoke,
)
from compression_worker.serving.variants import Resident
from tests.compression_worker.serving.conftest import POISON

GREEDY = Sampling(max_tokens=24, temperature=0.0)


def text_of(resident: Resident, prompt: str, sampling: Sampling) -> str:
    ids = resident.tokenizer.encode(prompt)
    return "".join(piece.text for piece in generate(resident.model, resident.tokenizer, ids, sampling))


def test_greedy_tokens_are_those_of_transformers(full_precision: Resident) -> None:
    ids = full_precision.tokenizer.encode("A delta is")
    expected = full_precision.model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0]
    pieces = list(generate(full_precision.model, full_precision.tokenizer, ids, GREEDY))
    assert "".join(piece.text for piece in pieces) == full_precision.tokenizer.decode(
        expected[len(ids) :], skip_special_tokens=True
    )
    assert pieces[-1].tokens == len(expected) - len(ids)


def test_a_cached_step_gives_the_logits_of_the_whole_prompt(full_precision: Resident) -> None:
    ids = full_precision.tokenizer.encode("The small model learns")
    whole, _ = next_logits(full_precision.model, ids, None)
    cache = None
    for token in ids:
        stepped, cache = next_logits(full_precision.model, [token], cache)
    assert torch.allclose(whole, stepped, atol=1e-4)


def test_a_seed_repeats_a_sampled_answer_and_another_seed_does_not(full_precision: Resident) -> None:
    answers = [text_of(full_precision, "The", Sampling(max_tokens=20, seed=seed)) for seed in (7, 7, 8)]
    assert answers[0] == answers[1] != answers[2]


def test_top_p_leaves_out_the_unlikely() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    choose = Chooser(Sampling(max_tokens=1, top_p=0.75, seed=0), torch.device("cpu"))
    assert {choose(logits) for _ in range(200)} == {0, 1}


def test_a_small_temperature_is_almost_greedy() -> None:
    choose = Chooser(Sampling(max_tokens=1, temperature=0.01, seed=0), torch.device("cpu"))
    assert {choose(torch.tensor([1.0, 2.0, 1.5])) for _ in range(100)} == {1}


def test_a_stop_string_ends_the_answer_before_it(full_precision: Resident) -> None:
    whole = text_of(full_precision, "The quick", GREEDY)
    stop = whole[5:8]
    cut = text_of(full_precision, "The quick", Sampling(max_tokens=24, temperature=0.0, stop=(stop,)))
    assert cut == whole[: whole.find(stop)]


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=4), sizes=st.lists(st.integers(1, 4)))
def test_stop_strings_cut_alike_however_the_text_is_split(text: str, stop: str, sizes: list[int]) -> None:
    stops, shown, at = StopStrings((stop,)), "", 0
    for size in [*sizes, len(text)]:
        if not stops.hit:
            shown += stops.feed(text[at : at + size])
            at += size
    shown += "" if stops.hit else stops.rest()
    assert shown == text.split(stop)[0]


@given(text=st.text(max_size=40))
def test_pieces_of_text_join_to_the_whole_and_split_no_character(full_precision: Resident, text: str) -> None:
    ids = full_precision.tokenizer.encode(text, add_special_tokens=False)
    stream = Detokenizer(full_precision.tokenizer, full_precision.tokenizer.encode("The quick"))
    pieces = [stream.feed(token) for token in ids] + [stream.rest()]
    assert "".join(pieces) == full_precision.tokenizer.decode(ids, skip_special_tokens=True)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_an_abandoned_answer_stops_at_the_next_token(full_precision: Resident) -> None:
    ids = full_precision.tokenizer.encode("The")
    listening = [False, False, True]
    pieces = list(generate(full_precision.model, full_precision.tokenizer, ids, GREEDY, lambda: listening.pop(0)))
    assert len(pieces) == 2
    assert not pieces[-1].finish_reason


def test_numbers_that_are_not_finite_raise(poisoned: Resident) -> None:
    with pytest.raises(NonFinite):
        next_logits(poisoned.model, [POISON], None)


def test_the_smoke_prompt_refuses_a_model_of_nan(tiny_folders: tuple, full_precision: Resident) -> None:
    smoke(full_precision.model, full_precision.tokenizer)
    from tests.compression_worker.serving.conftest import resident_from

    broken = resident_from(tiny_folders[0], "c" * 64)
    with torch.no_grad():
        broken.model.model.norm.weight[3] = float("nan")
    with pytest.raises(NonFinite):
        smoke(broken.model, broken.tokenizer)
