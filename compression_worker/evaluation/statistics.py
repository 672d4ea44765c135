"""Intervals and tests behind every figure: paired bootstrap over windows or samples, Wilson, exact McNemar.

The bootstrap is Hesterberg's expanded percentile interval (arXiv:1411.5279, section 4.3): plain percentiles are too
narrow on few windows by a factor of sqrt((n - 1) / n) and by the difference of t from the normal distribution; asking
for slightly wider percentiles repairs both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from compression_worker.contracts import Json

Array = npt.NDArray[np.float64]
CONFIDENCE = 0.95
BLOCK_CELLS = 1_000_000  # resampled values held at a time


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> Json:
        return {"value": self.value, "low": self.low, "high": self.high}


def resampled_means(values: Array, weights: Array, *, resamples: int, seed: int) -> Array:
    """Weighted means of each row of ``values`` [k, n] over the same bootstrap samples of its columns: [k, resamples].

    Rows are paired: one resample takes the same columns of each row, so that differences of rows are paired too.
    ``weights`` [n] are the tokens in each window.
    """
    rng = np.random.default_rng(seed)
    count = weights.size
    weighted = values * weights
    means = np.empty((values.shape[0], resamples))
    block = max(1, BLOCK_CELLS // count)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = rng.integers(count, size=(stop - start, count))  # [block, n]
        total = weights[drawn].sum(axis=1)
        for row, target in zip(weighted, means, strict=True):
            target[start:stop] = row[drawn].sum(axis=1) / total
    return means


def interval(value: float, draws: Array, *, units: int) -> Estimate:
    """The expanded percentile interval of ``draws``; ``units`` is how many windows or samples were resampled."""
    tail = NormalDist().cdf(-math.sqrt(units / (units - 1)) * t_quantile(0.5 + CONFIDENCE / 2, units - 1))
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return Estimate(value=value, low=min(float(low), value), high=max(float(high), value))


def mean_estimates(
    values: Array,
    weights: Array,
    *,
    reference: int,
    transform: Callable[[Array], Array],
    resamples: int,
    seed: int,
) -> tuple[list[Estimate], list[Estimate]]:
    """For each row: ``transform(weighted mean)``, and its paired difference from row ``reference``.

    ``transform`` is ``np.exp`` for perplexity and ``np.asarray`` for plain means.
    """
    points = transform((values @ weights) / weights.sum())
    draws = transform(resampled_means(values, weights, resamples=resamples, seed=seed))
    units = weights.size
    absolute = [interval(float(point), row, units=units) for point, row in zip(points, draws, strict=True)]
    differences = [
        interval(float(point - points[reference]), row - draws[reference], units=units)
        for point, row in zip(points, draws, strict=True)
    ]
    return absolute, differences


def accuracy_difference(correct: Array, reference: Array, *, resamples: int, seed: int) -> Estimate:
    """Difference of two accuracies on the same samples, with a paired bootstrap interval.

    One imagined sample of each kind of flip joins the resampling (Bonett and Price 2012): without them, few samples and
    no flip would give an interval of width zero, as if that were proof.
    """
    difference = correct - reference
    padded = np.append(difference, [1.0, -1.0])[None, :]
    draws = resampled_means(padded, np.ones(padded.shape[1]), resamples=resamples, seed=seed)
    return interval(float(difference.mean()), draws[0], units=padded.shape[1])


def wilson(successes: int, trials: int) -> Estimate:
    """A proportion with its Wilson score interval."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Estimate(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Exact two-sided p-value of McNemar's test: could the flips have fallen either way?"""
    flips = right_to_wrong + wrong_to_right
    fewer = min(right_to_wrong, wrong_to_right)
    ways = outcomes = 1
    for k in range(fewer):
        outcomes = outcomes * (flips - k) // (k + 1)  # "flips over k + 1", exactly
        ways += outcomes
    return float(min(1.0, 2 * ways / 2**flips))


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t: exact for one and two degrees of freedom, else Cornish and Fisher's expansion."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        spread = 2 * probability - 1
        return spread * math.sqrt(2 / (1 - spread * spread))
    z = NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
