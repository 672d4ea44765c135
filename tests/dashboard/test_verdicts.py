"""Verdicts rest on where the whole interval lies; policy checks on its unfavourable end."""

from __future__ import annotations

import math

import pytest

from dashboard.verdicts import (
    Check,
    Outcome,
    VerdictKind,
    evaluate_policy,
    judge,
    margin_for,
    metric_verdict,
    summary_words,
    verdict_words,
)
from tests.factories import RULES, summary


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (0.03, 0.09, VerdictKind.EQUAL),  # worse than zero, but within the margin
        (-0.1, 0.1, VerdictKind.EQUAL),  # exactly the margin
        (-0.02, 0.11, VerdictKind.UNCLEAR),  # neither excludes zero nor fits
        (0.05, 0.4, VerdictKind.WORSE),  # a rise of perplexity
        (-0.4, -0.05, VerdictKind.BETTER),
        (-0.4, 0.05, VerdictKind.UNCLEAR),
    ],
)
def test_a_rise_of_a_figure_that_should_be_low_is_worse(low: float, high: float, kind: VerdictKind) -> None:
    assert judge(low=low, high=high, margin=0.1, higher_is_better=False, samples=40).kind == kind


def test_the_same_interval_reads_the_other_way_where_higher_is_better() -> None:
    assert judge(low=0.05, high=0.4, margin=0.01, higher_is_better=True, samples=40).kind == VerdictKind.BETTER
    assert judge(low=-0.4, high=-0.05, margin=0.01, higher_is_better=True, samples=40).kind == VerdictKind.WORSE


def test_more_samples_follow_from_the_width_and_one_over_root_n() -> None:
    # centre 0, half width 0.4, margin 0.1: the interval has to shrink to a quarter, which takes 16 times the samples
    verdict = judge(low=-0.4, high=0.4, margin=0.1, higher_is_better=True, samples=100)
    assert verdict.kind == VerdictKind.UNCLEAR
    assert verdict.more_samples == 1500


def test_no_number_of_samples_decides_a_difference_of_zero_without_a_margin() -> None:
    assert judge(low=-0.4, high=0.4, margin=0, higher_is_better=True, samples=100).more_samples is None


@pytest.mark.parametrize(("low", "high", "samples"), [(math.nan, 1, 10), (-math.inf, 1, 10), (-1, 1, 0)])
def test_what_was_not_really_measured_is_never_equal(low: float, high: float, samples: int) -> None:
    verdict = judge(low=low, high=high, margin=10, higher_is_better=True, samples=samples)
    assert verdict.kind == VerdictKind.UNCLEAR


def test_a_small_sample_of_a_wide_interval_is_never_equal() -> None:
    for samples in range(2, 30):
        half = 1 / math.sqrt(samples)
        verdict = judge(low=-half, high=half, margin=0.05, higher_is_better=True, samples=samples)
        assert verdict.kind == VerdictKind.UNCLEAR


def test_verdicts_are_told_in_words() -> None:
    equal = judge(low=-0.01, high=0.01, margin=0.1, higher_is_better=True, samples=9)
    unclear = judge(low=-0.4, high=0.4, margin=0.1, higher_is_better=True, samples=100)
    worse = judge(low=-0.4, high=-0.2, margin=0.1, higher_is_better=True, samples=100)
    assert verdict_words(equal, "0.1") == "equal within 0.1"
    assert verdict_words(worse, "0.1", "0.3 points") == "worse by 0.3 points"
    assert verdict_words(unclear, "0.1") == "not enough evidence: about 1,500 more samples"


def test_checks_look_at_the_unfavourable_end() -> None:
    found = {check.check: check for check in evaluate_policy(RULES, summary(), 5.2)}
    assert found[Check.PERPLEXITY].found == pytest.approx(0.09 / 4.52)
    assert found[Check.TOP1].found == pytest.approx(0.94)
    assert found[Check.ACCURACY].found == pytest.approx(0.06)
    assert found[Check.PERPLEXITY].outcome == Outcome.PASS
    assert found[Check.ACCURACY].outcome == Outcome.FAIL
    assert found[Check.RATIO].outcome == Outcome.PASS


def test_a_broken_warning_warns_and_a_broken_block_fails() -> None:
    rules = [{"check": "true_ratio", "limit": 9, "severity": severity} for severity in ("warn", "block")]
    outcomes = evaluate_policy(rules, None, 5.2)
    assert [check.outcome for check in outcomes] == [Outcome.WARN, Outcome.FAIL]
    assert summary_words(outcomes) == "1 check fails · 1 warning"
    assert summary_words([]) == "every check passes"


def test_what_was_not_measured_does_not_pass() -> None:
    (check,) = evaluate_policy(
        [{"check": "perplexity_increase", "limit": 0.5, "severity": "block"}], {"metrics": []}, 5
    )
    assert check.outcome == Outcome.FAIL
    assert check.found_words == "not measured"


def test_rules_of_a_later_version_are_left_alone() -> None:
    assert evaluate_policy([{"check": "taste", "limit": 1, "severity": "block"}], summary(), 5) == []


def test_margins_are_small_and_a_stricter_policy_narrows_them() -> None:
    perplexity, _kl, top1, accuracy = summary()["metrics"]
    assert margin_for(perplexity, RULES) == pytest.approx(0.02 * 4.52)
    assert margin_for(accuracy, RULES) == 0.02
    assert margin_for(top1, RULES) == 0.05
    strict = [
        {"check": "perplexity_increase", "limit": 0.001},
        {"check": "choice_accuracy_drop", "limit": 0.01},
        {"check": "top1_agreement", "limit": 0.99},
    ]
    assert margin_for(perplexity, strict) == pytest.approx(0.001 * 4.52)
    assert margin_for(accuracy, strict) == 0.01
    assert margin_for(top1, strict) == pytest.approx(0.01)


def test_a_metric_without_a_difference_has_no_verdict() -> None:
    perplexity = summary()["metrics"][0]
    assert metric_verdict(perplexity, "variant", RULES) is None
    verdict = metric_verdict(perplexity, "compressed", RULES)
    assert verdict is not None
    assert verdict.kind == VerdictKind.EQUAL
