"""From an interval to a word: better, equal within a margin, worse, or not enough evidence; and the policy's checks.

Nothing here reads a row or a clock. A verdict never rests on a point estimate: only on where the whole 95 % interval
of a paired difference lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import TextChoices
from django.utils.formats import number_format
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext


class VerdictKind(TextChoices):
    BETTER = "better", gettext_lazy("better")
    EQUAL = "equal", gettext_lazy("equal within the margin")
    WORSE = "worse", gettext_lazy("worse")
    UNCLEAR = "unclear", gettext_lazy("not enough evidence")


@dataclass(frozen=True)
class Verdict:
    """``more_samples`` is how many would probably decide it; None when no number of samples would."""

    kind: VerdictKind
    margin: float
    more_samples: int | None = None


def judge(*, low: float, high: float, margin: float, higher_is_better: bool, samples: int) -> Verdict:
    """The verdict on a difference (target - reference) whose 95 % interval is ``low … high``."""
    if not (math.isfinite(low) and math.isfinite(high)) or samples < 1:
        return Verdict(VerdictKind.UNCLEAR, margin)
    worst, best = (low, high) if higher_is_better else (-high, -low)
    if -margin <= worst and best <= margin:
        return Verdict(VerdictKind.EQUAL, margin)
    if worst > 0:
        return Verdict(VerdictKind.BETTER, margin)
    if best < 0:
        return Verdict(VerdictKind.WORSE, margin)
    return Verdict(VerdictKind.UNCLEAR, margin, _more_samples(worst, best, margin, samples))


def _more_samples(worst: float, best: float, margin: float, samples: int) -> int | None:
    """An interval shrinks with 1/sqrt(n): the fewest further samples after which it leaves zero or fits the margin."""
    middle, half = (worst + best) / 2, (best - worst) / 2
    room = [distance for distance in (abs(middle), margin - abs(middle)) if distance > 0]
    if not room:
        return None
    needed = math.ceil(samples * (half / max(room)) ** 2)
    return max(1, needed - samples)


MARGINS: dict[str, float] = {"choice_accuracy": 0.02, "top1_agreement": 0.05, "kl_divergence": 0.02}
"""Differences too small to matter. What a policy still accepts may be larger: 'worse' and 'passes' go together."""
PERPLEXITY_MARGIN = 0.02  # of the variant's own perplexity


class Check(TextChoices):
    """What a policy can ask of an artifact. Each looks at the unfavourable end of the 95 % interval."""

    PERPLEXITY = "perplexity_increase", gettext_lazy("Perplexity rises at most by")
    KL = "kl_divergence", gettext_lazy("KL divergence at most")
    TOP1 = "top1_agreement", gettext_lazy("Top-1 agreement at least")
    ACCURACY = "choice_accuracy_drop", gettext_lazy("Choice accuracy falls at most by")
    RATIO = "true_ratio", gettext_lazy("True ratio at least")


class Outcome(TextChoices):
    PASS = "pass", gettext_lazy("passes")
    WARN = "warn", gettext_lazy("warning")
    FAIL = "fail", gettext_lazy("fails")


SIGNS: dict[str, str] = {Outcome.PASS: "✓", Outcome.WARN: "!", Outcome.FAIL: "✗"}
SHARES = frozenset({Check.PERPLEXITY, Check.TOP1, Check.ACCURACY})
"""Limits that are written as a fraction and read as a percentage."""


@dataclass(frozen=True)
class CheckResult:
    """One line of the policy held against one evaluation. ``found`` is None when it was not measured."""

    check: Check
    limit: float
    severity: str
    found: float | None
    outcome: Outcome

    @property
    def sign(self) -> str:
        return SIGNS[self.outcome]

    @property
    def label(self) -> str:
        return f"{self.check.label} {limit_words(self.check, self.limit)}"

    @property
    def found_words(self) -> str:
        return _("not measured") if self.found is None else limit_words(self.check, self.found)


def limit_words(check: Check, value: float) -> str:
    """A limit or a finding with its unit, in the reader's language."""
    if check in SHARES:
        return f"{number_format(round(value * 100, 2))} %"
    return f"{number_format(round(value, 2))}×" if check == Check.RATIO else number_format(round(value, 4))


def evaluate_policy(
    rules: Sequence[Mapping[str, Any]], results: Mapping[str, Any] | None, true_ratio: float
) -> list[CheckResult]:
    """Each known rule of a policy held against an evaluation's summary. What was not measured does not pass."""
    metrics = {metric["name"]: metric for metric in (results or {}).get("metrics", [])}
    found = {check: _finding(check, metrics, true_ratio) for check in Check}
    return [_check(rule, found[Check(rule["check"])]) for rule in rules if rule.get("check") in Check.values]


def _check(rule: Mapping[str, Any], found: float | None) -> CheckResult:
    check, limit, severity = Check(rule["check"]), float(rule["limit"]), str(rule.get("severity", "block"))
    at_least = check in (Check.TOP1, Check.RATIO)
    passed = found is not None and (found >= limit if at_least else found <= limit)
    broken = Outcome.WARN if severity == "warn" else Outcome.FAIL
    return CheckResult(check, limit, severity, found, Outcome.PASS if passed else broken)


def _finding(check: Check, metrics: Mapping[str, Any], true_ratio: float) -> float | None:
    """The unfavourable end of what was measured."""
    try:
        match check:
            case Check.RATIO:
                return true_ratio
            case Check.KL:
                return float(metrics["kl_divergence"]["values"]["compressed"]["high"])
            case Check.TOP1:
                return float(metrics["top1_agreement"]["values"]["compressed"]["low"])
            case Check.ACCURACY:
                return -float(metrics["choice_accuracy"]["differences"]["compressed"]["low"])
            case Check.PERPLEXITY:
                metric = metrics["perplexity"]
                rise = float(metric["differences"]["compressed"]["high"])
                return rise / float(metric["values"]["variant"]["value"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def margin_for(metric: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> float:
    """The margin of a metric: the stated one, or the policy's limit where that is stricter."""
    limits = {rule.get("check"): float(rule["limit"]) for rule in rules if "limit" in rule}
    match metric["name"]:
        case "perplexity":
            value = float((metric.get("values", {}).get("variant") or {}).get("value") or 0.0)
            return min(PERPLEXITY_MARGIN, limits.get(Check.PERPLEXITY, math.inf)) * value
        case "choice_accuracy":
            return min(MARGINS["choice_accuracy"], limits.get(Check.ACCURACY, math.inf))
        case "top1_agreement":
            return min(MARGINS["top1_agreement"], 1 - limits.get(Check.TOP1, -math.inf))
        case "kl_divergence":
            return min(MARGINS["kl_divergence"], limits.get(Check.KL, math.inf))
        case _:
            return 0.0


def metric_verdict(metric: Mapping[str, Any], target: str, rules: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """The verdict on ``target`` against the reference of an evaluation; None where no difference was measured."""
    difference = metric.get("differences", {}).get(target)
    if not difference or difference.get("low") is None or difference.get("high") is None:
        return None
    return judge(
        low=float(difference["low"]),
        high=float(difference["high"]),
        margin=margin_for(metric, rules),
        higher_is_better=bool(metric["higher_is_better"]),
        samples=int(metric.get("samples") or 0),
    )


def verdict_words(verdict: Verdict, margin: str, amount: str = "") -> str:
    """The verdict as a person reads it; ``margin`` and the difference's ``amount`` are written out, with their unit."""
    match verdict.kind:
        case VerdictKind.EQUAL:
            return _("equal within %(margin)s") % {"margin": margin}
        case VerdictKind.UNCLEAR if verdict.more_samples is not None:
            return ngettext(
                "not enough evidence: about %(count)s more sample",
                "not enough evidence: about %(count)s more samples",
                verdict.more_samples,
            ) % {"count": number_format(verdict.more_samples, force_grouping=True)}
        case VerdictKind.BETTER if amount:
            return _("better by %(amount)s") % {"amount": amount}
        case VerdictKind.WORSE if amount:
            return _("worse by %(amount)s") % {"amount": amount}
        case kind:
            return str(kind.label)


def summary_words(outcomes: Sequence[CheckResult]) -> str:
    """One sentence on a policy: all pass, or how many warn and fail."""
    failed = sum(result.outcome == Outcome.FAIL for result in outcomes)
    warned = sum(result.outcome == Outcome.WARN for result in outcomes)
    if not failed and not warned:
        return _("every check passes")
    parts = []
    if failed:
        parts.append(ngettext("%(count)s check fails", "%(count)s checks fail", failed) % {"count": failed})
    if warned:
        parts.append(ngettext("%(count)s warning", "%(count)s warnings", warned) % {"count": warned})
    return " · ".join(parts)
