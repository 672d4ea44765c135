"""GPTQ (arXiv:2210.17323): every block linear on a uniform grid, each rounding error fed into what is rounded later.

Beyond the paper: grids of groups are fixed before the columns are ordered, so that ordering costs a runtime nothing;
ranges are searched by how much each input matters; damping is raised where a Hessian needs it, and the report says so.

A job is the list of steps that :func:`plan_step` makes: the calibration text, runs of blocks (one after another,
because each sees what the quantized ones before it make, unless ``inputs`` is ``full``), the rest, and the assembly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields

import torch

from compression_worker.architecture import Architecture, Linear
from compression_worker.artifact import Artifact
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.inputs import opened
from compression_worker.making.table import codes_file, six_digits
from compression_worker.methods.gptq import layout
from compression_worker.methods.gptq.config import PER_ROW, GPTQConfig
from compression_worker.methods.gptq.merge import GridTensors, load_model, load_packed
from compression_worker.methods.gptq.quantize import quantize, report
from compression_worker.quantization.blocks import Block, BlockRunner, Group, split
from compression_worker.quantization.calibration import (
    HIDDEN_FILE,
    STEPS,
    Hessians,
    HiddenStates,
    Moments,
    Sampling,
    hidden_input,
    keep_hidden,
    planned,
)
from compression_worker.quantization.rest import TRANSFORMERS, checked_source, loadable, rest_planned
from compression_worker.quantization.windows import window_length
from compression_worker.tensors import write_file

__all__ = ["assemble_step", "layers_step", "load_model", "load_packed", "open_merged", "plan_step"]

METHOD = "gptq"


def plan_step(context: StepContext) -> StepOutput:
    """Check the model against the settings and list the steps. Reads no weight."""
    inputs = dict(context.spec.inputs)
    config = parse_config(context.spec.params["config"])
    if config.calibrates and "calibration" not in inputs:
        raise CompressionError(
            "no_calibration", "GPTQ reads a calibration text: give a text set, or set calibration=generations"
        )
    source = {"variant": inputs["variant"]}
    if config.calibrates:
        source["calibration"] = inputs["calibration"]
    checkpoint = opened(context, "variant")
    architecture = checked_source(checkpoint)
    size = layout.group_size_of(config, architecture.linears())
    if config.group_size is None:
        words = "whole rows" if size == PER_ROW else f"{size} inputs"
        context.log(f"a group is {words}", "info")
    blocks = len(architecture.blocks)
    full = config.inputs == "full"
    sampling = Sampling(samples=config.samples, length=window_length(context, checkpoint, config.length))
    steps = planned(sampling, source, 0, context.spec.seed, blocks, hessians=full)
    steps += _layers(config, architecture, source["variant"], len(steps), size)
    layers = {f"layers-{at:05d}": f"@{at}" for at, step in enumerate(steps) if step.kind == "gptq.layers"}
    steps.append(rest_planned(source["variant"], architecture.parts))
    steps.append(
        PlannedStep(
            name="assemble",
            kind="gptq.assemble",
            group="assemble",
            params={"config": asdict(config), "group_size": size},
            inputs={"variant": source["variant"], "text": "@0", "rest": f"@{len(steps) - 1}"} | layers,
            seed=context.spec.seed,
        )
    )
    return StepOutput(data={"layers": blocks, "linears": sum(1 for _ in architecture.linears())}, steps=tuple(steps))


def parse_config(value: Json) -> GPTQConfig:
    """The config that a form or the command line gave; refuses settings that GPTQ does not have."""
    known = {field.name for field in fields(GPTQConfig)}
    if unknown := sorted(value.keys() - known):
        raise CompressionError("bad_setting", f"GPTQ has no setting '{unknown[0]}'; known: {', '.join(sorted(known))}")
    return GPTQConfig(**value)


def layers_step(context: StepContext) -> StepOutput:
    """Codes of some blocks, and the hidden states behind the last of them."""
    params = context.spec.params
    work = _Work(context, GPTQConfig(**params["config"]), params["group_size"])
    blobs: dict[str, str] = {}
    last = params["first"] + params["count"]
    with BlockRunner(opened(context, "variant"), context.device) as runner, work.states() as states:
        for index in range(params["first"], last):
            with runner.block(index) as block:
                tensors = work.quantized(block, states)
            with context.store.writer() as blob:
                write_file(blob, tensors, TRANSFORMERS)
            blobs[codes_file(index)] = blob.digest
            context.progress(index - params["first"] + 1, params["count"], "blocks")
        if states is not None and last < len(runner):
            blobs[HIDDEN_FILE] = keep_hidden(context, states)
    return StepOutput(blobs=blobs, data={"linears": work.lines})


def assemble_step(context: StepContext) -> StepOutput:
    """Put the artifact together: config.json and index for transformers, and the manifest."""
    params = context.spec.params
    config = GPTQConfig(**params["config"])
    layers = [context.input(name) for name in sorted(context.spec.inputs) if name.startswith("layers-")]
    rest = context.input("rest")
    lines = {name: line for layer in layers for name, line in layer.data["linears"].items()}
    theirs = opened(context, "variant").manifest["tensors"]
    table = {
        name: layout.grid_entry(Linear(**line["linear"]), theirs[name]["dtype"], line) for name, line in lines.items()
    }
    blobs = {name: digest for layer in layers for name, digest in layer.blobs.items() if name != HIDDEN_FILE}
    blobs |= rest.blobs
    parcel = Parcel(
        method=METHOD,
        layout=layout.LAYOUT,
        lines=table,
        rest=rest,
        blobs=blobs,
        figures=_figures(context, lines, table),
        weigh=layout.weigh,
        name_hint=f"{METHOD}-{config.num_bits}bit" + (f"-g{params['group_size']}" if params["group_size"] > 0 else ""),
        own_side=_readable(context, config, table, rest, blobs),
    )
    return assemble(context, parcel)


def open_merged(base: object, artifact: Artifact) -> GridTensors:
    """The tensors of the compressed model, for a restore."""
    return GridTensors(artifact)


class _Work:
    """What the blocks of one step share."""

    def __init__(self, context: StepContext, config: GPTQConfig, group_size: int) -> None:
        self.lines: dict[str, Json] = {}
        self._context = context
        self._config = config
        self._group_size = group_size
        fingerprint = opened(context, "variant").fingerprint
        self._hessians = Hessians(context, fingerprint) if config.inputs == "full" else None

    def states(self) -> HiddenStates:
        """What goes into the first block; one row that stands for nothing where the Hessians are there already."""
        return hidden_input(self._context)

    def quantized(self, block: Block, states: HiddenStates) -> Json:
        """The tensors of a block's file; ``states`` come out of the quantized block afterwards."""
        device = self._context.device
        found: Json = {}
        for stage in self._stages(block.groups(states.read(range(1), device))):
            moments = None if self._hessians else _seen(block, stage, states, device)
            for group in stage:
                found |= self._group(block, group, moments)
        if self._hessians is None:
            for windows in states.batches():
                with torch.no_grad():
                    states.write(windows, block(states.read(windows, device)))
        return dict(sorted(found.items()))

    def _stages(self, groups: list[Group]) -> Iterator[list[Group]]:
        if not self._config.true_sequential or self._hessians:
            yield groups
            return
        for stage in sorted({group.stage for group in groups}):
            yield [group for group in groups if group.stage == stage]

    def _group(self, block: Block, group: Group, moments: Moments | None) -> Json:
        """Quantize the matrices of one group in one go, put them into the block, and keep their tensors and lines."""
        hessian, rows, origin = self._hessian(group, moments)
        if origin != "own":
            self._context.log(f"'{group.name}' saw {rows} rows of its own kind: its Hessian is {origin}", "warning")
        weight = torch.cat([block.weight(linear) for linear in group.linears]).T.contiguous()
        size = self._group_size if self._group_size != PER_ROW else group.inputs
        made = quantize(weight, hessian, self._config, size)
        if made.damping != self._config.damping:
            words = f"damping {made.damping:g}" if made.damping else "plain rounding"
            self._context.log(f"the Hessian of '{group.name}' is singular: {words} was used", "warning")
        found: Json = {}
        first = 0
        for linear in group.linears:
            own = slice(first, first + linear.outputs)
            first += linear.outputs
            block.set_weight(linear, made.values[:, own].T)
            codes = made.codes[:, own]
            figures = report(weight[:, own], made.values[:, own], hessian, codes, made.grids.most)
            less = int(self._config.checkpoint_format == "gptq")
            grids = made.grids
            packed = layout.pieces(
                codes.cpu(), grids.scales[:, own].cpu(), grids.zeros[:, own].cpu(), grids.bits, size, less
            )
            found |= layout.stored(linear.name, packed)
            self.lines[linear.name] = {
                "linear": asdict(linear),
                "bits": grids.bits,
                "groups": len(grids.scales),
                "sha256": layout.digest(packed),
                "damping": made.damping,
                "rows": rows,
                "origin": origin,
                **figures,
            }
        return found

    def _hessian(self, group: Group, moments: Moments | None) -> tuple[torch.Tensor, int, str]:
        if moments is not None:
            return moments.hessian(group)
        assert self._hessians is not None
        line = self._hessians.line(group.name)
        return self._hessians.of(group.name).to(self._context.device), line["rows"], line["origin"]


def _seen(block: Block, stage: list[Group], states: HiddenStates, device: str) -> Moments:
    moments = Moments(stage, device)
    for windows in states.batches():
        block.see(stage, states.read(windows, device), moments.take, stop=True)
    return moments


def _layers(
    config: GPTQConfig, architecture: Architecture, variant: str, at: int, group_size: int
) -> Iterator[PlannedStep]:
    """Runs of blocks: a chain behind the quantized blocks, or each on its own behind the Hessians of all."""
    full = config.inputs == "full"
    for number, run in enumerate(split(len(architecture.blocks), STEPS)):
        inputs = {"variant": variant, "hidden": f"@{0 if full or not number else at + number - 1}"}
        if full:
            inputs["hessians"] = f"@{1 + number}"
        yield PlannedStep(
            name=f"blocks {run.start} to {run.stop - 1}",
            kind="gptq.layers",
            group="layer",
            params={
                "config": asdict(config),
                "group_size": group_size,
                "first": run.start,
                "count": len(run),
            },
            inputs=inputs,
        )


def _readable(
    context: StepContext, config: GPTQConfig, table: dict[str, Json], rest: StepOutput, blobs: dict[str, str]
) -> dict[str, str]:
    """The files that make transformers load the artifact; none where a matrix had to be padded."""
    whole = all(side % layout.SIDE == 0 for entry in table.values() for side in entry["shape"])
    if not whole:
        context.log(
            "sides that are no multiples of 32 were padded: other runtimes will not read the artifact", "warning"
        )
        return {}
    coded = {f"{layout.stem(name)}.{piece}": entry["file"] for name, entry in table.items() for piece in layout.PIECES}
    said = layout.quantization_config(config, context.spec.params["group_size"])
    size = sum(context.store.size(digest) for digest in blobs.values())
    return loadable(context, said, rest.data["raw"], coded, size)


def _figures(context: StepContext, lines: dict[str, Json], table: dict[str, Json]) -> Json:
    """The matrices one by one, the text that was read, and the bits of the linears alone."""
    matrices = []
    stored_bytes = weights = whole = 0
    for name, line in lines.items():
        by_part, count = layout.weigh(table[name])
        size = sum(by_part.values())
        stored_bytes, weights, whole = stored_bytes + size, weights + count, whole + layout.whole_bytes(table[name])
        kept = ("proxy_loss", "relative_error", "at_ends", "damping", "rows", "origin", "bits")
        groups = "whole rows" if line["groups"] == 1 else f"{line['groups']} groups"
        matrices.append(
            {"name": name, "coding": f"{line['bits']} bits, {groups}", "bytes": size} | {key: line[key] for key in kept}
        )
    return {
        "matrices": matrices,
        "calibration": context.input("text").data,
        "linears": {
            "bits_per_weight": six_digits(8 * stored_bytes / weights),
            "true_ratio": six_digits(whole / stored_bytes),
        },
    }
