"""An evaluation as steps: a plan, one step for each target, and a summary.

A target's step depends on nothing but its own model, the variant, the sets and the settings. So what was measured of
base and variant is found again by its key when the next artifact of the same variant is evaluated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from compression_worker.contracts import (
    CompressionError,
    Json,
    PlannedStep,
    StepContext,
    StepOutput,
    canonical_json,
)
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.faults import failpoint
from compression_worker.samples import read_samples

REFERENCE = "variant"
VALUES = "values.json"


def plan_step(context: StepContext) -> StepOutput:
    """Which targets are measured, and the summary that reads them all."""
    config = EvaluationConfig.from_json(context.spec.params.get("config", {}))
    inputs = dict(context.spec.inputs)
    _check_inputs(context, inputs)
    targets = _targets(context, inputs)
    alone = "artifact" in inputs and _stands_alone(context, inputs["artifact"])
    steps = [_target_step(target, inputs, config, alone) for target in targets]
    summary = PlannedStep(
        name="summary",
        kind="evaluation.summary",
        group="summary",
        params={"targets": targets, "config": context.spec.params.get("config", {})},
        inputs={target: f"@{at}" for at, target in enumerate(targets)}
        | {name: inputs[name] for name in ("text", "choice") if name in inputs},
    )
    return StepOutput(data={"targets": targets}, steps=(*steps, summary))


def _check_inputs(context: StepContext, inputs: Mapping[str, str]) -> None:
    if "artifact" in inputs and "base" not in inputs and not _stands_alone(context, inputs["artifact"]):
        raise CompressionError("missing_base", "an artifact is measured on top of its base: name the base as well")
    if "text" not in inputs and "choice" not in inputs:
        raise CompressionError("no_samples", "choose a text set, a choice set, or both: there is nothing to measure on")
    for kind, field in (("text", "text"), ("choice", "question")):
        if any(field not in sample for sample in _samples(context, kind)[:1]):
            raise CompressionError("wrong_set", f"the set given as {kind} set is of the other kind: choose another one")


def _stands_alone(context: StepContext, artifact: str) -> bool:
    from compression_worker.artifact import Artifact

    return Artifact.open_store(context.store, artifact).stands_alone


def _targets(context: StepContext, inputs: Mapping[str, str]) -> list[str]:
    from compression_worker.checkpoints import read_manifest

    targets = [REFERENCE, *(["compressed"] if "artifact" in inputs else [])]
    if "base" not in inputs:
        return targets
    sizes = [read_manifest(context.store, inputs[name])["config"].get("vocab_size") for name in ("base", REFERENCE)]
    if sizes[0] != sizes[1]:
        words = f"the base is not measured: its vocabulary has {sizes[0]} tokens and the variant's {sizes[1]}"
        context.log(words, "warning")
        return targets
    return ["base", *targets]


def _target_step(target: str, inputs: Mapping[str, str], config: EvaluationConfig, alone: bool) -> PlannedStep:
    """``alone``: what is compressed stands alone, so that its figures do not depend on a base."""
    needed = {
        "base": ("base", REFERENCE, "text", "choice"),
        REFERENCE: (REFERENCE, "text", "choice"),
        "compressed": (*(() if alone else ("base",)), "artifact", REFERENCE, "text", "choice"),
    }
    return PlannedStep(
        name=target,
        kind="evaluation.target",
        group="target",
        params={"target": target, "config": measuring(config)},
        inputs={name: inputs[name] for name in needed[target] if name in inputs},
    )


def measuring(config: EvaluationConfig) -> Json:
    """The settings that change what a target's step measures: other resampling reuses it."""
    names = ("window_tokens", "max_windows", "max_choices", "prompts", "max_new_tokens")
    return {name: getattr(config, name) for name in names}


def target_step(context: StepContext) -> StepOutput:
    """Measure one target: each window of text, each question, each prompt. The values are one JSON blob."""
    target = context.spec.params["target"]
    tokenizer = _tokenizer(context)
    model = load_target(context, target)
    reference = model if target == REFERENCE else None
    if target != REFERENCE and "text" in context.spec.inputs:
        reference = load_target(context, REFERENCE)
    values = measure(context, model, reference, tokenizer)
    failpoint("evaluation.target")
    digest = context.store.write_bytes(canonical_json(values))
    counts = {name: len(values[name]) for name in ("windows", "choices", "answers")}
    return StepOutput(blobs={VALUES: digest}, data={"target": target} | counts)


def measure(context: StepContext, model: Any, reference: Any | None, tokenizer: Any) -> Json:
    """``windows``, ``choices`` and ``answers`` of ``model``; ``reference`` is read beside it for fidelity."""
    config = EvaluationConfig.from_json(context.spec.params["config"])
    text, choices = _samples(context, "text"), _samples(context, "choice")[: config.max_choices]
    return {
        "windows": _measure_text(context, model, reference, tokenizer, text, config) if text else [],
        "choices": _answer_choices(context, model, tokenizer, choices) if choices else [],
        "answers": _answers(context, model, tokenizer, text, choices, config),
    }


def _measure_text(
    context: StepContext, model: Any, reference: Any | None, tokenizer: Any, text: list[Json], config: EvaluationConfig
) -> list[Json]:
    from compression_worker.evaluation.windows import check_windows, cut_windows, measure_windows

    windows = cut_windows(tokenizer, text, config)
    check_windows(windows, model)
    started = time.monotonic()
    values = measure_windows(model, reference, windows, context.progress)
    context.measure("tokens_per_second", windows.numel() / max(time.monotonic() - started, 1e-9))
    if len(windows) < 10:
        context.log(f"the text set gives only {len(windows)} windows: the intervals are wide and rough", "warning")
    return values


def _answer_choices(context: StepContext, model: Any, tokenizer: Any, choices: list[Json]) -> list[Json]:
    from compression_worker.evaluation.choice import answer_choices

    context.log(f"answering {len(choices)} choice samples", "info")
    return answer_choices(model, tokenizer, choices, context.progress)


def _answers(
    context: StepContext, model: Any, tokenizer: Any, text: list[Json], choices: list[Json], config: EvaluationConfig
) -> list[str]:
    from compression_worker.evaluation.generation import chosen_prompts, greedy_answers

    prompts = chosen_prompts(config, text, choices)
    return greedy_answers(model, tokenizer, prompts, config.max_new_tokens, context.progress)


def load_target(context: StepContext, target: str) -> Any:
    """The model that ``target`` names among the step's inputs, in float32.

    So figures speak of the weights and not of rounding on the way, and are the same on every device.
    """
    import torch

    from compression_worker.artifact import load_compressed_model
    from compression_worker.checkpoints import Checkpoint, load_model

    inputs = context.spec.inputs
    if target == "compressed":
        return load_compressed_model(
            context.store, inputs.get("base"), inputs["artifact"], context.device, torch.float32
        )
    return load_model(Checkpoint.open(context.store, inputs[target]), device=context.device, dtype=torch.float32)


def _tokenizer(context: StepContext) -> Any:
    """The variant's tokenizer reads for all targets, so that their windows are the same tokens."""
    from compression_worker.checkpoints import Checkpoint, load_tokenizer

    return load_tokenizer(Checkpoint.open(context.store, context.spec.inputs[REFERENCE]))


def summary_step(context: StepContext) -> StepOutput:
    """All targets in one document: figures, paired differences, flips and answers."""
    from compression_worker.evaluation.generation import chosen_prompts
    from compression_worker.evaluation.summary import summarise

    config = EvaluationConfig.from_json(context.spec.params["config"])
    targets: list[str] = context.spec.params["targets"]
    text, choices = _samples(context, "text"), _samples(context, "choice")[: config.max_choices]
    data = summarise(
        measured={target: _values(context, target) for target in targets},
        reference=REFERENCE,
        prompts=chosen_prompts(config, text, choices),
        choices=choices,
        config=config,
    )
    failpoint("evaluation.summary")
    return StepOutput(data=data)


def _values(context: StepContext, target: str) -> Json:
    values: Json = json.loads(context.store.read_bytes(context.input(target).blobs[VALUES]))
    return values


def _samples(context: StepContext, name: str) -> list[Json]:
    digest = context.spec.inputs.get(name)
    return read_samples(context.store.read_bytes(digest)) if digest else []
