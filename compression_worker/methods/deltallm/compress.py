"""DeltaLLM (arXiv:2501.18596): layers that share the weights of an earlier one, each with a low-rank difference.

No code was published, and the text names neither ranks nor schedules nor how layers are grouped: what is ours is said
where it stands.

A job is the list of steps that :func:`plan_step` makes: those of a packed base where there is one, the text in windows,
answers of the whole model, rounds of choosing who follows whom, chunks of training in a chain, and the assembly. How
many follow is arithmetic; which ones is measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields

from compression_worker.adapters import lora_names
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.beneath import base_of, planned, weigh_of
from compression_worker.making.blobs import read_blob
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import RAW_FILE, raw_entry
from compression_worker.methods.deltallm import figures, layout
from compression_worker.methods.deltallm.choosing import pair_file, read_factors
from compression_worker.methods.deltallm.config import SIGN, DeltaLLMConfig
from compression_worker.methods.deltallm.differences import Pieces
from compression_worker.methods.deltallm.groups import Budget, Depth, Round, spread
from compression_worker.methods.deltallm.matrices import shareable, unshared
from compression_worker.methods.deltallm.merge import load_model, load_packed, open_merged
from compression_worker.methods.deltallm.sizing import depth_of, size_of
from compression_worker.methods.deltallm.sources import base_input
from compression_worker.methods.deltallm.stored import Deltas, base_files, raw_file, raw_parts
from compression_worker.methods.deltallm.training import STATE_FILE
from compression_worker.quantization.calibration import Sampling
from compression_worker.quantization.calibration import planned as calibration_planned
from compression_worker.quantization.rest import checked_source, loadable
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
    depth = depth_of(config, len(layers.blocks), layers.alike)
    size = size_of(config, depth, layers.sides, checkpoint.manifest["parameters"])
    context.log(f"{_words(config, size)} of {depth.blocks} blocks", "info")
    beneath = planned(context, config.base_method, config.base_config()).steps if config.quantizes else ()
    plan = _Plan(context, config, depth, size, beneath)
    plan.add_text_and_teacher()
    if config.start == "svd_covariance":
        plan.add_hessians()
    plan.add_choice()
    plan.add_training()
    plan.add_assembly()
    data = {"layers": depth.blocks, "followers": size.followers, "rank": size.rank}
    return StepOutput(data=data, steps=tuple(plan.steps))


def _words(config: DeltaLLMConfig, size: Budget) -> str:
    """``4 followers at rank 64``, and how many are left out."""
    how = "by signs" if config.share_form == SIGN else f"at rank {spread(size.rank, size.ranks.values(), ' to ')}"
    found = [f"{sharing} followers {how}"] if (sharing := size.followers - size.left_out) else []
    return " and ".join([*found, *([f"{size.left_out} left out"] if size.left_out else [])])


def parse_config(value: Json) -> DeltaLLMConfig:
    """The config that a form or the command line gave; refuses settings that DeltaLLM does not have."""
    known = {field.name for field in fields(DeltaLLMConfig)}
    if unknown := sorted(value.keys() - known):
        raise CompressionError(
            "bad_setting", f"DeltaLLM has no setting '{unknown[0]}'; known: {', '.join(sorted(known))}"
        )
    return DeltaLLMConfig(**value)


class _Plan:
    """The steps of a job, behind those of a packed base where there is one; its last step makes the base's artifact."""

    def __init__(
        self,
        context: StepContext,
        config: DeltaLLMConfig,
        depth: Depth,
        size: Budget,
        beneath: Sequence[PlannedStep],
    ) -> None:
        self.steps = list(beneath)
        self._context, self._config, self._depth, self._size = context, config, depth, size
        self._seed = context.spec.seed
        self._source = {name: context.spec.inputs[name] for name in ("variant", "calibration")}
        packed = {"packed": f"@{len(self.steps) - 1}"} if beneath else {}
        self._model = {"variant": self._source["variant"], **packed}
        checkpoint = opened(context, "variant")
        self._length = window_length(context, checkpoint, config.window_tokens)
        self._sampling = Sampling(samples=config.samples, length=window_length(context, checkpoint, config.length))
        self._hessians: dict[str, str] = {}
        self._chosen = self._trained = ""
        self._stride = config.chunk_steps * config.batch_size

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
        self._teachers = [
            self._add(logits_planned(variant, self._text, TRAINED, run, count, 1.0)) for run in self._runs()
        ]

    def add_hessians(self) -> None:
        """Hessians of the inputs of every linear, which weigh how a difference begins; a base may have made them."""
        found = [f"@{at}" for at, step in enumerate(self.steps) if step.kind == "calibration.hessians"]
        if not found:
            at = len(self.steps)
            more = calibration_planned(self._sampling, self._source, at, self._seed, self._depth.blocks, hessians=True)
            found = [self._add(step) for step in more][1:]
        self._hessians = {f"hessians-{at:05d}": digest for at, digest in enumerate(found)}

    def add_choice(self) -> None:
        config, depth = self._config, self._depth
        rounds = [Round(0, self._size.followers)] if config.by_hand else self._size.rounds(config.picks_per_round)
        for number, one in enumerate(rounds, start=1):
            final = number == len(rounds)
            inputs = {**self._model, "text": self._text, **self._hessians}
            if not config.by_hand:
                inputs["teacher"] = self._measured
            inputs |= {"previous": self._chosen} if self._chosen else {}
            inputs |= {"held_out": self._held_out} if final else {}
            self._chosen = self._add(
                PlannedStep(
                    name="groups by hand" if config.by_hand else f"choose followers, round {number} of {len(rounds)}",
                    kind="deltallm.choose",
                    group="choose",
                    params={
                        **self._settings(),
                        **({"rank": 0, "leaves_out": True} if one.leaves_out else {}),
                        "by_hand": {str(block): anchor for block, anchor in config.by_hand.items()},
                        "blocks": depth.blocks,
                        "alike": list(depth.alike),
                        "protect": {"protect_first": depth.protect_first, "protect_last": depth.protect_last},
                        "count": one.count,
                        "still": one.still,
                        "final": final,
                    },
                    inputs=inputs,
                    seed=self._seed,
                )
            )

    def add_training(self) -> None:
        """Nothing learns where every follower is left out and nothing else is trained."""
        learns = self._size.followers > self._size.left_out or self._config.tunes_others
        if self._config.tokens and not learns:
            self._context.log(
                "no follower keeps a difference, so there is nothing to train: set train=deltas_lora to have the "
                "other blocks make up for those that are left out",
                "warning",
            )
        chunks = list(self._chunks()) if learns else []
        for number, (first, last, window) in enumerate(chunks):
            previous = {"previous": self._trained} if self._trained else {}
            self._trained = self._add(
                PlannedStep(
                    name=f"train, steps {first + 1} to {last}",
                    kind="deltallm.train",
                    group="train",
                    params={
                        **self._settings(),
                        "first": first,
                        "last": last,
                        "total": self._config.steps * self._config.epochs,
                        "window": window,
                        "final": number == len(chunks) - 1,
                    },
                    inputs={
                        **self._model,
                        "text": self._text,
                        "held_out": self._held_out,
                        "teacher": self._teachers[window // self._stride],
                        "chosen": self._chosen,
                        **previous,
                    },
                    seed=self._seed,
                )
            )

    def _runs(self) -> Iterator[range]:
        for start in range(0, self._config.windows, self._stride):
            yield range(start, min(start + self._stride, self._config.windows))

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        """First and last optimizer step, first window: a chunk never crosses the end of the text."""
        size = self._config.batch_size
        for epoch in range(self._config.epochs):
            for run in self._runs():
                first = epoch * self._config.steps + run.start // size
                yield first, first + len(run) // size, run.start

    def add_assembly(self) -> None:
        trained = {"trained": self._trained} if self._trained else {}
        self._add(
            PlannedStep(
                name="assemble",
                kind="deltallm.assemble",
                group="assemble",
                params=self._settings(),
                inputs={**self._model, "text": self._text, "chosen": self._chosen, **trained},
                seed=self._seed,
            )
        )

    def _settings(self) -> Json:
        ranks = {str(follower): rank for follower, rank in self._size.ranks.items()}
        return {"config": asdict(self._config), "rank": self._size.rank, **({"group_ranks": ranks} if ranks else {})}

    def _add(self, step: PlannedStep) -> str:
        self.steps.append(step)
        return f"@{len(self.steps) - 1}"


def assemble_step(context: StepContext) -> StepOutput:
    """What is left of the checkpoint or of its packed base, the factors beside it, and the manifest."""
    config = DeltaLLMConfig(**context.spec.params["config"])
    checkpoint, base = opened(context, "variant"), base_input(context)
    architecture = architecture_of(checkpoint)
    groups = {int(one): anchor for one, anchor in context.input("chosen").data["groups"].items()}
    layers = shareable(checkpoint.manifest["config"], architecture, config.kinds)
    deltas = Deltas(context, config, layers.pairs(groups), _factors(context, groups, config.share_form))
    lines = deltas.lines
    if base is None:
        raw = raw_parts(context, architecture.parts, lines)
        tuned = _adapters(context, config, layers.taken(groups, context.input("chosen").data.get("left_out", [])))
        digest, changes = raw_file(context, raw, tuned)
        blobs = {RAW_FILE: digest}
        own = _raw_lines(checkpoint, {name: raw.pop(name) for name in changes})
        lines = lines | {name: {**own[name], "sha256": sha} for name, (sha, _) in changes.items()}
        deltas.errors |= {name: error for name, (_, error) in changes.items()}
    else:
        table = base.manifest["tensors"]
        raw = {name: entry["part"] for name, entry in table.items() if entry["kind"] == "raw"}
        lines = {name: entry for name, entry in table.items() if entry["kind"] != "raw"} | lines
        blobs = base_files(context, base, deltas.lines)
    weigh = layout.weighing(weigh_of(config.base_method) if base else None)
    made = figures.made(context, config, {**_raw_lines(checkpoint, raw), **lines}, deltas.errors, deltas.scales, weigh)
    parcel = Parcel(
        method=METHOD,
        layout=layout.layout(base_of(base) if base else None, config.share_form),
        lines=lines,
        rest=StepOutput(data={"raw": raw}),
        blobs={**blobs, layout.DELTAS_FILE: deltas.digest},
        figures=made,
        weigh=weigh,
        name_hint=f"{METHOD}-{_count_hint(context)}"
        + _rank_hint(context.spec.params)
        + (f"-{config.num_bits}bit" if base else ""),
        nominal_ratio=made["linears"]["true_ratio"],
        own_side=_readable(context, lines, raw, blobs[RAW_FILE]),
    )
    return assemble(context, parcel)


def _count_hint(context: StepContext) -> str:
    """``4shared``, ``4shared-2out`` or ``2out``."""
    chosen = context.input("chosen").data
    gone = len(chosen.get("left_out", []))
    counts = {"shared": len(chosen["groups"]) - gone, "out": gone}
    return "-".join(f"{count}{what}" for what, count in counts.items() if count)


def _rank_hint(params: Json) -> str:
    """``-r64``, ``-r32-64`` or ``-sign``; nothing where all are left out."""
    if params["config"]["share_form"] == SIGN:
        return f"-{SIGN}"
    return f"-r{spread(params['rank'], params.get('group_ranks', {}).values(), '-')}" if params["rank"] else ""


def _readable(context: StepContext, lines: Mapping[str, Json], raw: Mapping[str, str], digest: str) -> dict[str, str]:
    """The files that make transformers load the artifact, which reads what is stored as it is by itself."""
    said = {"quant_method": layout.QUANT_METHOD, "rank": context.spec.params["rank"]}
    names = [*raw, *(name for name, entry in lines.items() if entry["kind"] == "raw")]
    return loadable(context, said, names, {}, context.store.size(digest))


def _raw_lines(checkpoint: Checkpoint, parts: Mapping[str, str]) -> dict[str, Json]:
    theirs = checkpoint.manifest["tensors"]
    return {
        name: raw_entry(Spec(theirs[name]["dtype"], tuple(theirs[name]["shape"])), part, theirs[name]["sha256"])
        for name, part in parts.items()
    }


def _adapters(context: StepContext, config: DeltaLLMConfig, taken: Collection[str]) -> dict[str, Pieces]:
    """Name -> ``A`` and ``B`` of linears that learned beside ``taken`` weights; ``B A`` lies as the weight does."""
    if not config.tunes_others:
        return {}
    checkpoint = opened(context, "variant")
    state = read_blob(context, context.input("trained").blobs[STATE_FILE])
    others = unshared(checkpoint.manifest["config"], architecture_of(checkpoint), taken)
    lying = {linear.name for linear in architecture_of(checkpoint).linears() if linear.transposed}
    found = {}
    for name, (path, _) in others.items():
        a, b = (state[one] for one in lora_names(path))
        found[name] = (b.T, a.T) if name in lying else (a, b)
    return found


def _factors(context: StepContext, groups: Mapping[int, int], form: str) -> dict[str, Pieces]:
    """Of every shared weight by name, as they are to be stored."""
    found: dict[str, Pieces] = {}
    blobs = context.input("chosen").blobs
    for follower, anchor in groups.items():
        found |= read_factors(context, blobs[pair_file(follower, anchor)], form)
    if "trained" in context.spec.inputs:
        state = read_blob(context, context.input("trained").blobs[STATE_FILE])
        for name, pieces in found.items():  # signs do not learn
            found[name] = tuple(state.get(key, one) for key, one in zip(layout.keys(name, form), pieces, strict=True))
    return found
