"""DeltaDQ (arXiv:2410.08666): group-wise dropout of a fine-tune's delta, then separate quantization of what survives.

No code was published. Where the text leaves something open, ours is named as our reading: every linear of the
transformer blocks is compressed and nothing else, a group keeps an exact count, the attention error is that of
:mod:`.search`, one grid serves a matrix, and the nominal ratio is ``16 alpha / (k - log2 m)``. The mask comes from a
counter-based generator (:mod:`kernels.group_mask`), so that positions cost nothing on disk.

A job is the list of steps that :func:`plan_step` makes: the search for a group size (unless one is given), one step per
block, one for the rest, and the assembly.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import partial

import torch

from compression_worker.architecture import Architecture, Linear
from compression_worker.artifact import Artifact
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput, sha256
from compression_worker.deltas.kept import BY_ROW, keep_rest
from compression_worker.deltas.pair import check_pair, open_pair, whole_delta, without_equal
from compression_worker.making.assembly import Parcel, assemble
from compression_worker.making.blobs import write_blob, write_pieces
from compression_worker.making.inputs import opened
from compression_worker.making.table import codes_file, relative_error, sides_of
from compression_worker.making.threads import each, one_thread_per_operation
from compression_worker.methods.deltadq import layout
from compression_worker.methods.deltadq.config import UNQUANTIZED, DeltaDQConfig
from compression_worker.methods.deltadq.merge import MergedSparse, load_model
from compression_worker.methods.deltadq.quantize import Dropout, coded, squares, stored
from compression_worker.methods.deltadq.search import group_sizes, search_step
from compression_worker.tensors import ITEM_SIZES, Spec, TensorFiles

__all__ = ["assemble_step", "layer_step", "load_model", "open_merged", "plan_step", "rest_step", "search_step"]

METHOD = "deltadq"


def plan_step(context: StepContext) -> StepOutput:
    """Check that base and variant fit, and list the steps. Reads no weight."""
    inputs = dict(context.spec.inputs)
    config = parse_config(context.spec.params["config"])
    if config.searches and "calibration" not in inputs:
        raise CompressionError(
            "no_calibration",
            "the group size is chosen on a calibration text: give a text set, or set group_size "
            f"({config.alpha} spreads survivors most evenly)",
        )
    base, variant = (opened(context, name) for name in ("base", "variant"))
    whole = check_pair(base, variant, context)
    architecture = without_equal(whole, base, variant, context)
    pair = {name: inputs[name] for name in ("base", "variant")}
    steps = _search_steps(config, whole, architecture, inputs, context.spec.seed)
    found = {"search": "@0"} if steps else {}
    first = len(steps)
    steps += _extraction_steps(config, architecture, pair, found, context.spec.seed)
    extracted = {step.name.replace(" ", "-"): f"@{first + index}" for index, step in enumerate(steps[first:])}
    layers = [name for name in extracted if name != "rest"]
    steps.append(
        PlannedStep(
            name="assemble",
            kind="deltadq.assemble",
            group="assemble",
            params={"config": asdict(config), "layers": layers},
            inputs=pair | extracted | found,
            seed=context.spec.seed,
        )
    )
    return StepOutput(
        data={"layers": len(layers), "linears": sum(1 for _ in architecture.linears())}, steps=tuple(steps)
    )


def parse_config(value: Json) -> DeltaDQConfig:
    """The config that a form or the command line gave; refuses settings that DeltaDQ does not have."""
    known = {field.name for field in fields(DeltaDQConfig)}
    if unknown := sorted(value.keys() - known):
        raise CompressionError(
            "bad_setting", f"DeltaDQ has no setting '{unknown[0]}'; known: {', '.join(sorted(known))}"
        )
    return DeltaDQConfig(**value)


def layer_step(context: StepContext) -> StepOutput:
    """The survivors' codes of one transformer block."""
    params = context.spec.params
    config = DeltaDQConfig(**params["config"])
    linears = [Linear(**linear) for linear in params["linears"]]
    size = group_sizes(context.input("search").data if "search" in context.spec.inputs else None, config)
    dropouts = [
        Dropout(seed=context.spec.seed, tensor=params["first"] + at, alpha=config.alpha, group_size=size)
        for at in range(len(linears))
    ]
    lines: dict[str, Json] = {}
    tensors: dict[str, tuple[Spec, list[memoryview]]] = {}
    with open_pair(context, [linear.name for linear in linears]) as pair, one_thread_per_operation():
        made = each()(partial(_code, pair, config.num_bits), linears, dropouts)
        for linear, dropout, (line, data) in zip(linears, dropouts, made, strict=True):
            lines[linear.name] = line | {"linear": asdict(linear), "place": dropout.tensor}
            tensors[linear.name] = Spec("U8", (len(data),)), [memoryview(data)]
            context.progress(len(lines), len(linears), "matrices")
    for name, line in lines.items():
        if not line["energy"]:
            context.log(f"'{name}' is equal in base and variant: its survivors are 0", "warning")
    codes = write_pieces(context, tensors)
    return StepOutput(blobs={codes_file(linears[0].block): codes}, data={"linears": lines})


def rest_step(context: StepContext) -> StepOutput:
    """Every tensor that is not coded as a linear: as it is, named where it equals the base's, or by changed row."""
    return keep_rest(context, dict.fromkeys(BY_ROW, str(context.spec.params["rows"])))


def assemble_step(context: StepContext) -> StepOutput:
    """Put the artifact together: grids, side files and the manifest; every file is hashed once more."""
    config = DeltaDQConfig(**context.spec.params["config"])
    layers = [context.input(name) for name in context.spec.params["layers"]]
    rest = context.input("rest")
    found = [item for layer in layers for item in layer.data["linears"].items()]
    lines = dict(sorted(found, key=lambda item: item[1]["place"]))
    sides = {layout.SCALES: "scale", layout.ZEROS: "zero"}
    grids = write_blob(
        context,
        {
            name: torch.tensor([line[side] for line in lines.values()], dtype=torch.float32)
            for name, side in sides.items()
        },
    )
    theirs = opened(context, "variant").manifest["tensors"]
    table = {
        name: layout.sparse_entry(Linear(**line["linear"]), theirs[name]["dtype"], line["place"], line)
        for name, line in lines.items()
    }
    parcel = Parcel(
        method=METHOD,
        layout=layout.LAYOUT,
        lines=table,
        rest=rest,
        blobs={
            **{name: digest for layer in layers for name, digest in layer.blobs.items()},
            **rest.blobs,
            layout.GRIDS_FILE: grids,
        },
        figures=_figures(context, config, lines, table, rest),
        weigh=layout.weigh,
        nominal_ratio=config.nominal_ratio,
        name_hint=f"{METHOD}-{config.nominal_ratio:.0f}x",
        libraries=("numpy", "zstandard"),
    )
    return assemble(context, parcel)


def open_merged(base: Checkpoint, artifact: Artifact) -> MergedSparse:
    """The tensors of the compressed model, for a restore."""
    return MergedSparse(base, artifact)


def _search_steps(
    config: DeltaDQConfig, whole: Architecture, coded: Architecture, inputs: dict[str, str], seed: int
) -> list[PlannedStep]:
    """On all linears of the first block that has a coded one; none where no size is looked for."""
    changed = [members for members, block in zip(whole.blocks, coded.blocks, strict=True) if block]
    if not config.searches or not changed:
        return []
    # Experts of a mixture are computed together, so that what goes into each cannot be seen.
    hidden = whole.stacked()
    first = [one for one in changed[0] if one.name not in hidden]
    return [
        PlannedStep(
            name="group size",
            kind="deltadq.search",
            group="choose",
            params={"config": asdict(config), "linears": [asdict(linear) for linear in first]},
            inputs={name: inputs[name] for name in ("base", "variant", "calibration")},
            seed=seed,
        )
    ]


def _extraction_steps(
    config: DeltaDQConfig, architecture: Architecture, pair: dict[str, str], found: dict[str, str], seed: int
) -> list[PlannedStep]:
    steps, place = [], 0
    for block, linears in enumerate(architecture.blocks):
        if linears:
            params = {"linears": [asdict(linear) for linear in linears], "first": place, "config": asdict(config)}
            steps.append(
                PlannedStep(
                    name=f"layer {block}",
                    kind="deltadq.layer",
                    group="layer",
                    params=params,
                    inputs=pair | found,
                    seed=seed,
                )
            )
            place += len(linears)
    rest = {"parts": architecture.parts, "rows": config.embeddings}
    return [*steps, PlannedStep(name="rest", kind="deltadq.rest", group="rest", params=rest, inputs=pair)]


def _code(pair: tuple[TensorFiles, TensorFiles], bits: int, linear: Linear, dropout: Dropout) -> tuple[Json, bytes]:
    """What is recorded of a linear, and its codes as they are stored."""
    delta = whole_delta(linear, *pair)
    energy = squares(delta)
    # A sum of finite numbers is finite here unless one of them is not.
    if not torch.tensor(energy).isfinite():
        raise CompressionError("not_finite", f"the delta of '{linear.name}' is not finite: base or variant is damaged")
    made, change = coded(delta, dropout, bits)
    coding, data = stored(made, bits)
    line = {
        "alpha": dropout.alpha,
        "group_size": dropout.group_size,
        "bits": bits,
        "coding": coding,
        "bytes": len(data),
        "sha256": sha256(data),
        "scale": made.grid.scale,
        "zero": made.grid.zero,
        "error": energy + change,
        "energy": energy,
    }
    return line, data


def _figures(
    context: StepContext, config: DeltaDQConfig, lines: dict[str, Json], table: dict[str, Json], rest: StepOutput
) -> Json:
    """The matrices one by one, the search, and the ratios of the linears alone, as stored and as the paper would."""
    matrices = [
        {
            "name": name,
            "relative_error": relative_error(line["error"], line["energy"]),
            "coding": f"1 in {line['alpha']}, group {line['group_size']}",
            "bytes": line["bytes"],
        }
        for name, line in lines.items()
    ]
    whole = stored_bytes = csr = 0
    for entry in table.values():
        outputs, inputs = sides_of(entry)
        kept = outputs * Dropout(seed=0, tensor=0, alpha=entry["alpha"], group_size=entry["group_size"]).kept(inputs)
        whole += outputs * inputs * ITEM_SIZES[entry["dtype"]]
        stored_bytes += entry["bytes"] + 8
        within = 16 if config.num_bits == UNQUANTIZED else config.left_bits
        csr += kept * (within + (16 if inputs <= 1 << 16 else 32)) // 8 + config.parts * 4 * (outputs + 1)
    return {
        "matrices": matrices + rest.data.get("row_figures", []),
        "search": context.input("search").data if "search" in context.spec.inputs else None,
        "linears": {
            "nominal_ratio": config.nominal_ratio,
            "true_ratio": float(f"{whole / stored_bytes:.6g}"),
            "csr_ratio": float(f"{whole / csr:.6g}"),
        }
        if table
        else None,
    }
