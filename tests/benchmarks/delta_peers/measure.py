"""Every row on the same windows beside the same variant, and what follows with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from compression_worker.contracts import Json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.summary import text_metrics
from compression_worker.evaluation.windows import check_windows, cut_windows, measure_windows
from dashboard.verdicts import Verdict, judge
from tests.benchmarks.delta_peers.pair import Pair

MARGIN = 0.1
"""KL differences below this share of the peer's own KL are too small to matter."""
REMEMBERED = 2 * 10**9
"""Bytes of logits that are kept rather than computed again for each row."""


class Remembered:
    """The reference model, whose logits on a batch are computed once."""

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self._model = model
        self._fits = 4 * windows.numel() * int(model.config.vocab_size) <= REMEMBERED
        self._known: dict[bytes, Any] = {}

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Any:
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._known:
            answer = self._model(input_ids=input_ids, use_cache=use_cache)
            if not self._fits:
                return answer
            self._known[key] = answer
        return self._known[key]


class Evaluator:
    """Measures weights in one model, into which they are copied, and whole models."""

    def __init__(self, pair: Pair, samples: list[Json], config: EvaluationConfig) -> None:
        self.config = config
        self.windows = cut_windows(pair.tokenizer(), samples, config)
        variant = pair.model("variant")
        check_windows(self.windows, variant)
        self._reference = Remembered(variant, self.windows)
        self._variant = variant
        self._model = pair.model("variant")
        self._places = places(self._model, pair.names)

    def variant(self) -> list[Json]:
        return measure_windows(self._variant, self._variant, self.windows, _silent)

    def model(self, model: Any) -> list[Json]:
        """Sums by window of a model beside the variant."""
        return measure_windows(model, self._reference, self.windows, _silent)

    def weights(self, weights: Mapping[str, torch.Tensor]) -> list[Json]:
        """The same for all tensors of the pair, by name."""
        if weights.keys() != self._places.keys():
            missing = sorted(self._places.keys() ^ weights.keys())
            raise ValueError(f"these are not the tensors of the pair: {missing[:3]}")
        with torch.no_grad():
            for name, place in self._places.items():
                place.copy_(weights[name])
        return self.model(self._model)


def places(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """Where each tensor of a checkpoint lies in the model; some files leave out the model's prefix."""
    state = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    return {name: state[name] if name in state else state[prefix + name] for name in names}


@dataclass(frozen=True)
class Comparison:
    """KL of ours minus KL of a peer on the same windows, and the verdict on ours."""

    difference: float
    low: float
    high: float
    verdict: Verdict


def figures(measured: Mapping[str, list[Json]], reference: str, config: EvaluationConfig) -> dict[str, Json]:
    """Perplexity, KL divergence and top-1 agreement by metric, then by row; each with its 95 % interval."""
    targets = {name: {"windows": windows} for name, windows in measured.items()}
    return {metric["name"]: metric["values"] for metric in text_metrics(targets, reference, config)}


def compare(ours: list[Json], peer: list[Json], config: EvaluationConfig) -> Comparison:
    """The paired bootstrap over windows. Equal: the whole interval lies within :data:`MARGIN` of the peer's KL."""
    targets = {"ours": {"windows": ours}, "peer": {"windows": peer}}
    metrics = text_metrics(targets, "peer", config)
    (metric,) = (metric for metric in metrics if metric["name"] == "kl_divergence")
    difference = metric["differences"]["ours"]
    verdict = judge(
        low=difference["low"],
        high=difference["high"],
        margin=MARGIN * metric["values"]["peer"]["value"],
        higher_is_better=False,
        samples=metric["samples"],
    )
    return Comparison(difference["value"], difference["low"], difference["high"], verdict)


def _silent(done: int, total: int, unit: str) -> None:
    """Rows report for themselves."""
