"""Numbers as people read them."""

from __future__ import annotations

import pytest

from dashboard.formats import byte_words, duration_words, fixed, places_for, ratio_words, significant


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (17_812_345, "17.8 MB"), (999_600, "1.00 MB"), (269e9, "269 GB")],
)
def test_bytes_have_three_significant_digits(value: float, words: str) -> None:
    assert byte_words(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0"), (15.123, "15.1"), (0.04567, "0.0457"), (-0.3, "−0.300"), (1234567, "1,234,567")]
)
def test_significant_digits_use_a_true_minus(value: float, words: str) -> None:
    assert significant(value) == words


def test_missing_and_endless_figures_are_a_dash() -> None:
    assert significant(None) == significant(float("inf")) == fixed(float("nan"), 2) == ratio_words(None) == "–"


def test_a_rounded_zero_has_no_minus() -> None:
    assert fixed(-0.001, 2) == "0.00"
    assert fixed(0.001, 2, sign=True) == "0.00"
    assert fixed(0.06, 2, sign=True) == "+0.06"


@pytest.mark.parametrize(("half", "places"), [(0.03, 2), (0.012, 3), (4.0, 0), (0.5, 1), (0.0, 2)])
def test_the_interval_decides_the_decimal_places(half: float, places: int) -> None:
    assert places_for(half) == places


@pytest.mark.parametrize(
    ("seconds", "words"), [(1.4, "1.4 s"), (42, "42 s"), (100, "1 min 40 s"), (7500, "2 h 5 min"), (200_000, "2 d 7 h")]
)
def test_durations_are_written_in_the_largest_units_that_matter(seconds: float, words: str) -> None:
    assert duration_words(seconds) == words
