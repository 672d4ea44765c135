"""QuIP# (arXiv:2402.04396): 2, 3 or 4 bits a weight of every block linear, in an artifact that stands alone.

Notation and equations: :mod:`.rotation`, :mod:`.quantize`, and :mod:`compression_worker.quantization.rounding`.

A job is the list of steps that :func:`plan_step` makes: the shared ones that read the calibration text and make
Hessians, a step for each run of blocks that codes them, one for the rest, fine-tuning where it is asked for, and the
assembly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from functools import partial

import torch

from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import codes_file, relative_error, six_digits
from compression_worker.making.threads import each, one_thread_per_operation
from compression_worker.methods.quip_sharp import layout
from compression_worker.methods.quip_sharp.config import QuipSharpConfig
from compression_worker.methods.quip_sharp.loading import load_model, load_packed
from compression_worker.methods.quip_sharp.merge import open_merged
from compression_worker.methods.quip_sharp.quantize import quantize
from compression_worker.methods.quip_sharp.stacks import Stack, from_line, stack_line, stacks_of
from compression_worker.quantization.blocks import split
from compression_worker.quantization.calibration import STEPS, Hessians, Sampling, planned
from compression_worker.quantization.rest import TRANSFORMERS, checked_source, loadable, rest_planned
from compression_worker.quantization.windows import window_length
from compression_worker.tensors import ITEM_SIZES, TensorFile, TensorFiles, checkpoint_files, whole, write_file

__all__ = ["assemble_step", "layers_step", "load_model", "load_packed", "open_merged", "plan_step"]

METHOD = "quip_sharp"
CODING = ("num_bits", "passes", "rho", "fuse", "joint_search", "damping")
"""The settings that decide the codes of a block."""


def plan_step(context: StepContext) -> StepOutput:
    """Check the model and list the steps. Reads no weight."""
    inputs = dict(context.spec.inputs)
    config = parse_config(context.spec.params["config"])
    if config.calibrates and "calibration" not in inputs:
        raise CompressionError(
            "no_calibration", "QuIP# reads a calibration text: give a text set, or set calibration=generations"
        )
    source = {"variant": inputs["variant"]} | ({"calibration": inputs["calibration"]} if config.calibrates else {})
    checkpoint = opened(context, "variant")
    architecture = checked_source(checkpoint)
    sampling = Sampling(samples=config.samples, length=window_length(context, checkpoint, config.length))
    seed, blocks = context.spec.seed, len(architecture.blocks)
    steps = planned(sampling, source, 0, seed, blocks, hessians=True)
    layers = _layer_steps(config, inputs["variant"], blocks, seed)
    coded = {f"layers-{at}": f"@{len(steps) + at}" for at in range(len(layers))}
    steps += layers
    steps.append(rest_planned(inputs["variant"], architecture.parts))
    steps.append(
        PlannedStep(
            name="assemble",
            kind="quip_sharp.assemble",
            group="assemble",
            params={"config": asdict(config), "layers": list(coded)},
            inputs={"variant": inputs["variant"], **coded, "rest": f"@{len(steps) - 1}"},
            seed=seed,
        )
    )
    return StepOutput(data={"layers": blocks, "linears": sum(1 for _ in architecture.linears())}, steps=tuple(steps))


def parse_config(value: Json) -> QuipSharpConfig:
    """The config that a form or the command line gave; refuses settings that QuIP# does not have."""
    known = {field.name for field in fields(QuipSharpConfig)}
    if unknown := sorted(value.keys() - known):
        raise CompressionError("bad_setting", f"QuIP# has no setting '{unknown[0]}'; known: {', '.join(sorted(known))}")
    return QuipSharpConfig(**value)


def layers_step(context: StepContext) -> StepOutput:
    """The code words of a run of blocks."""
    params = context.spec.params
    config, run = QuipSharpConfig(**params["config"]), range(params["first"], params["first"] + params["count"])
    checkpoint = opened(context, "variant")
    hessians = Hessians(context, checkpoint.fingerprint)
    stacks = list(
        stacks_of(architecture_of(checkpoint), run, lambda name: hessians.line(name)["hessian"], fuse=config.fuse)
    )
    lines: list[Json] = []
    blobs: dict[str, str] = {}
    with checkpoint_files(checkpoint) as files, one_thread_per_operation():
        for stack in stacks:
            files.file(stack.name)  # so that threads find the files open
        code = partial(_code, context, files, hessians, config)
        made = (map if context.device.startswith("cuda") else each())(code, stacks)
        for block in run:
            tensors: dict[str, torch.Tensor] = {}
            for _ in range(sum(stack.block == block for stack in stacks)):
                line, own = next(made)
                lines.append(line)
                tensors |= own
                context.progress(len(lines), len(stacks), "stacks")
            if tensors:
                with context.store.writer() as blob:
                    write_file(blob, {name: whole(tensor) for name, tensor in tensors.items()}, TRANSFORMERS)
                blobs[codes_file(block)] = blob.digest
    _report(context, lines)
    return StepOutput(blobs=blobs, data={"stacks": lines})


def assemble_step(context: StepContext) -> StepOutput:
    """Put the artifact together: the table, side files that transformers reads, and the manifest."""
    config = QuipSharpConfig(**context.spec.params["config"])
    layers = [context.input(name) for name in context.spec.params["layers"]]
    rest = context.input("rest")
    theirs = opened(context, "variant").manifest["tensors"]
    dtypes = {name: entry["dtype"] for name, entry in theirs.items()}
    table: dict[str, Json] = {}
    lines = [line for layer in layers for line in layer.data["stacks"]]
    for line in lines:
        linears = from_line(line).linears
        table |= layout.stack_entries(linears, dtypes, config.num_bits, line["rotation"], trained=False)
    blobs = {name: digest for layer in layers for name, digest in layer.blobs.items()} | dict(rest.blobs)
    parcel = Parcel(
        method=METHOD,
        layout=layout.LAYOUT,
        lines=table,
        rest=rest,
        blobs=blobs,
        figures=_figures(config, lines, table),
        weigh=layout.weigh,
        name_hint=f"{METHOD}-{config.num_bits}bit",
        libraries=("numpy",),
        own_side=_own_side(context, config, rest, blobs),
    )
    return assemble(context, parcel)


def _layer_steps(config: QuipSharpConfig, variant: str, blocks: int, seed: int) -> list[PlannedStep]:
    """A step for each run of blocks, behind the one that makes its Hessians."""
    coding = {name: value for name, value in asdict(config).items() if name in CODING}
    return [
        PlannedStep(
            name=f"layers {run.start} to {run.stop - 1}",
            kind="quip_sharp.layers",
            group="layer",
            params={"first": run.start, "count": len(run), "config": coding},
            inputs={"variant": variant, "hessians": f"@{number + 1}"},
            seed=seed,
        )
        for number, run in enumerate(split(blocks, STEPS))
    ]


def _code(
    context: StepContext, files: TensorFiles, hessians: Hessians, config: QuipSharpConfig, stack: Stack
) -> tuple[Json, dict[str, torch.Tensor]]:
    """What is recorded of a stack, and its tensors as they are stored."""
    rotation = stack.rotation(context.spec.seed)
    weights = [weight.to(context.device) for weight in stack.weights(files)]
    hessian = hessians.of(stack.name)
    coded = quantize(weights, hessian.to(context.device), rotation, config)
    found = hessians.line(stack.name)
    line = stack_line(
        stack,
        rotation,
        rows=found["rows"],
        origin=found["origin"],
        damping=coded.damping,
        feedback=coded.feedback,
        dead=int((hessian.diagonal() <= 0).sum()),
        pieces=[asdict(piece) for piece in coded.pieces],
    )
    return line, layout.stack_tensors(stack.name, coded.planes, coded.scales)


def _report(context: StepContext, lines: Iterable[Json]) -> None:
    """Say what a person should know of the Hessians and of what was rounded without them."""
    for line in lines:
        name = line["linears"][0]["name"]
        if line["origin"] != "own":
            context.log(
                f"'{name}' saw {line['rows']} tokens of its own: rounded on the {line['origin']} Hessian", "warning"
            )
        if line["dead"]:
            context.log(f"{line['dead']} of {line['rotation']['inputs']} inputs of '{name}' are always zero", "info")
        if not line["feedback"]:
            context.log(f"the Hessian of '{name}' has no Cholesky factor: rounded without feedback", "warning")


def _figures(config: QuipSharpConfig, lines: Iterable[Json], table: Mapping[str, Json]) -> Json:
    """The matrices one by one, and what the linears alone come to."""
    matrices, weights, stored = [], 0, 0
    for line in lines:
        for linear, piece in zip(line["linears"], line["pieces"], strict=True):
            entry = table[linear["name"]]
            size = entry["bytes"] + entry["scale_bytes"]
            weights += linear["outputs"] * linear["inputs"]
            stored += size
            matrices.append(
                {
                    "name": linear["name"],
                    "proxy_loss": six_digits(piece["proxy_loss"]),
                    "relative_error": relative_error(piece["error"], piece["energy"]),
                    "bits": config.num_bits,
                    "bytes": size,
                    "coding": f"E8P, {config.num_bits} bits",
                    "damping": line["damping"],
                    "rows": line["rows"],
                    "origin": line["origin"],
                }
            )
    source = sum(math.prod(entry["shape"]) * ITEM_SIZES[entry["dtype"]] for entry in table.values())
    return {
        "matrices": matrices,
        "linears": {
            "bits_per_weight": six_digits(8 * stored / weights),
            "nominal_ratio": six_digits(16 / config.num_bits),
            "true_ratio": six_digits(source / stored),
        },
    }


def _own_side(
    context: StepContext, config: QuipSharpConfig, rest: StepOutput, blobs: Mapping[str, str]
) -> dict[str, str]:
    """The files that make transformers load the artifact's folder."""
    coded: dict[str, str] = {}
    for file, digest in blobs.items():
        if file not in rest.blobs:
            with TensorFile(context.store.path(digest)) as tensors:
                coded |= dict.fromkeys(tensors.entries, file)
    size = sum(context.store.size(digest) for digest in blobs.values())
    said = {"quant_method": layout.QUANT_METHOD, "bits": config.num_bits}
    return loadable(context, said, rest.data["raw"], coded, size)
