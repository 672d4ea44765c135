"""From what each target measured to what a page shows: figures with intervals, paired differences, flips, answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compression_worker.contracts import Json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.statistics import (
    Array,
    Estimate,
    accuracy_difference,
    mcnemar,
    mean_estimates,
    wilson,
)
from compression_worker.evaluation.words import word_diff

FLIP_EXAMPLES = 20

Measured = Mapping[str, Json]
"""What each target measured, by target: ``windows``, ``choices``, ``answers`` (lists; empty where not asked for)."""


@dataclass(frozen=True, kw_only=True)
class TextMetric:
    """A metric that is a mean over scored tokens: the sum of ``field`` over those of ``tokens``, transformed."""

    name: str
    field: str
    unit: str
    higher_is_better: bool
    transform: Callable[[Array], Array]


TEXT_METRICS = (
    TextMetric(name="perplexity", field="nll", unit="", higher_is_better=False, transform=np.exp),
    TextMetric(name="kl_divergence", field="kl", unit="nats/token", higher_is_better=False, transform=np.asarray),
    TextMetric(name="top1_agreement", field="agreements", unit="", higher_is_better=True, transform=np.asarray),
)


def summarise(
    *,
    measured: Measured,
    reference: str,
    prompts: Sequence[str],
    choices: Sequence[Json],
    config: EvaluationConfig,
) -> Json:
    """The summary document. ``measured`` keeps the order in which targets are shown; ``choices`` are the questions."""
    return {
        "targets": list(measured),
        "reference": reference,
        "metrics": text_metrics(measured, reference, config) + choice_metrics(measured, reference, config),
        "generations": _generations(measured, prompts),
        "flips": _flips(measured, choices),
        "config": asdict(config),
    }


def text_metrics(measured: Measured, reference: str, config: EvaluationConfig) -> list[Json]:
    """Perplexity, and the fidelity figures where a reference was read beside the targets."""
    windows = [target["windows"] for target in measured.values()]
    if not windows[0]:
        return []
    present = [metric for metric in TEXT_METRICS if all(metric.field in rows[0] for rows in windows)]
    return [_text_metric(metric, measured, reference, config) for metric in present]


def _text_metric(metric: TextMetric, measured: Measured, reference: str, config: EvaluationConfig) -> Json:
    rows = [target["windows"] for target in measured.values()]
    tokens = np.array([window["tokens"] for window in rows[0]], dtype=np.float64)
    sums = np.array([[window[metric.field] for window in windows] for windows in rows], dtype=np.float64)
    absolute, differences = mean_estimates(
        sums / tokens,
        tokens,
        reference=list(measured).index(reference),
        transform=metric.transform,
        resamples=config.bootstrap_resamples,
        seed=config.seed,
    )
    return {
        "name": metric.name,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "samples": len(tokens),
        "values": _by_target(measured, absolute),
        "differences": {name: value for name, value in _by_target(measured, differences).items() if name != reference},
    }


def choice_metrics(measured: Measured, reference: str, config: EvaluationConfig) -> list[Json]:
    """Choice accuracy with Wilson intervals; differences with a paired bootstrap interval and McNemar's p-value."""
    correct = {name: _correct(target) for name, target in measured.items()}
    samples = correct[reference].size
    if not samples:
        return []
    return [
        {
            "name": "choice_accuracy",
            "unit": "",
            "higher_is_better": True,
            "samples": samples,
            "values": {name: wilson(int(row.sum()), samples).to_json() for name, row in correct.items()},
            "differences": {
                name: _accuracy_difference(row, correct[reference], config)
                for name, row in correct.items()
                if name != reference
            },
        }
    ]


def _accuracy_difference(row: Array, reference: Array, config: EvaluationConfig) -> Json:
    estimate = accuracy_difference(row, reference, resamples=config.bootstrap_resamples, seed=config.seed)
    lost, won = int(((reference == 1) & (row == 0)).sum()), int(((reference == 0) & (row == 1)).sum())
    return estimate.to_json() | {"p_value": mcnemar(lost, won)}


def _correct(target: Json) -> Array:
    return np.array([answer["correct"] for answer in target["choices"]], dtype=np.float64)


def _by_target(measured: Measured, estimates: Sequence[Estimate]) -> Json:
    return {name: estimate.to_json() for name, estimate in zip(measured, estimates, strict=True)}


def _generations(measured: Measured, prompts: Sequence[str]) -> list[Json]:
    generations = []
    for at, prompt in enumerate(prompts):
        answers = {name: target["answers"][at] for name, target in measured.items()}
        compared = word_diff(answers["variant"], answers["compressed"]) if "compressed" in answers else []
        generations.append({"prompt": prompt, "answers": answers, "word_diff": compared})
    return generations


def _flips(measured: Measured, choices: Sequence[Json]) -> Json:
    """Answers that compression turned, right → wrong first; empty where nothing was compressed or asked."""
    if "compressed" not in measured or not choices:
        return {}
    before, after = measured["variant"]["choices"], measured["compressed"]["choices"]
    pairs = list(zip(choices, before, after, strict=True))
    lost = [_flip(*pair) for pair in pairs if pair[1]["correct"] and not pair[2]["correct"]]
    won = [_flip(*pair) for pair in pairs if pair[2]["correct"] and not pair[1]["correct"]]
    return {"right_to_wrong": len(lost), "wrong_to_right": len(won), "examples": (lost + won)[:FLIP_EXAMPLES]}


def _flip(sample: Json, before: Json, after: Json) -> dict[str, Any]:
    return sample | {"variant": before["chosen"], "compressed": after["chosen"]}
