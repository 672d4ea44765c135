"""BitDelta (arXiv:2402.10193): a fine-tune as the sign of its delta, one bit a weight, and one scale per matrix.

``D = W_f - W_b``; ``S = +1`` unless ``D < 0``; ``scale0 = mean |D|``, which minimises ``sum (|D| - scale)^2``.
Scales are then distilled: Adam on the squared difference between the logits of the variant and those of base plus
``scale * S``.
Every linear ``(N, K)`` of the transformer blocks is coded; all other tensors of the variant are kept as they are.

Beyond the paper (:mod:`.coding`): finer scales, stacked masks and a low-rank part, chosen by hand or, for a target, for
each matrix (:mod:`.choose`); embeddings and head by changed row.

A job is the list of steps that :func:`plan_step` makes: for a target or for scales fitted on activations what these
need, then one per block, one for the rest, chunks of distillation, and the assembly of the artifact. Each reads and
writes the store by digest and holds a few tiles of a matrix at a time (whole matrices for the finer codings).
"""

from __future__ import annotations

import threading
from dataclasses import asdict, fields
from functools import partial

import torch

from compression_worker.architecture import Architecture, Linear
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput, sha256
from compression_worker.deltas.kept import BY_ROW, keep_rest
from compression_worker.deltas.moments import read_inputs
from compression_worker.deltas.pair import check_pair, open_pair, whole_delta, without_equal
from compression_worker.faults import failpoint
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.blobs import open_blob, write_blob
from compression_worker.making.inputs import opened
from compression_worker.making.table import codes_file
from compression_worker.making.threads import each, one_thread_per_operation
from compression_worker.methods.bitdelta import layout
from compression_worker.methods.bitdelta.choose import choose_step, measure_step, sense_step
from compression_worker.methods.bitdelta.coding import Coded, Coding, encode
from compression_worker.methods.bitdelta.config import CHUNK_STEPS, BitDeltaConfig
from compression_worker.methods.bitdelta.finish import (
    FINE_BLOB,
    errors_after,
    final_scales,
    matrix_figures,
    scale_vectors,
    table_lines,
)
from compression_worker.methods.bitdelta.merge import MergedSigns, load_model
from compression_worker.methods.bitdelta.training import distill_step
from compression_worker.settings import completed
from compression_worker.tensors import TensorFiles, header_bytes, raw_bytes
from kernels.sign_pack.reference import TILE_ELEMENTS, SignPack, sign_pack, sign_pack_tiles

__all__ = [
    "assemble_step",
    "choose_step",
    "distill_step",
    "layer_step",
    "load_model",
    "measure_step",
    "open_merged",
    "plan_step",
    "rest_step",
    "sense_step",
]

METHOD = "bitdelta"


def plan_step(context: StepContext) -> StepOutput:
    """Check that base and variant fit, and list the steps. Reads no weight."""
    inputs = dict(context.spec.inputs)
    config = parse_config(context.spec.params["config"])
    if config.calibrates and "calibration" not in inputs:
        raise CompressionError(
            "no_calibration",
            "distillation, a target and scales fitted on activations need a text set to calibrate on: give one, or set "
            "distill_steps to 0, scale_fit to mean and no target for the initial scales",
        )
    base, variant = (opened(context, name) for name in ("base", "variant"))
    architecture = without_equal(check_pair(base, variant, context), base, variant, context)
    if config.senses and (experts := sorted(architecture.stacked())):
        raise CompressionError(
            "no_inputs",
            f"the inputs of '{experts[0]}' cannot be seen, because the model computes its experts together: set "
            "scale_fit to mean and no target",
        )
    pair = {name: inputs[name] for name in ("base", "variant")}
    calibration = {"calibration": inputs["calibration"]} if "calibration" in inputs else {}
    steps = _choosing_steps(config, architecture, pair, calibration, context.spec.seed)
    guides = _guides(config, len(steps) - 1)
    first = len(steps)
    steps += _extraction_steps(config, architecture, pair, guides)
    extracted = {step.name.replace(" ", "-"): f"@{first + index}" for index, step in enumerate(steps[first:])}
    layers = {name: place for name, place in extracted.items() if name != "rest"}
    trained = pair | layers | ({"rest": extracted["rest"]} if config.embeddings != "raw" or config.chooses else {})
    if layers:
        steps += _distillation_steps(config, trained, calibration, len(steps), context.spec.seed)
    last = {"distillation": f"@{len(steps) - 1}"} if config.distill_steps and layers else {}
    chosen = {"choice": guides["choice"]} if "choice" in guides else {}
    steps.append(
        PlannedStep(
            name="assemble",
            kind="bitdelta.assemble",
            group="assemble",
            params={"config": asdict(config), "layers": list(layers)},
            inputs=pair | extracted | last | chosen,
            seed=context.spec.seed,
        )
    )
    return StepOutput(
        data={"layers": len(layers), "linears": sum(1 for _ in architecture.linears())}, steps=tuple(steps)
    )


def parse_config(value: Json) -> BitDeltaConfig:
    """The config that a form or the command line gave; refuses settings that BitDelta does not have."""
    known = {field.name for field in fields(BitDeltaConfig)}
    if unknown := sorted(value.keys() - known):
        raise CompressionError(
            "bad_setting", f"BitDelta has no setting '{unknown[0]}'; known: {', '.join(sorted(known))}"
        )
    return BitDeltaConfig(**completed(BitDeltaConfig, value))


def layer_step(context: StepContext) -> StepOutput:
    """The codes and initial scales of one transformer block."""
    linears = [Linear(**linear) for linear in context.spec.params["linears"]]
    codings = _codings(context, linears)
    seen = _seen(context, linears)
    coded: dict[str, Json] = {}
    fine: dict[str, torch.Tensor] = {}
    names = [linear.name for linear in linears]
    with open_pair(context, names) as (base, variant), context.store.writer() as blob:
        blob.write(header_bytes(layout.codes_specs(zip(linears, codings, strict=True))))
        with one_thread_per_operation():
            packed = each()(partial(_code, base, variant), linears, codings, seen)
            for linear, coding, made in zip(linears, codings, packed, strict=True):
                failpoint("bitdelta.matrix")
                pieces = _pieces(made)
                for piece in pieces:
                    blob.write(piece)
                digest = sha256(b"".join(bytes(piece) for piece in pieces) if len(pieces) > 1 else pieces[0])
                coded[linear.name] = _line(linear, coding, made, digest)
                if isinstance(made, Coded) and not coding.plain:
                    fine[linear.name] = made.scales
                context.progress(len(coded), len(linears), "matrices")
    for name, line in coded.items():
        if not line["sum_squares"]:
            context.log(f"'{name}' is equal in base and variant: its scale is 0", "warning")
    blobs = {codes_file(linears[0].block): blob.digest}
    finer = {FINE_BLOB: write_blob(context, fine)} if fine else {}
    return StepOutput(blobs=blobs | finer, data={"linears": coded})


def rest_step(context: StepContext) -> StepOutput:
    """Every tensor that is not coded as a linear: as it is, named where it equals the base's, or by changed row."""
    codings = dict.fromkeys(BY_ROW, str(context.spec.params.get("rows", "raw")))
    if "choice" in context.spec.inputs:
        codings = dict(context.input("choice").data["rows"])
    return keep_rest(context, codings)


def assemble_step(context: StepContext) -> StepOutput:
    """Put the artifact together: final scales, side files and the manifest; every file is hashed once more."""
    layers = [context.input(name) for name in context.spec.params["layers"]]
    rest = context.input("rest")
    distillation = context.input("distillation") if "distillation" in context.spec.inputs else None
    lines = {name: line for layer in layers for name, line in layer.data["linears"].items()}
    finals = final_scales(context, lines, layers, distillation)
    scales = write_blob(context, scale_vectors(lines, finals))
    failpoint("artifact.scales")
    blobs = {name: digest for layer in layers for name, digest in layer.blobs.items() if name != FINE_BLOB}
    table, codings = table_lines(opened(context, "variant"), lines)
    errors = errors_after(context, layers, finals) if distillation else {}
    figures = matrix_figures(lines, finals, errors, distillation)
    figures["matrices"] += rest.data.get("row_figures", [])
    if "choice" in context.spec.inputs:
        figures["target"] = context.input("choice").data["target"]
    parcel = Parcel(
        method=METHOD,
        layout=layout.layout_of(codings),
        lines=table,
        rest=rest,
        blobs={**blobs, **rest.blobs, layout.SCALES_FILE: scales},
        figures=figures,
        weigh=layout.weigh,
        name_hint=_name_hint(BitDeltaConfig(**context.spec.params["config"])),
    )
    return assemble(context, parcel)


def open_merged(base: Checkpoint, artifact: Artifact) -> MergedSigns:
    """The tensors of the compressed model, for a restore."""
    return MergedSigns(base, artifact)


def _choosing_steps(
    config: BitDeltaConfig, architecture: Architecture, pair: dict[str, str], calibration: dict[str, str], seed: int
) -> list[PlannedStep]:
    """What has to be known before anything is coded: none, what layers see, or the coding of each matrix."""
    if not config.senses:
        return []
    linears = [asdict(linear) for linear in architecture.linears()]
    steps = [
        PlannedStep(
            name="sensitivity",
            kind="bitdelta.sense",
            group="choose",
            params={"blocks": [[linear.name for linear in block] for block in architecture.blocks]},
            inputs={"variant": pair["variant"], **calibration},
            seed=seed,
        )
    ]
    if not config.chooses:
        return steps
    seen = pair | {"sensitivity": "@0"}
    for block, members in enumerate(architecture.blocks):
        if members:
            params: Json = {"linears": [asdict(linear) for linear in members]}
            name = f"measure {block}"
            steps.append(PlannedStep(name=name, kind="bitdelta.measure", group="measure", params=params, inputs=seen))
    params = {"linears": [], "parts": architecture.parts}
    steps.append(PlannedStep(name="measure rest", kind="bitdelta.measure", group="measure", params=params, inputs=seen))
    measured = {step.name.replace(" ", "-"): f"@{index}" for index, step in enumerate(steps) if index}
    steps.append(
        PlannedStep(
            name="choose",
            kind="bitdelta.choose",
            group="choose",
            params={"config": asdict(config), "linears": linears, "parts": architecture.parts},
            inputs=seen | calibration | measured,
            seed=seed,
        )
    )
    return steps


def _guides(config: BitDeltaConfig, last: int) -> dict[str, str]:
    """Outputs of the first steps that the coding of a block depends on."""
    if config.chooses:
        return {"sensitivity": "@0", "choice": f"@{last}"}
    return {"sensitivity": "@0"} if config.senses else {}


def _extraction_steps(
    config: BitDeltaConfig, architecture: Architecture, pair: dict[str, str], guides: dict[str, str]
) -> list[PlannedStep]:
    coding = Coding(scale=config.scale, group_size=_group(config), masks=config.masks, rank=config.residual_rank)
    own: Json = {} if coding.plain or config.chooses else {"coding": coding.to_json()}
    steps = [
        PlannedStep(
            name=f"layer {block}",
            kind="bitdelta.layer",
            group="layer",
            params={"linears": [asdict(linear) for linear in linears], **own},
            inputs=pair | guides,
        )
        for block, linears in enumerate(architecture.blocks)
        if linears
    ]
    rows = {"rows": config.embeddings} if config.embeddings != "raw" and not config.chooses else {}
    chosen = {"choice": guides["choice"]} if "choice" in guides else {}
    rest = PlannedStep(
        name="rest",
        kind="bitdelta.rest",
        group="rest",
        params={"parts": architecture.parts, **rows},
        inputs=pair | chosen,
    )
    return [*steps, rest]


def _group(config: BitDeltaConfig) -> int:
    return config.group_size if config.scale == "group" else 0


def _distillation_steps(
    config: BitDeltaConfig, inputs: dict[str, str], calibration: dict[str, str], first_index: int, seed: int
) -> list[PlannedStep]:
    """Chunks of at most 25 training steps; each continues from the state that the one before it left."""
    steps: list[PlannedStep] = []
    for first in range(0, config.distill_steps, CHUNK_STEPS):
        last = min(first + CHUNK_STEPS, config.distill_steps)
        before = {"previous": f"@{first_index + len(steps) - 1}"} if steps else {}
        steps.append(
            PlannedStep(
                name=f"steps {first + 1} to {last}",
                kind="bitdelta.distill",
                group="distill",
                params={"config": asdict(config), "first": first, "last": last},
                inputs={**inputs, **calibration, **before},
                seed=seed,
            )
        )
    return steps


def _codings(context: StepContext, linears: list[Linear]) -> list[Coding]:
    """How each linear of the block is coded: by choice, by the settings, or as published."""
    if "choice" in context.spec.inputs:
        chosen = context.input("choice").data["codings"]
        return [Coding(**chosen[linear.name]) for linear in linears]
    coding = Coding(**context.spec.params.get("coding", {}))
    return [coding.fitting(linear.outputs, linear.inputs) for linear in linears]


def _seen(context: StepContext, linears: list[Linear]) -> list[torch.Tensor | None]:
    """What goes into each linear on calibration text, where that was asked for."""
    if "sensitivity" not in context.spec.inputs:
        return [None] * len(linears)
    digest = context.input("sensitivity").blobs[f"block-{linears[0].block}"]
    with open_blob(context, digest) as file:
        return [read_inputs(file, linear.name) for linear in linears]


class _Buffers(threading.local):
    """Memory of one thread for a tile of each side."""

    def __init__(self) -> None:
        self.pair = tuple(torch.empty(4 * TILE_ELEMENTS, dtype=torch.uint8) for _ in range(2))


_BUFFERS = _Buffers()


def _code(
    base: TensorFiles, variant: TensorFiles, linear: Linear, coding: Coding, x: torch.Tensor | None
) -> SignPack | Coded:
    """The published form by tiles; any other from the whole matrix."""
    if coding.plain and x is None:
        made: SignPack | Coded = _pack(linear, base, variant)
        energy = made.sum_squares  # type: ignore[union-attr]
    else:
        delta = whole_delta(linear, base, variant)
        made = encode(delta, coding, x)
        energy = made.energy
    # A sum of finite numbers is finite here unless one of them is not.
    if not torch.tensor(energy).isfinite():
        raise CompressionError("not_finite", f"the delta of '{linear.name}' is not finite: base or variant is damaged")
    return made


def _pack(linear: Linear, base: TensorFiles, variant: TensorFiles) -> SignPack:
    ours, theirs = base.file(linear.name), variant.file(linear.name)
    if linear.transposed:
        return sign_pack(ours.tensor(linear.name).T, theirs.tensor(linear.name).T)
    rows = max(1, TILE_ELEMENTS // linear.inputs)
    one, other = _BUFFERS.pair
    tiles = zip(ours.row_tiles(linear.name, rows, one), theirs.row_tiles(linear.name, rows, other), strict=True)
    return sign_pack_tiles(tiles, linear.outputs, linear.inputs)


def _pieces(made: SignPack | Coded) -> list[memoryview]:
    """What is written of a matrix, in the order of its header: codes, and the factors where there are any."""
    factors = [made.left, made.right] if isinstance(made, Coded) and made.left.numel() else []
    return [raw_bytes(piece.contiguous()) for piece in (made.packed, *factors)]


def _line(linear: Linear, coding: Coding, made: SignPack | Coded, digest: str) -> Json:
    line: Json = {"linear": asdict(linear), "sha256": digest}
    if isinstance(made, Coded):
        line |= {"coding": coding.to_json(), "error": made.error, "sum_squares": made.energy}
        return line | ({"scale": float(made.scales)} if coding.plain else {})
    scale = torch.tensor(made.sum_abs / (linear.outputs * linear.inputs), dtype=torch.float32)
    return line | {"scale": float(scale), "sum_abs": made.sum_abs, "sum_squares": made.sum_squares}


def _name_hint(config: BitDeltaConfig) -> str:
    if config.target_ratio is not None:
        return f"{METHOD}-ratio-{config.target_ratio:g}".replace(".", "-")
    if config.target_kl is not None:
        return f"{METHOD}-kl-{config.target_kl:g}".replace(".", "-")
    return f"{METHOD}-{config.distill_steps}-steps" if config.distill_steps else f"{METHOD}-initial"
