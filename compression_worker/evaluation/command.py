"""``evaluate`` of the command line: measure one folder, a checkpoint or an artifact, without a store or a plan."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from compression_worker.adapters import is_adapter
from compression_worker.artifact import MANIFEST, Artifact, load_artifact_tokenizer
from compression_worker.artifact import load_model as load_artifact_model
from compression_worker.checkpoints import Checkpoint, attach_folder, load_model, load_tokenizer
from compression_worker.contracts import CompressionError, Json, Metric, StepContext, StepSpec
from compression_worker.evaluation.config import EvaluationConfig
from compression_worker.evaluation.steps import measure, measuring
from compression_worker.evaluation.summary import choice_metrics, text_metrics
from compression_worker.runner import prepare_torch, resolve_device
from compression_worker.samples import CHOICE, MAX_BYTES, TEXT, parse_samples
from compression_worker.store import Store

TARGET = "target"


def evaluate(
    target: Path,
    *,
    data: Path | None = None,
    choice: Path | None = None,
    base: Path | None = None,
    reference: Path | None = None,
    config: EvaluationConfig | None = None,
    device: str = "auto",
    on_event: Callable[[Json], None] = lambda event: None,
) -> list[Metric]:
    """Perplexity on ``data``, choice accuracy on ``choice``; with ``reference``, KL divergence and top-1 agreement.

    ``target`` is a Hugging Face folder, or an artifact or a PEFT adapter, which need their ``base``. ``on_event`` gets
    the messages that a step's child gives (progress, log).
    """
    config = replace(config or EvaluationConfig(), max_new_tokens=0)
    prepare_torch()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        samples = {
            kind: store.write_bytes(_read(path, kind)) for kind, path in ((TEXT, data), (CHOICE, choice)) if path
        }
        if not samples:
            raise CompressionError("no_samples", "give text with --data, questions with --choice, or both")
        context = _context(store, samples, config, resolve_device(device), on_event)
        model, tokenizer = _load_target(context, target, base)
        beside = None
        if reference:
            beside, tokenizer = _load_checkpoint(context, reference, base)
        measured = {TARGET: measure(context, model, beside, tokenizer)}
    figures = text_metrics(measured, TARGET, config) + choice_metrics(measured, TARGET, config)
    return [_metric(figure) for figure in figures]


def table(metrics: list[Metric]) -> str:
    """The metrics as lines for a terminal."""
    rows = [("metric", "value", "95 % interval", "samples", "")]
    for metric in metrics:
        span = f"{metric.low:.4f} … {metric.high:.4f}"
        rows.append((metric.name, f"{metric.value:.4f}", span, f"{metric.samples:,}", metric.unit))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = (
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {span:^{widths[2]}}  {samples:>{widths[3]}}  {unit}".rstrip()
        for name, value, span, samples, unit in rows
    )
    return "\n".join(lines)


def _read(path: Path, kind: str) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CompressionError("file_too_large", f"'{path}' has over {MAX_BYTES:,} bytes: take a part of it")
        raw = path.read_bytes()
    except OSError as error:
        raise CompressionError("unreadable_file", f"'{path}' cannot be read: {error.strerror}") from error
    try:
        return parse_samples(raw, kind).data
    except CompressionError as error:
        raise CompressionError(error.code, f"'{path}': {error.message}") from error


def _context(
    store: Store, samples: dict[str, str], config: EvaluationConfig, device: str, on_event: Callable[[Json], None]
) -> StepContext:
    return StepContext(
        store=store,
        spec=StepSpec(kind="evaluation.target", params={"config": measuring(config)}, inputs=samples),
        progress=lambda done, total, unit: on_event({"type": "progress", "done": done, "total": total, "unit": unit}),
        log=lambda text, level: on_event({"type": "log", "level": level, "text": text}),
        measure=lambda name, value: None,
        device=device,
    )


def _load_target(context: StepContext, target: Path, base: Path | None) -> tuple[Any, Any]:
    """The model in ``target`` and its tokenizer."""
    import torch

    if not (target / MANIFEST).is_file():
        return _load_checkpoint(context, target, base)
    artifact = Artifact.open_folder(target)
    if base is None and not artifact.stands_alone:
        raise CompressionError(
            "missing_base", f"'{target}' is an artifact: name the base that it belongs to with --base"
        )
    checkpoint = Checkpoint.open(context.store, attach_folder(context.store, base)) if base else None
    model = load_artifact_model(checkpoint, artifact, context.device, torch.float32)
    return model, load_artifact_tokenizer(artifact.with_base(checkpoint))


def _load_checkpoint(context: StepContext, folder: Path, base: Path | None) -> tuple[Any, Any]:
    import torch

    under = base if base and folder.is_dir() and is_adapter(os.listdir(folder)) else None
    at = attach_folder(context.store, under) if under else ""
    checkpoint = Checkpoint.open(context.store, attach_folder(context.store, folder, base=at))
    return load_model(checkpoint, device=context.device, dtype=torch.float32), load_tokenizer(checkpoint)


def _metric(figure: Json) -> Metric:
    estimate = figure["values"][TARGET]
    return Metric(
        name=figure["name"],
        value=estimate["value"],
        low=estimate["low"],
        high=estimate["high"],
        unit=figure["unit"],
        higher_is_better=figure["higher_is_better"],
        samples=figure["samples"],
    )
