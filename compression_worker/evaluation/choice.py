"""Choice accuracy through lm-evaluation-harness, on local samples alone.

The model answers with the choice whose words it finds most likely after the question: the harness's ``acc``, by the
sum of log-probabilities. Its ``acc_norm`` divides by length in characters; it is not taken, because how well that suits
depends on the language and on the set, and a comparison of a model with its compressed self needs no correction.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from compression_worker.contracts import CompressionError, Json

SLICE = 20  # samples between two reports of progress
BATCH = 8


def answer_choices(
    model: Any, tokenizer: Any, samples: list[Json], progress: Callable[[int, int, str], None]
) -> list[Json]:
    """For each sample: ``chosen`` (index of the likeliest choice) and ``correct``."""
    _check_lengths(model, tokenizer, samples)
    harness = _harness()
    answers: list[Json] = []
    with contextlib.redirect_stderr(io.StringIO()):  # the harness draws progress bars of its own
        reader = harness.HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH)
    for start in range(0, len(samples), SLICE):
        with contextlib.redirect_stderr(io.StringIO()):
            answers += _answer_slice(harness, reader, samples[start : start + SLICE])
        progress(len(answers), len(samples), "choices")
    return answers


def _answer_slice(harness: _Harness, reader: Any, samples: list[Json]) -> list[Json]:
    task = harness.task(samples)
    result = harness.evaluate(
        lm=reader, task_dict={"tasks": {task.task_name: task}, "groups": {}}, bootstrap_iters=0, log_samples=True
    )
    logged = sorted(result["samples"][task.task_name], key=lambda sample: sample["doc_id"])
    return [_answer(sample) for sample in logged]


def _answer(sample: Json) -> Json:
    likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
    return {"chosen": int(np.argmax(likelihoods)), "correct": int(sample["acc"])}


def _check_lengths(model: Any, tokenizer: Any, samples: list[Json]) -> None:
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    for number, sample in enumerate(samples, start=1):
        longest = max(len(tokenizer(" " + choice, verbose=False)["input_ids"]) for choice in sample["choices"])
        if longest >= context:
            raise CompressionError(
                "choice_too_long",
                f"choice sample {number} has a choice of {longest} tokens, and the model reads at most {context}: "
                "shorten it or remove the sample",
            )


class _Harness:
    """The parts of lm-evaluation-harness that are used, behind one slow import."""

    def __init__(self, evaluator: ModuleType, huggingface: ModuleType, task: ModuleType, datasets: ModuleType) -> None:
        self.evaluate = evaluator.evaluate
        self.HFLM = huggingface.HFLM
        self._task = task
        self._datasets = datasets

    def task(self, samples: list[Json]) -> Any:
        """A multiple-choice task over samples in memory: nothing is downloaded, nothing cached on disk."""
        config = {
            "task": "choices",
            "custom_dataset": lambda **_: {"test": self._datasets.Dataset.from_list(samples)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "num_fewshot": 0,
            # Functions, because the harness reads strings as templates.
            "doc_to_text": lambda sample: sample["question"],
            "doc_to_choice": lambda sample: sample["choices"],
            "doc_to_target": lambda sample: sample["answer"],
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        return self._task.ConfigurableTask(config=config)


def _harness() -> _Harness:
    """Import the harness (many seconds when cold), kept off the network."""
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    with contextlib.redirect_stderr(io.StringIO()):
        import datasets
        from lm_eval import evaluator
        from lm_eval.api import task
        from lm_eval.models import huggingface
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return _Harness(evaluator, huggingface, task, datasets)
