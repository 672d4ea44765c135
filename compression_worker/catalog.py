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

    ``summary``, ``when`` and ``costs`` are the card that people choose by, in plain words: what it does, when to use
    it, what it takes. ``config`` is a frozen dataclass free of torch, and so is ``forecast``: a module with
    ``estimate(config, inputs)`` for the pre-flight, and with ``cheaper(config)`` and ``calmer(config)``, the changes
    that usually help a job that does not fit or that diverged. ``implementation`` is a module with ``plan``,
    ``compress`` and ``restore``. A method that does not need a base compresses one checkpoint by itself, and what it
    makes stands alone.
    """

    label: str
    summary: str
    paper: str
    config: str
    implementation: str
    forecast: str
    when: str = ""
    costs: str = ""
    needs_base: bool = True

    @property
    def words(self) -> tuple[str, ...]:
        """What pages show of the method, for whoever collects it for translation."""
        return tuple(words for words in (self.summary, self.when, self.costs) if words)

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
        when=(
            "For fine-tunes that stay near their base, and where many variants share one base: chat and style keep "
            "nearly everything. Specialists in mathematics or code can lose points, so evaluate before you ship."
        ),
        costs=(
            "Both models are read once. Distilling the scales then takes most of the time, with both models in memory; "
            "without it the job is little more than copying. What is kept whole, such as a large vocabulary, sets the "
            "limit of the ratio."
        ),
    ),
    "deltadq": Method(
        label="DeltaDQ",
        summary="One weight in a few of every block linear's delta, at a few bits, with positions from a seed.",
        paper="arXiv:2410.08666",
        config="compression_worker.methods.deltadq.config:DeltaDQConfig",
        implementation="compression_worker.methods.deltadq.compress",
        forecast="compression_worker.methods.deltadq.estimate",
        when=(
            "Where the smallest file counts: dropping at random with rescaling keeps what a delta does on average. "
            "Brief fine-tunes thin out best; compare with sign bits on your own text before you ship."
        ),
        costs=(
            "Both models are read once, and the mask of every weight is computed. Choosing the group size loads the "
            "variant and reads a little calibration text; a group size given by hand needs neither."
        ),
    ),
    "gptq": Method(
        label="GPTQ",
        summary="Every block linear on a grid of 2, 3, 4 or 8 bits, rounded so that later weights mend earlier errors.",
        paper="arXiv:2210.17323",
        config="compression_worker.methods.gptq.config:GPTQConfig",
        implementation="compression_worker.methods.gptq.compress",
        forecast="compression_worker.methods.gptq.estimate",
        when=(
            "For one model that has to be small by itself, to be served by vLLM or transformers as it is: 4 bits lose "
            "little, 3 bits show. For 2 bits QuIP# is the better code."
        ),
        costs=(
            "One pass over a few thousand words of text, block by block, with one block in memory: minutes for a small "
            "model on a processor. Embeddings and head stay whole."
        ),
        needs_base=False,
    ),
    "quip_sharp": Method(
        label="QuIP#",
        summary="Every block linear at 2, 3 or 4 bits a weight, as points of a lattice, in an artifact of its own.",
        paper="arXiv:2402.04396",
        config="compression_worker.methods.quip_sharp.config:QuipSharpConfig",
        implementation="compression_worker.methods.quip_sharp.compress",
        forecast="compression_worker.methods.quip_sharp.estimate",
        when=(
            "For any one model that has to fit in little memory, and above all at 2 bits, where rounding weight by "
            "weight fails. Small models lose more than large ones: fine-tune, and evaluate before you ship."
        ),
        costs=(
            "The model reads a little calibration text, a block in memory at a time. Rounding takes about ten times as "
            "long as GPTQ, with refinement longer; fine-tuning the whole model needs it in full precision in memory."
        ),
        needs_base=False,
    ),
    "int21": Method(
        label="INT2.1",
        summary="A packed base of 2, 3, 4 or 8 bits that never changes, and low-rank adapters that learn what it lost.",
        paper="arXiv:2306.08162",
        config="compression_worker.methods.int21.config:Int21Config",
        implementation="compression_worker.methods.int21.compress",
        forecast="compression_worker.methods.int21.estimate",
        when=(
            "Where 2 or 3 bits alone lose too much, or where a small machine has to tune a large model: the adapters "
            "are ordinary LoRA files that other tools load."
        ),
        costs=(
            "The base is made first; then the full model answers the text once, and training reads it with the packed "
            "model in memory: hours on a processor for a small model, so start with few tokens and look at the curve."
        ),
        needs_base=False,
    ),
    "deltallm": Method(
        label="DeltaLLM",
        summary="Some layers use the weights of an earlier one, and keep a low-rank difference each.",
        paper="arXiv:2501.18596",
        config="compression_worker.methods.deltallm.config:DeltaLLMConfig",
        implementation="compression_worker.methods.deltallm.compress",
        forecast="compression_worker.methods.deltallm.estimate",
        when=(
            "Where a model has to lose parameters and not bits, and to find out which layers a model could do without. "
            "For the smallest file quantize instead: 4 bits save far more and lose less."
        ),
        costs=(
            "It saves parameters, bytes and memory, and neither arithmetic nor time: every layer still multiplies with "
            "a whole weight, and with its difference as well. Choosing runs the model for each candidate, and training "
            "holds the whole model."
        ),
        needs_base=False,
    ),
}

STEPS: dict[str, str] = {
    "checkpoint.import": "compression_worker.checkpoints:import_step",
    "bitdelta.plan": "compression_worker.methods.bitdelta.compress:plan_step",
    "bitdelta.sense": "compression_worker.methods.bitdelta.compress:sense_step",
    "bitdelta.measure": "compression_worker.methods.bitdelta.compress:measure_step",
    "bitdelta.choose": "compression_worker.methods.bitdelta.compress:choose_step",
    "bitdelta.layer": "compression_worker.methods.bitdelta.compress:layer_step",
    "bitdelta.rest": "compression_worker.methods.bitdelta.compress:rest_step",
    "bitdelta.distill": "compression_worker.methods.bitdelta.compress:distill_step",
    "bitdelta.assemble": "compression_worker.methods.bitdelta.compress:assemble_step",
    "deltadq.plan": "compression_worker.methods.deltadq.compress:plan_step",
    "deltadq.search": "compression_worker.methods.deltadq.compress:search_step",
    "deltadq.layer": "compression_worker.methods.deltadq.compress:layer_step",
    "deltadq.rest": "compression_worker.methods.deltadq.compress:rest_step",
    "deltadq.assemble": "compression_worker.methods.deltadq.compress:assemble_step",
    "gptq.plan": "compression_worker.methods.gptq.compress:plan_step",
    "gptq.layers": "compression_worker.methods.gptq.compress:layers_step",
    "gptq.assemble": "compression_worker.methods.gptq.compress:assemble_step",
    "int21.plan": "compression_worker.methods.int21.compress:plan_step",
    "int21.start": "compression_worker.methods.int21.start:start_step",
    "int21.train": "compression_worker.methods.int21.training:train_step",
    "int21.assemble": "compression_worker.methods.int21.compress:assemble_step",
    "deltallm.plan": "compression_worker.methods.deltallm.compress:plan_step",
    "deltallm.choose": "compression_worker.methods.deltallm.choosing:choose_step",
    "deltallm.train": "compression_worker.methods.deltallm.training:train_step",
    "deltallm.assemble": "compression_worker.methods.deltallm.compress:assemble_step",
    "teacher.text": "compression_worker.quantization.teacher:text_step",
    "teacher.logits": "compression_worker.quantization.teacher:logits_step",
    "quantization.rest": "compression_worker.quantization.rest:rest_step",
    "quip_sharp.plan": "compression_worker.methods.quip_sharp.compress:plan_step",
    "quip_sharp.layers": "compression_worker.methods.quip_sharp.compress:layers_step",
    "quip_sharp.tune_layers": "compression_worker.methods.quip_sharp.compress:layers_step",
    "quip_sharp.teacher": "compression_worker.methods.quip_sharp.compress:teacher_step",
    "quip_sharp.tune": "compression_worker.methods.quip_sharp.compress:tune_step",
    "quip_sharp.assemble": "compression_worker.methods.quip_sharp.compress:assemble_step",
    "calibration.tokens": "compression_worker.quantization.calibration:tokens_step",
    "calibration.hessians": "compression_worker.quantization.calibration:hessians_step",
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
    "bitdelta.sense": Need(device=True, work="compression_worker.methods.bitdelta.estimate:sense_work"),
    "bitdelta.measure": Need(work="compression_worker.methods.bitdelta.estimate:measure_work"),
    "bitdelta.choose": Need(device=True, work="compression_worker.methods.bitdelta.estimate:choose_work"),
    "bitdelta.layer": Need(work="compression_worker.methods.bitdelta.estimate:layer_work"),
    "bitdelta.rest": Need(work="compression_worker.methods.bitdelta.estimate:rest_work"),
    "bitdelta.distill": Need(device=True, work="compression_worker.methods.bitdelta.estimate:distill_work"),
    "bitdelta.assemble": Need(work="compression_worker.methods.bitdelta.estimate:assemble_work"),
    "deltadq.search": Need(device=True, work="compression_worker.methods.deltadq.estimate:search_work"),
    "deltadq.layer": Need(work="compression_worker.methods.deltadq.estimate:layer_work"),
    "deltadq.rest": Need(work="compression_worker.methods.deltadq.estimate:rest_work"),
    "deltadq.assemble": Need(work="compression_worker.methods.deltadq.estimate:assemble_work"),
    "gptq.layers": Need(device=True, work="compression_worker.methods.gptq.estimate:layers_work"),
    "gptq.assemble": Need(work="compression_worker.methods.gptq.estimate:assemble_work"),
    "int21.start": Need(device=True, work="compression_worker.methods.int21.estimate:start_work"),
    "int21.train": Need(device=True, work="compression_worker.quantization.estimate:train_work"),
    "int21.assemble": Need(work="compression_worker.methods.int21.estimate:assemble_work"),
    "deltallm.choose": Need(device=True, work="compression_worker.methods.deltallm.estimate:choose_work"),
    "deltallm.train": Need(device=True, work="compression_worker.quantization.estimate:train_work"),
    "deltallm.assemble": Need(work="compression_worker.methods.deltallm.estimate:assemble_work"),
    "teacher.text": Need(work="compression_worker.quantization.estimate:text_work"),
    "teacher.logits": Need(device=True, work="compression_worker.quantization.estimate:logits_work"),
    "quantization.rest": Need(work="compression_worker.quantization.estimate:rest_work"),
    "quip_sharp.layers": Need(device=True, work="compression_worker.methods.quip_sharp.estimate:layers_work"),
    "quip_sharp.tune_layers": Need(device=True, work="compression_worker.methods.quip_sharp.estimate:tune_layers_work"),
    "quip_sharp.teacher": Need(device=True, work="compression_worker.methods.quip_sharp.estimate:teacher_work"),
    "quip_sharp.tune": Need(device=True, work="compression_worker.methods.quip_sharp.estimate:tune_work"),
    "quip_sharp.assemble": Need(work="compression_worker.methods.quip_sharp.estimate:assemble_work"),
    "calibration.tokens": Need(device=True, work="compression_worker.quantization.estimate:tokens_work"),
    "calibration.hessians": Need(device=True, work="compression_worker.quantization.estimate:hessians_work"),
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
