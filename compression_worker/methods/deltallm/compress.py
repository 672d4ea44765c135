"""DeltaLLM (arXiv:2501.18596): layers that share the weights of an earlier one, each with a low-rank difference.

No code was published, and the text names neither ranks nor schedules nor how layers are grouped: what is ours is said
where it stands.

A job is the list of steps that :func:`plan_step` makes: the text in windows, answers of the whole model, rounds of
choosing who follows whom, and the assembly. How many follow is arithmetic; which ones is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields

from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import raw_entry
from compression_worker.methods.deltallm import figures, layout
from compression_worker.methods.deltallm.choosing import pair_file, read_factors
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.groups import Budget, Depth, budget, check_rank, rounds
from compression_worker.methods.deltallm.matrices import Shareable, shareable
from compression_worker.methods.deltallm.merge import load_model, load_packed, open_merged
from compression_worker.methods.deltallm.stored import Stored
from compression_worker.methods.deltallm.student import Factors
from compression_worker.quantization.calibration import Sampling
from compression_worker.quantization.calibration import planned as calibration_planned
from compression_worker.quantization.rest import checked_source
from compression_worker.quantization.teacher import HELD_OUT, TRAINED, logits_planned, text_planned
from compression_worker.quantization.windows import window_length
from compression_worker.tensors import Spec

__all__ = ["assemble_step", "load_model", "load_packed", "open_merged", "plan_step"]

METHOD = "deltallm"


def plan_step(context: StepContext) -> StepOutput:
    """Check the model against the settings and list the steps. Reads no weight."""
    config = parse_config(context.spec.params["config"])
    if "calibration" not in context.spec.inputs:
        raise CompressionError("no_calibration", "DeltaLLM reads a text to choose layers by: give a text set")
    checkpoint = opened(context, "variant")
    architecture = checked_source(checkpoint)
    layers = shareable(checkpoint.manifest["config"], architecture, config.kinds)
    depth = Depth(
        blocks=len(layers.blocks),
        alike=layers.alike,
        protect_first=config.protect_first,
        protect_last=config.protect_last,
    )
    size = _budget(config, depth, layers, checkpoint.manifest["parameters"])
    context.log(f"{size.followers} of {depth.blocks} blocks follow another, at rank {size.rank}", "info")
    plan = _Plan(context, config, depth, size)
    plan.add_text_and_teacher()
    if config.start == "svd_covariance":
        plan.add_hessians()
    plan.add_choice()
    plan.add_assembly()
    data = {"layers": depth.blocks, "followers": size.followers, "rank": size.rank}
    return StepOutput(data=data, steps=tuple(plan.steps))


def parse_config(value: Json) -> DeltaLLMConfig:
    """The config that a form or the command line gave; refuses settings that DeltaLLM does not have."""
    known = {field.name for field in fields(DeltaLLMConfig)}
    if unknown := sorted(value.keys() - known):
        raise CompressionError(
            "bad_setting", f"DeltaLLM has no setting '{unknown[0]}'; known: {', '.join(sorted(known))}"
        )
    return DeltaLLMConfig(**value)


def _budget(config: DeltaLLMConfig, depth: Depth, layers: Shareable, parameters: int) -> Budget:
    """How many blocks follow and at what rank; given by hand, or as the target takes."""
    if by_hand := config.by_hand:
        depth.check(by_hand)
        check_rank(layers.sides, config.rank)
        return Budget(len(by_hand), config.rank)
    return budget(
        layers.sides,
        parameters,
        depth,
        target=config.target_reduction,
        followers=config.followers,
        rank=config.rank,
    )


class _Plan:
    """The steps of a job, one behind another."""

    def __init__(self, context: StepContext, config: DeltaLLMConfig, depth: Depth, size: Budget) -> None:
        self.steps: list[PlannedStep] = []
        self._config, self._depth, self._size = config, depth, size
        self._seed = context.spec.seed
        self._source = {name: context.spec.inputs[name] for name in ("variant", "calibration")}
        checkpoint = opened(context, "variant")
        self._length = window_length(context, checkpoint, config.window_tokens)
        self._sampling = Sampling(samples=config.samples, length=window_length(context, checkpoint, config.length))
        self._hessians: dict[str, str] = {}
        self._chosen = ""

    def add_text_and_teacher(self) -> None:
        config, variant = self._config, self._source["variant"]
        self._text = self._add(
            text_planned(
                self._source,
                windows=config.text_windows,
                length=self._length,
                held_out=config.held_out,
                seed=self._seed,
            )
        )
        count = config.teacher_logits
        self._held_out = self._add(logits_planned(variant, self._text, HELD_OUT, range(config.held_out), count, 1.0))
        if not config.by_hand:
            run = range(config.measure_windows)
            self._measured = self._add(logits_planned(variant, self._text, TRAINED, run, count, 1.0))

    def add_hessians(self) -> None:
        """Hessians of the inputs of every linear, which weigh how a difference begins."""
        more = calibration_planned(
            self._sampling, self._source, len(self.steps), self._seed, self._depth.blocks, hessians=True
        )
        found = [self._add(step) for step in more][1:]
        self._hessians = {f"hessians-{at:05d}": digest for at, digest in enumerate(found)}

    def add_choice(self) -> None:
        config, depth = self._config, self._depth
        counts = [0] if config.by_hand else rounds(self._size.followers, config.picks_per_round)
        still = self._size.followers
        for number, count in enumerate(counts, start=1):
            final = number == len(counts)
            inputs = {"variant": self._source["variant"], "text": self._text, **self._hessians}
            if not config.by_hand:
                inputs["teacher"] = self._measured
            inputs |= {"previous": self._chosen} if self._chosen else {}
            inputs |= {"held_out": self._held_out} if final else {}
            self._chosen = self._add(
                PlannedStep(
                    name="groups by hand" if config.by_hand else f"choose followers, round {number} of {len(counts)}",
                    kind="deltallm.choose",
                    group="choose",
                    params={
                        **self._settings(),
                        "by_hand": {str(one): anchor for one, anchor in config.by_hand.items()},
                        "blocks": depth.blocks,
                        "alike": list(depth.alike),
                        "protect": {"protect_first": depth.protect_first, "protect_last": depth.protect_last},
                        "count": count,
                        "still": still,
                        "final": final,
                    },
                    inputs=inputs,
                    seed=self._seed,
                )
            )
            still -= count

    def add_assembly(self) -> None:
        self._add(
            PlannedStep(
                name="assemble",
                kind="deltallm.assemble",
                group="assemble",
                params=self._settings(),
                inputs={"variant": self._source["variant"], "text": self._text, "chosen": self._chosen},
                seed=self._seed,
            )
        )

    def _settings(self) -> Json:
        return {"config": asdict(self._config), "rank": self._size.rank}

    def _add(self, step: PlannedStep) -> str:
        self.steps.append(step)
        return f"@{len(self.steps) - 1}"


def assemble_step(context: StepContext) -> StepOutput:
    """The weights that are left, the factors beside them, and the manifest."""
    config = DeltaLLMConfig(**context.spec.params["config"])
    checkpoint = opened(context, "variant")
    architecture = architecture_of(checkpoint)
    layers = shareable(checkpoint.manifest["config"], architecture, config.kinds)
    groups = {int(one): anchor for one, anchor in context.input("chosen").data["groups"].items()}
    stored = Stored(context, config, layers.pairs(groups))
    blobs = {layout.DELTAS_FILE: stored.deltas(_factors(context, groups)), **stored.rest(architecture.parts)}
    theirs = checkpoint.manifest["tensors"]
    raw = {
        name: raw_entry(Spec(theirs[name]["dtype"], tuple(theirs[name]["shape"])), part, theirs[name]["sha256"])
        for name, part in stored.raw.items()
    }
    linears = [linear.name for linear in architecture.linears()]
    parcel = Parcel(
        method=METHOD,
        layout=layout.layout(),
        lines=stored.lines,
        rest=StepOutput(data={"raw": stored.raw}),
        blobs=blobs,
        figures=figures.made(context, {**raw, **stored.lines}, stored.errors, linears),
        weigh=layout.weigh,
        name_hint=f"{METHOD}-{len(groups)}x-r{context.spec.params['rank']}",
    )
    return assemble(context, parcel)


def _factors(context: StepContext, groups: Mapping[int, int]) -> dict[str, Factors]:
    """Of every shared weight by name, as they are to be stored."""
    found: dict[str, Factors] = {}
    blobs = context.input("chosen").blobs
    for follower, anchor in groups.items():
        found |= read_factors(context, blobs[pair_file(follower, anchor)])
    return found
