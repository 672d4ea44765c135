"""Intervals and tests: against scipy, against figures known on paper, and by how often they hold in simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from compression_worker.evaluation.statistics import (
    Array,
    accuracy_difference,
    interval,
    mcnemar,
    mean_estimates,
    resampled_means,
    t_quantile,
    wilson,
)

RESAMPLES = 600


@pytest.mark.parametrize(
    ("lost", "won"), [(0, 0), (1, 0), (5, 5), (13, 10), (30, 2), (0, 40), (900, 1100), (7000, 7000)]
)
def test_mcnemar_is_scipys_exact_binomial_test(lost: int, won: int) -> None:
    expected = scipy.stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 20), (7, 20), (20, 20), (531, 1319)])
def test_wilson_is_scipys_interval(successes: int, trials: int) -> None:
    expected = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    estimate = wilson(successes, trials)
    assert estimate.value == successes / trials
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 19, 39, 1000])
def test_the_t_quantile_is_near_scipys(freedom: int) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=0.003)


def test_one_resample_takes_the_same_columns_of_each_row() -> None:
    values = np.random.default_rng(0).normal(size=(1, 30))
    both = np.concatenate([values, values + 2.0])
    means = resampled_means(both, np.ones(30), resamples=500, seed=3)
    assert means[1] - means[0] == pytest.approx(np.full(500, 2.0))
    assert means[0].std() == pytest.approx(values.std() / np.sqrt(30), rel=0.15)


def test_weights_count_as_tokens() -> None:
    absolute, differences = mean_estimates(
        np.array([[1.0, 4.0], [1.0, 1.0]]),
        np.array([3.0, 1.0]),
        reference=1,
        transform=np.asarray,
        resamples=300,
        seed=0,
    )
    assert absolute[0].value == pytest.approx((3 * 1 + 1 * 4) / 4)
    assert (absolute[1].low, absolute[1].high) == (1.0, 1.0)
    assert differences[0].value == pytest.approx(0.75)
    assert (differences[1].value, differences[1].low, differences[1].high) == (0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    def low(seed: int) -> float:
        values, weights = np.arange(20.0)[None, :], np.ones(20)
        return mean_estimates(values, weights, reference=0, transform=np.asarray, resamples=300, seed=seed)[0][0].low

    assert low(1) == low(1)
    assert low(1) != low(2)


def test_resampling_in_blocks_gives_the_means_of_resampling_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = np.random.default_rng(0).normal(size=(2, 50)), np.arange(1.0, 51.0)
    whole = resampled_means(values, weights, resamples=200, seed=5)
    monkeypatch.setattr("compression_worker.evaluation.statistics.BLOCK_CELLS", 50 * 7)
    assert resampled_means(values, weights, resamples=200, seed=5) == pytest.approx(whole)


def test_no_flip_on_few_samples_is_no_proof_of_equality() -> None:
    few = accuracy_difference(np.ones(10), np.ones(10), resamples=RESAMPLES, seed=0)
    many = accuracy_difference(np.ones(3000), np.ones(3000), resamples=RESAMPLES, seed=0)
    assert few.value == many.value == 0.0
    assert few.low < -0.1
    assert few.high > 0.1
    assert -0.003 < many.low < 0 < many.high < 0.003


@pytest.mark.parametrize("windows", [20, 40])
def test_intervals_of_a_paired_perplexity_difference_hold_93_to_97_times_in_100(windows: int) -> None:
    """Windows differ much from each other and little between the models, as real text does."""
    rng = np.random.default_rng(11)
    weights = np.full(windows, 255.0)
    mean, text, noise = np.array([2.30, 2.25]), 0.4, 0.05
    truth = float(np.exp(mean[0]) - np.exp(mean[1]))
    held = 0
    trials = 1000
    for trial in range(trials):
        difficulty = rng.normal(scale=text, size=windows) + mean[1]
        values = np.stack([difficulty + (mean[0] - mean[1]) + rng.normal(scale=noise, size=windows), difficulty])
        difference = mean_estimates(values, weights, reference=1, transform=np.exp, resamples=RESAMPLES, seed=trial)[1][
            0
        ]
        held += difference.low <= truth <= difference.high
    assert 0.93 <= held / trials <= 0.97


@pytest.mark.parametrize(("samples", "lost", "won"), [(100, 0.10, 0.06), (60, 0.2, 0.1)])
def test_intervals_of_an_accuracy_difference_hold_93_to_97_times_in_100(samples: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(7)
    trials = 1000
    held = 0
    for trial in range(trials):
        draw = rng.random(samples)
        reference, correct = _answers(draw, lost, won)
        estimate = accuracy_difference(correct, reference, resamples=RESAMPLES, seed=trial)
        held += estimate.low <= won - lost <= estimate.high
    assert 0.93 <= held / trials <= 0.97


def _answers(draw: Array, lost: float, won: float) -> tuple[Array, Array]:
    reference = (draw < 0.5).astype(np.float64)
    correct = reference.copy()
    correct[draw < lost] = 0.0
    correct[draw > 1.0 - won] = 1.0
    return reference, correct


def test_an_interval_contains_its_value() -> None:
    estimate = interval(5.0, np.array([1.0, 2.0, 3.0]), units=3)
    assert estimate.low <= 5.0 <= estimate.high
