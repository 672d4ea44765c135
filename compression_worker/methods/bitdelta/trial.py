"""A candidate choice as a real model: its KL divergence from the variant on calibration text."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch

from compression_worker.architecture import Linear
from compression_worker.checkpoints import load_model
from compression_worker.contracts import StepContext
from compression_worker.deltas.budget import Choice
from compression_worker.deltas.moments import read_inputs
from compression_worker.deltas.pair import open_pair, whole_delta
from compression_worker.deltas.rows import CODINGS, merged_rows
from compression_worker.distillation import Batch
from compression_worker.making.blobs import open_blob
from compression_worker.making.calibration import calibration_windows
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.loading import module_path
from compression_worker.methods.bitdelta.coding import decode, encode
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.methods.bitdelta.options import fitted

WINDOWS, BATCH = 16, 4


class Trial:
    """Holds the variant's model in fp32 and its logits; :meth:`divergence` puts coded weights in, matrix by matrix."""

    def __init__(
        self, context: StepContext, config: BitDeltaConfig, rows: Mapping[str, list[str]], linears: Mapping[str, Linear]
    ) -> None:
        self._context, self._rows, self._linears = context, rows, linears
        variant = opened(context, "variant")
        cut = calibration_windows(context, variant, length=config.sequence_length, needed=WINDOWS)
        self.windows = min(WINDOWS, len(cut))
        self._batches = [cut.batch(at, BATCH) for at in range(-(-self.windows // BATCH))]
        self._model: Any = load_model(variant, device=context.device, dtype=torch.float32)
        self._model.requires_grad_(False)
        modules = dict(self._model.named_modules())
        own = architecture_of(variant).memory
        self._owners = {
            name: modules[module_path(own.get(name, name), modules, self._model.base_model_prefix)]
            for name in [*linears, *rows]
        }
        self._teacher = [self._logits(batch).log_softmax(-1) for batch in self._batches]
        self._now: Choice = {}

    def __enter__(self) -> Self:
        self._pair = open_pair(self._context, [])
        self._base, self._variant = self._pair.__enter__()
        self._seen = contextlib.ExitStack()
        blobs = self._context.input("sensitivity").blobs
        own = {name: digest for name, digest in blobs.items() if name != "moments"}
        self._samples = {
            name: self._seen.enter_context(open_blob(self._context, digest)) for name, digest in own.items()
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seen.__exit__(kind, error, trace)
        self._pair.__exit__(kind, error, trace)

    def divergence(self, choice: Choice) -> float:
        """KL(variant || candidate) in nats a token, mean over the real positions that have a next token."""
        for name, at in choice.items():
            if self._now.get(name) != at:
                self._put(name, at)
        self._now = dict(choice)
        total, count = 0.0, 0
        for batch, teacher in zip(self._batches, self._teacher, strict=True):
            student = self._logits(batch).log_softmax(-1)
            total += float((teacher.exp() * (teacher - student)).sum(dtype=torch.float64))
            count += len(student)
        return total / count

    def _logits(self, batch: Batch) -> torch.Tensor:
        device = self._context.device
        with torch.no_grad():
            logits: torch.Tensor = self._model(batch.tokens.to(device), use_cache=False).logits[:, :-1]
        return logits[batch.real[:, 1:].to(device)]

    def _put(self, name: str, at: int) -> None:
        weight = self._owners[name].weight
        if name in self._rows:
            merged = merged_rows(CODINGS[at], self._base.file(name), self._variant.file(name), name)
        else:
            merged = self._merged(self._linears[name], at)
        weight.data.copy_(merged)

    def _merged(self, linear: Linear, at: int) -> torch.Tensor:
        coding = fitted(linear, at)
        x = read_inputs(self._samples[f"block-{linear.block}"], linear.name)
        coded = encode(whole_delta(linear, self._base, self._variant), coding, x)
        delta = decode(coded.packed, coded.scales, coded.left, coded.right, coding, linear.inputs)
        base = self._base.file(linear.name).tensor(linear.name).to(torch.float32)
        return base + (delta.T if linear.transposed else delta)
