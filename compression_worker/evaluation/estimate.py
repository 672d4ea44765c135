"""What an evaluation will need: each target is loaded in float32, beside the variant where text is read. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from compression_worker.contracts import Json
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.preflight import FLOAT, PROCESS_BYTES, Estimate, Inputs, Model, StepLoad, halvings

WORKING_BYTES = 150_000_000
"""What measuring and generating hold beside models and logits: what layers hand on, measured at 24 M parameters."""
BATCH_WINDOWS, BATCH_LOGITS = 8, 1 << 25
LOGITS_ALONE, LOGITS_BESIDE = 4, 6
"""Float32 copies of a batch's logits that live at once: one model's losses, and two models' divergence."""
BYTES_PER_TOKEN = 4
VALUES_PER_WINDOW, VALUES_PER_QUESTION = 120, 160
SHORTEST_WINDOW = 32


def estimate(config: EvaluationConfig, inputs: Inputs) -> Estimate:
    """The whole job: its targets one after another, and a summary."""
    sizes = {
        "parameters": float(inputs.variant.parameters),
        "text_bytes": float(inputs.text_bytes),
        "questions": float(inputs.questions),
        "question_bytes": float(inputs.question_bytes),
    }
    targets = _targets(inputs)
    params = [{"target": target, "config": _settings(config)} for target in targets]
    load = StepLoad(
        kind="evaluation.target",
        count=len(targets),
        units=sum(target_work(one, sizes) for one in params),
        **_memory(config, inputs, len(targets) > 1),
    )
    windows = min(config.max_windows, inputs.text_bytes // BYTES_PER_TOKEN // config.window_tokens)
    values = VALUES_PER_WINDOW * windows + VALUES_PER_QUESTION * min(config.max_choices, inputs.questions)
    summary = StepLoad(kind="evaluation.summary", count=1, units=float(config.bootstrap_resamples))
    return Estimate(
        parts=({"name": "summary", "bytes": 20_000 + values},),
        intermediate_bytes=len(targets) * (values + 4_000),
        steps=(StepLoad(kind="evaluation.plan", count=1, units=1.0), load, summary),
        sizes=sizes,
        exact=inputs.variant.shapes() is not None,
    )


def cheaper(config: EvaluationConfig) -> Iterator[EvaluationConfig]:
    """Shorter windows make smaller batches of logits; nothing else of the settings changes the memory."""
    for tokens in halvings(config.window_tokens, SHORTEST_WINDOW):
        yield replace(config, window_tokens=tokens)


def target_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Tokens read or made, times the parameters that each passes; text is read by the variant as well."""
    config = params["config"]
    text = min(config["window_tokens"] * config["max_windows"], sizes["text_bytes"] / BYTES_PER_TOKEN)
    share = min(1.0, config["max_choices"] / max(sizes["questions"], 1.0))
    questions = share * sizes["question_bytes"] / BYTES_PER_TOKEN
    answers = max(1, len(config["prompts"].splitlines())) * config["max_new_tokens"]
    passes = 1 if params["target"] == "variant" else 2
    return (passes * text + questions + answers) * sizes["parameters"]


def summary_work(params: Json, sizes: Mapping[str, float]) -> float:
    return float(params["config"].get("bootstrap_resamples", 2000))


def _targets(inputs: Inputs) -> list[str]:
    base = ["base"] if inputs.base else []
    return [*base, "variant", *(["compressed"] if inputs.artifact_bytes else [])]


def _settings(config: EvaluationConfig) -> Json:
    names = ("window_tokens", "max_windows", "max_choices", "prompts", "max_new_tokens")
    return {name: getattr(config, name) for name in names}


def _memory(config: EvaluationConfig, inputs: Inputs, beside: bool) -> dict[str, int]:
    two = beside and inputs.text_bytes > 0
    shapes = inputs.variant.shapes()
    logits = _batch_logits(config, shapes.vocabulary if shapes else 0) if inputs.text_bytes else 0
    models = FLOAT * (inputs.variant.parameters + (_other(inputs).parameters if two else 0))
    computing = models + FLOAT * (LOGITS_BESIDE if two else LOGITS_ALONE) * logits
    loading = PROCESS_BYTES + WORKING_BYTES + inputs.variant.weight_bytes * (2 if two else 1)
    return {
        "memory_bytes": loading + computing,
        "gpu_bytes": computing,
        "gpu_host_bytes": loading + FLOAT * inputs.variant.parameters,
    }


def _other(inputs: Inputs) -> Model:
    """The larger model that is read beside the variant: the base, or the compressed one, which is as large as it."""
    base = inputs.base
    return base if base and base.parameters > inputs.variant.parameters else inputs.variant


def _batch_logits(config: EvaluationConfig, vocabulary: int) -> int:
    one = config.window_tokens * vocabulary
    windows = max(1, min(BATCH_WINDOWS, config.max_windows, BATCH_LOGITS // max(one, 1)))
    return windows * one
