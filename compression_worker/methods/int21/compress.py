"""INT2.1 (arXiv:2306.08162): a packed base that never changes, and low-rank adapters that learn what it lost.

EMEF is LoRA on the packed base (PEFT's own adapters, on any packed linear); LREC trains the same adapters so that the
model's answers come near those of the full-precision one. Rank, loss and the rule of memory are our reading: the
paper's abstract states sizes and effects, and no code was published.

A job is the list of steps that :func:`plan_step` makes: those of the base's method, then the text in windows, answers
of the teacher, the closed-form start where it is asked for, chunks of training in a chain, and the assembly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields

from compression_worker.adapters import CONFIG_FILE, WEIGHTS_FILE
from compression_worker.architecture import build
from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.beneath import packed_base, planned, weigh_of
from compression_worker.making.inputs import opened
from compression_worker.making.table import six_digits
from compression_worker.methods.int21 import figures, layout
from compression_worker.methods.int21 import packed_base as base_method
from compression_worker.methods.int21.config import Int21Config
from compression_worker.methods.int21.merge import load_model, load_packed, open_merged
from compression_worker.methods.int21.training import LREC, STATE_FILE
from compression_worker.quantization.calibration import Sampling
from compression_worker.quantization.calibration import planned as calibration_planned
from compression_worker.quantization.rest import checked_source
from compression_worker.quantization.teacher import HELD_OUT, TRAINED, logits_planned, text_planned
from compression_worker.quantization.windows import window_length

__all__ = ["assemble_step", "load_model", "load_packed", "open_merged", "plan_step"]

METHOD = "int21"


def plan_step(context: StepContext) -> StepOutput:
    """Check the model against the settings and list the steps. Reads no weight."""
    config = parse_config(context.spec.params["config"])
    if config.calibrates and "calibration" not in context.spec.inputs:
        raise CompressionError(
            "no_calibration", "INT2.1 reads a text to learn from: give a text set, or set calibration=generations"
        )
    architecture = checked_source(opened(context, "variant"))
    if stacked := architecture.stacked():
        context.log(
            f"{len(stacked):,} matrices of experts are quantized without an adapter: only single linears carry one",
            "warning",
        )
    plan = _Plan(
        context,
        config,
        list(planned(context, config.base_method, config.base_config()).steps),
        len(architecture.blocks),
    )
    plan.add_text_and_teacher()
    if config.start == "closed_form":
        plan.add_start()
    plan.add_training()
    plan.add_assembly()
    data = {"layers": len(architecture.blocks), "linears": sum(1 for _ in architecture.linears())}
    return StepOutput(data=data, steps=tuple(plan.steps))


def parse_config(value: Json) -> Int21Config:
    """The config that a form or the command line gave; refuses settings that INT2.1 does not have."""
    known = {field.name for field in fields(Int21Config)}
    if unknown := sorted(value.keys() - known):
        raise CompressionError(
            "bad_setting", f"INT2.1 has no setting '{unknown[0]}'; known: {', '.join(sorted(known))}"
        )
    return Int21Config(**value)


class _Plan:
    """Steps behind those of the base's method, whose last one makes the base's artifact."""

    def __init__(self, context: StepContext, config: Int21Config, steps: list[PlannedStep], blocks: int) -> None:
        self.steps = steps
        self._config = config
        self._blocks = blocks
        self._seed = context.spec.seed
        self._packed = f"@{len(steps) - 1}"
        inputs = context.spec.inputs
        names = ("variant", "calibration") if config.calibrates else ("variant",)
        self._source = {name: inputs[name] for name in names}
        checkpoint = opened(context, "variant")
        self._length = window_length(context, checkpoint, config.window_tokens)
        self._sampling = Sampling(samples=config.samples, length=window_length(context, checkpoint, config.length))
        self._teachers: list[str] = []
        self._start = ""

    def add_text_and_teacher(self) -> None:
        config, variant = self._config, self._source["variant"]
        self._text = self._add(
            text_planned(
                self._source,
                windows=config.windows,
                length=self._length,
                held_out=config.held_out,
                seed=self._seed,
            )
        )
        count, temperature = config.teacher_logits, config.temperature
        held = range(config.held_out)
        self._held_out = self._add(logits_planned(variant, self._text, HELD_OUT, held, count, temperature))
        if LREC in config.phases:
            self._teachers = [
                self._add(logits_planned(variant, self._text, TRAINED, run, count, temperature)) for run in self._runs()
            ]

    def add_start(self) -> None:
        """The closed-form start, behind Hessians of full-precision inputs: the base's own where it made some."""
        kind = "calibration.hessians"
        hessians = [f"@{at}" for at, step in enumerate(self.steps) if step.kind == kind]
        if not hessians:
            at = len(self.steps)
            more = calibration_planned(self._sampling, self._source, at, self._seed, self._blocks, hessians=True)
            hessians = [self._add(step) for step in more][1:]
        named = {f"hessians-{at:05d}": digest for at, digest in enumerate(hessians)}
        self._start = self._add(
            PlannedStep(
                name="closed-form start",
                kind="int21.start",
                group="start",
                params={"config": asdict(self._config)},
                inputs={"variant": self._source["variant"], "packed": self._packed, **named},
            )
        )

    def add_training(self) -> None:
        previous: dict[str, str] = {"start": self._start} if self._start else {}
        chunks = list(self._chunks())
        for number, (phase, first, last, window) in enumerate(chunks):
            teacher = {"teacher": self._teachers[window // self._stride]} if phase == LREC else {}
            self._last = self._add(
                PlannedStep(
                    name=f"{phase} steps {first + 1} to {last}",
                    kind="int21.train",
                    group="train",
                    params={
                        "config": asdict(self._config),
                        "phase": phase,
                        "first": first,
                        "last": last,
                        "total": self._steps * self._config.epochs,
                        "window": window,
                        "final": number == len(chunks) - 1,
                    },
                    inputs={
                        "packed": self._packed,
                        "text": self._text,
                        "held_out": self._held_out,
                        **teacher,
                        **previous,
                    },
                    seed=self._seed,
                )
            )
            previous = {"previous": self._last}

    def add_assembly(self) -> None:
        start = {"start": self._start} if self._start else {}
        self._add(
            PlannedStep(
                name="assemble",
                kind="int21.assemble",
                group="assemble",
                params={"config": asdict(self._config)},
                inputs={
                    "variant": self._source["variant"],
                    "packed": self._packed,
                    "text": self._text,
                    "trained": self._last,
                    **start,
                },
                seed=self._seed,
            )
        )

    @property
    def _steps(self) -> int:
        """Optimizer steps of one reading of the text."""
        return self._config.windows // self._config.batch_size

    @property
    def _stride(self) -> int:
        """Windows of a chunk."""
        return self._config.chunk_steps * self._config.batch_size

    def _runs(self) -> Iterator[range]:
        for start in range(0, self._config.windows, self._stride):
            yield range(start, min(start + self._stride, self._config.windows))

    def _chunks(self) -> Iterator[tuple[str, int, int, int]]:
        """Phase, first and last optimizer step, first window: a chunk never crosses the end of the text."""
        size = self._config.batch_size
        for phase in self._config.phases:
            for epoch in range(self._config.epochs):
                for run in self._runs():
                    first = epoch * self._steps + run.start // size
                    yield phase, first, first + len(run) // size, run.start

    def _add(self, step: PlannedStep) -> str:
        self.steps.append(step)
        return f"@{len(self.steps) - 1}"


def assemble_step(context: StepContext) -> StepOutput:
    """Every file of the base as it is, the adapter beside it, and the manifest."""
    config = Int21Config(**context.spec.params["config"])
    base = packed_base(context)
    said = base_method.layout_of(base, config)
    table = base.manifest["tensors"]
    places = base_method.adapted(base)
    lines = {
        name: {**entry, "rank": config.rank} if name in places else entry
        for name, entry in table.items()
        if entry["kind"] != "raw"
    }
    files = {name: entry["sha256"] for name, entry in base.manifest["files"].items()}
    side = {name: files[name] for name in base.manifest["side_files"]}
    adapter = _adapter_files(context, config, base, said["packed_base"])
    weigh = layout.weighing(weigh_of(config.base_method), layout.ITEM_BYTES[config.adapter_dtype])
    made = figures.made(context, config, base, lines, weigh)
    parcel = Parcel(
        method=METHOD,
        layout=said,
        lines=lines,
        rest=StepOutput(data={"raw": {name: one["part"] for name, one in table.items() if one["kind"] == "raw"}}),
        blobs={name: digest for name, digest in files.items() if name not in side} | adapter,
        figures=made,
        weigh=weigh,
        name_hint=f"{METHOD}-{config.num_bits}bit-r{config.rank}",
        libraries=("peft",),
        nominal_ratio=six_digits(made["overhead"]["linears"]["codes_ratio"]),
        own_side=side,
    )
    return assemble(context, parcel)


def _adapter_files(context: StepContext, config: Int21Config, base: Artifact, digest: str) -> dict[str, str]:
    """``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT names and reads them, by digest."""
    from compression_worker.methods.int21.adapter import config_file, stored

    places = base_method.adapted(base)
    transposed = [bool(base.manifest["tensors"][name].get("transposed")) for name in places]
    others = [path for path, _ in build(base.config).named_modules() if path not in set(places.values())]
    said = config_file(places.values(), others, rank=config.rank, alpha=config.lora_alpha, transposed=any(transposed))
    state = context.input("trained").blobs[STATE_FILE]
    return {
        CONFIG_FILE: context.store.write_bytes(said),
        WEIGHTS_FILE: stored(context, state, list(places.values()), config.adapter_dtype, digest),
    }
