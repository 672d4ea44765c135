"""The tables that name what Deltaworks can do: methods and step kinds, each by a dotted path loaded on first use.

A process without torch can list, label and configure everything here; only the child that computes loads an
implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from compression_worker.contracts import CompressionError, StepContext, StepOutput


@dataclass(frozen=True)
class Method:
    """A compression method: how people name it, where it was published, and where its code is.

    ``config`` is a frozen dataclass free of torch, and so is ``forecast``: a module with ``estimate(config, inputs)``
    for the pre-flight, and with ``cheaper(config)`` and ``calmer(config)``, the changes that usually help a job that
    does not fit or that diverged. ``implementation`` is a module with ``plan``, ``compress`` and ``restore``.
    """

    label: str
    summary: str
    paper: str
    config: str
    implementation: str
    forecast: str

    def config_class(self) -> type[Any]:
        return load(self.config)

    def forecaster(self) -> Any:
        return import_module(self.forecast)


METHODS: dict[str, Method] = {
    "bitdelta": Method(
        label="BitDelta",
        summary="One sign bit per weight of every block linear, and one distilled scale per matrix.",
        paper="arXiv:2402.10193",
        config="compression_worker.methods.bitdelta.config:BitDeltaConfig",
        implementation="compression_worker.methods.bitdelta.compress",
        forecast="compression_worker.methods.bitdelta.estimate",
    ),
}

STEPS: dict[str, str] = {
    "checkpoint.import": "compression_worker.checkpoints:import_step",
    "bitdelta.plan": "compression_worker.methods.bitdelta.compress:plan_step",
    "bitdelta.layer": "compression_worker.methods.bitdelta.compress:layer_step",
    "bitdelta.rest": "compression_worker.methods.bitdelta.compress:rest_step",
    "bitdelta.distill": "compression_worker.methods.bitdelta.compress:distill_step",
    "bitdelta.assemble": "compression_worker.methods.bitdelta.compress:assemble_step",
    "evaluation.plan": "compression_worker.evaluation.steps:plan_step",
    "evaluation.target": "compression_worker.evaluation.steps:target_step",
    "evaluation.summary": "compression_worker.evaluation.steps:summary_step",
    "release.rehearse": "compression_worker.rehearsal:rehearse_step",
    "escrow.plan": "compression_worker.escrow.steps:plan_step",
    "escrow.encode": "compression_worker.escrow.steps:encode_step",
    "escrow.assemble": "compression_worker.escrow.steps:assemble_step",
    "escrow.restore": "compression_worker.escrow.steps:restore_step",
}


@dataclass(frozen=True)
class Need:
    """What the steps of one kind ask of a worker.

    ``device``: they hold whole models and compute on the job's device, so they go to the job's own queue; all others
    go to the queue ``cpu``. ``work``: a function without torch that counts a step's work from its parameters and the
    job's sizes, in units whose rate is measured; a step without one is one unit.
    """

    device: bool = False
    work: str = ""


NEEDS: dict[str, Need] = {
    "checkpoint.import": Need(work="compression_worker.preflight:source_work"),
    "bitdelta.layer": Need(work="compression_worker.methods.bitdelta.estimate:layer_work"),
    "bitdelta.rest": Need(work="compression_worker.methods.bitdelta.estimate:rest_work"),
    "bitdelta.distill": Need(device=True, work="compression_worker.methods.bitdelta.estimate:distill_work"),
    "bitdelta.assemble": Need(work="compression_worker.methods.bitdelta.estimate:assemble_work"),
    "evaluation.target": Need(device=True, work="compression_worker.evaluation.estimate:target_work"),
    "evaluation.summary": Need(work="compression_worker.evaluation.estimate:summary_work"),
    "release.rehearse": Need(device=True, work="compression_worker.preflight:source_work"),
    "escrow.encode": Need(work="compression_worker.escrow.estimate:encode_work"),
    "escrow.assemble": Need(work="compression_worker.preflight:source_work"),
    "escrow.restore": Need(work="compression_worker.preflight:source_work"),
}
"""One line for each kind of step that is not a trifle for the processor."""


def need(kind: str) -> Need:
    return NEEDS.get(kind, Need())


def load(path: str) -> Any:
    """The object at ``"module:name"``."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def method(name: str) -> Method:
    """The method called ``name``; raises :class:`CompressionError` (``unknown_method``) where there is none."""
    try:
        return METHODS[name]
    except KeyError:
        known = ", ".join(sorted(METHODS))
        raise CompressionError("unknown_method", f"there is no method '{name}'; known methods: {known}") from None


def step_function(kind: str) -> Callable[[StepContext], StepOutput]:
    """The function that computes steps of ``kind``."""
    function: Callable[[StepContext], StepOutput] = load(STEPS[kind])
    return function
