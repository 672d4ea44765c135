"""QuIP# (arXiv:2402.04396): 2, 3 or 4 bits a weight of every block linear, in an artifact that stands alone.

Notation and equations: :mod:`.rotation`, :mod:`.quantize`, and :mod:`compression_worker.quantization.rounding`.

A job is the list of steps that :func:`plan_step` makes: the shared ones that read the calibration text and make
Hessians, a step for each run of blocks that codes them, one for the rest, fine-tuning where it is asked for, and the
assembly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields

from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.inputs import opened
from compression_worker.making.table import relative_error, six_digits
from compression_worker.methods.quip_sharp import layout
from compression_worker.methods.quip_sharp.config import QuipSharpConfig
from compression_worker.methods.quip_sharp.finish import tuned_tensors, with_signs
from compression_worker.methods.quip_sharp.layers import NORMS, layers_step
from compression_worker.methods.quip_sharp.loading import load_model, load_packed
from compression_worker.methods.quip_sharp.merge import open_merged
from compression_worker.methods.quip_sharp.stacks import from_line
from compression_worker.methods.quip_sharp.teacher import teacher_step
from compression_worker.methods.quip_sharp.tuning import planned_tuning, tune_step
from compression_worker.quantization.blocks import split
from compression_worker.quantization.calibration import STEPS, Sampling, planned
from compression_worker.quantization.rest import checked_source, loadable, rest_planned
from compression_worker.quantization.windows import window_length
from compression_worker.tensors import ITEM_SIZES, TensorFile

__all__ = [
    "assemble_step",
    "layers_step",
    "load_model",
    "load_packed",
    "open_merged",
    "plan_step",
    "teacher_step",
    "tune_step",
]

METHOD = "quip_sharp"
CODING = ("num_bits", "passes", "rho", "fuse", "joint_search", "damping")
"""The settings that decide the codes of a block; and, where it is tuned, these:"""
TUNING = ("samples", "block_epochs", "batch_size", "learning_rate", "sign_learning_rate")


def plan_step(context: StepContext) -> StepOutput:
    """Check the model and list the steps. Reads no weight."""
    inputs = dict(context.spec.inputs)
    config = parse_config(context.spec.params["config"])
    if config.calibrates and "calibration" not in inputs:
        raise CompressionError(
            "no_calibration", "QuIP# reads a calibration text: give a text set, or set calibration=generations"
        )
    source = {"variant": inputs["variant"]} | ({"calibration": inputs["calibration"]} if config.calibrates else {})
    variant = {"variant": inputs["variant"]}
    checkpoint = opened(context, "variant")
    architecture = checked_source(checkpoint)
    if config.train_head and "head" not in architecture.parts.values():
        context.log("the output head is tied to the embeddings and stays as it is", "warning")
    sampling = Sampling(samples=config.samples, length=window_length(context, checkpoint, config.length))
    seed, blocks = context.spec.seed, len(architecture.blocks)
    steps = planned(sampling, source, 0, seed, blocks, hessians=True)
    coded = {}
    for number, step in enumerate(_layer_steps(config, inputs["variant"], blocks, seed)):
        coded[f"layers-{number}"] = f"@{len(steps)}"
        steps.append(step)
    last, tuned = {}, {f"tuned-{name}": at for name, at in coded.items()} if config.tunes_blocks else {}
    if config.tunes_whole:
        steps += planned_tuning(config, {**variant, "text": "@0", **coded}, len(steps), seed)
        last = {"tuning": f"@{len(steps) - 1}"}
        tuned = {"tuned": last["tuning"]}
    steps.append(rest_planned(inputs["variant"], architecture.parts, tuned))
    steps.append(
        PlannedStep(
            name="assemble",
            kind="quip_sharp.assemble",
            group="assemble",
            params={"config": asdict(config), "layers": list(coded)},
            inputs={**variant, **coded, **last, "rest": f"@{len(steps) - 1}"},
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


def assemble_step(context: StepContext) -> StepOutput:
    """Put the artifact together: the table, side files that transformers reads, and the manifest."""
    config = QuipSharpConfig(**context.spec.params["config"])
    layers = [context.input(name) for name in context.spec.params["layers"]]
    rest = context.input("rest")
    dtypes = {name: entry["dtype"] for name, entry in opened(context, "variant").manifest["tensors"].items()}
    table: dict[str, Json] = {}
    is_trained = config.tuning != "none"
    for line in (line for layer in layers for line in layer.data["stacks"]):
        linears = from_line(line).linears
        table |= layout.stack_entries(linears, dtypes, config.num_bits, line["rotation"], trained=is_trained)
    coded = {name: digest for layer in layers for name, digest in layer.blobs.items() if name != NORMS}
    tuning = context.input("tuning") if config.tunes_whole else None
    if tuning:
        coded = with_signs(context, coded, tuning)
    if is_trained:
        tuned, entries = tuned_tensors(context, layers, tuning)
        coded |= tuned
        table |= entries
    parcel = Parcel(
        method=METHOD,
        layout=layout.LAYOUT,
        lines=table,
        rest=rest,
        blobs=coded | dict(rest.blobs),
        figures=_figures(config, layers, tuning, table),
        weigh=layout.weigh,
        name_hint=f"{METHOD}-{config.num_bits}bit" + ("-tuned" if is_trained else ""),
        libraries=("numpy",),
        own_side=_own_side(context, config, rest, coded),
    )
    return assemble(context, parcel)


def _layer_steps(config: QuipSharpConfig, variant: str, blocks: int, seed: int) -> list[PlannedStep]:
    """A step for each run of blocks, behind the one that makes its Hessians."""
    names = (*CODING, *TUNING) if config.tunes_blocks else CODING
    coding = {name: value for name, value in asdict(config).items() if name in names}
    if config.tunes_blocks:
        coding["tuning"] = "block"
    steps = []
    for number, run in enumerate(split(blocks, STEPS)):
        # The step that makes the Hessians of a run begins with what the one before it leaves.
        hidden = {"hidden": f"@{number}"} if config.tunes_blocks else {}
        steps.append(
            PlannedStep(
                name=f"layers {run.start} to {run.stop - 1}",
                kind="quip_sharp.tune_layers" if config.tunes_blocks else "quip_sharp.layers",
                group="layer",
                params={"first": run.start, "count": len(run), "config": coding},
                inputs={"variant": variant, "hessians": f"@{number + 1}", **hidden},
                seed=seed,
            )
        )
    return steps


def _figures(
    config: QuipSharpConfig, layers: list[StepOutput], tuning: StepOutput | None, table: Mapping[str, Json]
) -> Json:
    """The matrices one by one (before end-to-end fine-tuning), its curves, and what the linears alone come to."""
    matrices, weights, stored, source = [], 0, 0, 0
    for line in (line for layer in layers for line in layer.data["stacks"]):
        for linear, piece in zip(line["linears"], line["pieces"], strict=True):
            entry = table[linear["name"]]
            size, count = entry["bytes"] + entry["scale_bytes"], linear["outputs"] * linear["inputs"]
            weights, stored, source = weights + count, stored + size, source + count * ITEM_SIZES[entry["dtype"]]
            matrices.append(
                {
                    "name": linear["name"],
                    "proxy_loss": six_digits(piece["proxy_loss"]),
                    "relative_error": relative_error(piece["error"], piece["energy"]),
                    "bits": config.num_bits,
                    "bytes": size,
                    "coding": f"E8P, {config.num_bits} bits",
                    **{name: line[name] for name in ("rho", "damping", "rows", "origin")},
                }
            )
    curves = {name: curve for layer in layers for name, curve in layer.data.get("curves", {}).items()}
    whole = tuning.data["curve"] if tuning else None
    return {
        "matrices": matrices,
        "tuning": {"blocks": curves, "end_to_end": whole} if config.tuning != "none" else None,
        "linears": {
            "bits_per_weight": six_digits(8 * stored / weights),
            "nominal_ratio": six_digits(16 / config.num_bits),
            "true_ratio": six_digits(source / stored),
        },
    }


def _own_side(
    context: StepContext, config: QuipSharpConfig, rest: StepOutput, coded: Mapping[str, str]
) -> dict[str, str]:
    """The files that make transformers load the artifact's folder."""
    where: dict[str, str] = {}
    for file, digest in coded.items():
        with TensorFile(context.store.path(digest)) as tensors:
            where |= dict.fromkeys(tensors.entries, file)
    size = sum(context.store.size(digest) for digest in (*coded.values(), *rest.blobs.values()))
    said = {"quant_method": layout.QUANT_METHOD, "bits": config.num_bits}
    return loadable(context, said, rest.data["raw"], where, size)
