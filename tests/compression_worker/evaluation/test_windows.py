"""Perplexity and fidelity where the answer is known on paper."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from compression_worker.contracts import CompressionError, Json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.windows import check_windows, cut_windows, measure_windows
from tests.compression_worker.evaluation.unigram import byte_tokenizer, token, unigram_model
from tests.tiny import VOCAB

SAMPLES = [{"text": "zebras quietly fix the jukebox.\n" * 20}, {"text": "another document"}]
CONFIG = EvaluationConfig(window_tokens=32, max_windows=5)


def silent(done: int, total: int, unit: str) -> None:
    assert 0 < done <= total
    assert unit == "windows"


def total(values: list[Json], name: str) -> float:
    return sum(value[name] for value in values)


@pytest.fixture
def windows(tmp_path: Path) -> torch.Tensor:
    return cut_windows(byte_tokenizer(tmp_path), SAMPLES, CONFIG)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(windows: torch.Tensor) -> None:
    values = measure_windows(unigram_model({}), None, windows, silent)
    assert len(values) == 5
    assert [value["tokens"] for value in values] == [31] * 5
    assert math.exp(total(values, "nll") / total(values, "tokens")) == pytest.approx(VOCAB, rel=1e-6)


def test_a_model_beside_itself_has_no_divergence_and_full_agreement(windows: torch.Tensor) -> None:
    model, twin = unigram_model({40: 2.0}), unigram_model({40: 2.0})
    for reference in (model, twin):
        values = measure_windows(model, reference, windows, silent)
        assert total(values, "kl") == 0.0
        assert total(values, "agreements") == total(values, "tokens")


def test_divergence_from_a_uniform_reference_is_that_on_paper(windows: torch.Tensor) -> None:
    logit = 3.0
    values = measure_windows(unigram_model({40: logit}), unigram_model({}), windows, silent)
    normaliser = math.log(math.exp(logit) + VOCAB - 1)
    expected = normaliser - logit / VOCAB - math.log(VOCAB)
    assert total(values, "kl") / total(values, "tokens") == pytest.approx(expected, rel=1e-5)


def test_divergence_is_taken_from_the_reference_to_the_target(windows: torch.Tensor) -> None:
    logit = 3.0
    values = measure_windows(unigram_model({}), unigram_model({40: logit}), windows, silent)
    normaliser = math.log(math.exp(logit) + VOCAB - 1)
    expected = math.exp(logit - normaliser) * logit - normaliser + math.log(VOCAB)
    assert total(values, "kl") / total(values, "tokens") == pytest.approx(expected, rel=1e-5)


def test_models_that_prefer_other_tokens_never_agree(windows: torch.Tensor) -> None:
    values = measure_windows(unigram_model({40: 1.0}), unigram_model({41: 1.0}), windows, silent)
    assert total(values, "agreements") == 0


def test_the_likelihood_is_that_of_the_tokens_behind_the_first(windows: torch.Tensor) -> None:
    favoured = int(windows[0, 3])
    values = measure_windows(unigram_model({favoured: 5.0}), None, windows, silent)
    normaliser = math.log(math.exp(5.0) + VOCAB - 1)
    hits = int((windows[0, 1:] == favoured).sum())
    assert values[0]["nll"] == pytest.approx(31 * normaliser - 5.0 * hits, rel=1e-6)


def test_windows_are_cut_without_overlap_and_without_special_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    windows = cut_windows(tokenizer, SAMPLES, CONFIG)
    assert windows.shape == (5, 32)
    text = tokenizer.decode(windows.flatten().tolist())
    assert (SAMPLES[0]["text"]).startswith(text)


def test_the_rest_behind_the_last_whole_window_is_dropped(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    samples = [{"text": "x" * 3 + "y" * 61 + "z" * 20}]
    assert len(cut_windows(tokenizer, samples, CONFIG)) == 2


def test_it_refuses_less_than_two_windows(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="two windows of 32 need 64") as caught:
        cut_windows(byte_tokenizer(tmp_path), [{"text": "too short"}], CONFIG)
    assert caught.value.code == "too_little_text"


def test_it_refuses_windows_longer_than_the_context() -> None:
    with pytest.raises(CompressionError, match="at most 256 tokens"):
        check_windows(torch.zeros(2, 300, dtype=torch.long), unigram_model({}))


def test_it_refuses_the_tokenizer_of_another_model() -> None:
    with pytest.raises(CompressionError, match="belongs to another model"):
        check_windows(torch.full((2, 32), 100), unigram_model({}, vocab=50))


def test_it_refuses_a_model_that_answers_with_nan(windows: torch.Tensor) -> None:
    with pytest.raises(CompressionError, match="NaN"):
        measure_windows(unigram_model({3: math.nan}), None, windows, silent)


def test_the_token_helper_finds_single_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    assert tokenizer.decode([token(tokenizer, "q")]) == "q"


def test_it_refuses_a_reference_of_another_vocabulary(windows: torch.Tensor) -> None:
    with pytest.raises(CompressionError, match="leave the reference out"):
        measure_windows(unigram_model({}), unigram_model({}, vocab=VOCAB + 32), windows, silent)


def test_slices_of_positions_change_no_value(windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = unigram_model({40: 2.0, 50: 1.0}), unigram_model({41: 2.0})
    whole = measure_windows(model, reference, windows, silent)
    monkeypatch.setattr("compression_worker.evaluation.perplexity.CHUNK", 5 * VOCAB * 7)
    assert measure_windows(model, reference, windows, silent) == whole
