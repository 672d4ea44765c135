"""From what the steps left to the parts of an artifact: final scales, table lines, figures for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch

from compression_worker.architecture import Linear
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.deltas.pair import open_pair, whole_delta
from compression_worker.making.blobs import open_blob, read_blob
from compression_worker.making.table import relative_error, six_digits
from compression_worker.making.threads import each, one_thread_per_operation
from compression_worker.methods.bitdelta import layout
from compression_worker.methods.bitdelta.coding import Coding, decode
from compression_worker.tensors import TensorFile, TensorFiles
from kernels.packing import words_for

FINE_BLOB = "fine"
"""A block's finer scales, fp32 ``(masks, values)``, which the assembly puts together with those of the others."""


def coding_of(line: Json) -> Coding:
    """How a layer step coded a linear."""
    return Coding(**line["coding"]) if "coding" in line else Coding()


def sides_of(line: Json) -> tuple[int, int]:
    """``(N, K)`` of a linear."""
    return line["linear"]["outputs"], line["linear"]["inputs"]


def values_of(line: Json) -> int:
    """How many scales a linear has, over all its masks."""
    coding = coding_of(line)
    return coding.masks * coding.values(*sides_of(line))


def initial_scales(context: StepContext, lines: Mapping[str, Json], layers: Iterable[StepOutput]) -> torch.Tensor:
    """All scales as the layer steps fitted them, fp32, linear after linear and mask after mask."""
    fine: dict[str, torch.Tensor] = {}
    for digest in (layer.blobs[FINE_BLOB] for layer in layers if FINE_BLOB in layer.blobs):
        fine |= read_blob(context, digest)
    pieces = [
        torch.tensor([line["scale"]]) if coding_of(line).plain else fine.get(name, torch.zeros(0)).reshape(-1)
        for name, line in lines.items()
    ]
    return torch.cat(pieces).to(torch.float32) if pieces else torch.zeros(0)


def final_scales(
    context: StepContext, lines: Mapping[str, Json], layers: Sequence[StepOutput], distillation: StepOutput | None
) -> dict[str, torch.Tensor]:
    """The scales of each linear as they are stored: those of the published form in fp32, all finer ones in bf16."""
    if distillation is None:
        whole = initial_scales(context, lines, layers)
    elif "scales" in distillation.data:
        whole = torch.tensor(distillation.data["scales"], dtype=torch.float32)
    else:
        whole = read_blob(context, distillation.blobs["scales"])["scales"]
    pieces = whole.split([values_of(line) for line in lines.values()])
    return {
        name: piece if coding_of(line).plain else piece.to(torch.bfloat16)
        for (name, line), piece in zip(lines.items(), pieces, strict=True)
    }


def scale_vectors(lines: Mapping[str, Json], scales: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The scales as the artifact's file holds them, one linear after another; a vector without a value is left out."""
    plain = [scales[name] for name, line in lines.items() if coding_of(line).plain]
    fine = [scales[name] for name, line in lines.items() if not coding_of(line).plain]
    vectors = {layout.SCALES: torch.cat([torch.zeros(0), *plain])}
    vectors[layout.FINE] = torch.cat([torch.zeros(0, dtype=torch.bfloat16), *fine])
    return {name: vector for name, vector in vectors.items() if len(vector)}


def parts_of(codes: TensorFile, name: str, line: Json) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``packed (masks, ceil(K/32), N)`` and both factors (empty without a low-rank part) from a block's codes."""
    coding, (outputs, inputs) = coding_of(line), sides_of(line)
    none = torch.zeros(0)
    left, right = (codes.tensor(f"{name}#{side}") if coding.rank else none for side in ("left", "right"))
    return codes.tensor(name).view(coding.masks, words_for(inputs), outputs), left, right


def codes_of(layer: StepOutput) -> str:
    """The digest of a block's codes."""
    (digest,) = (digest for name, digest in layer.blobs.items() if name != FINE_BLOB)
    return digest


def errors_after(
    context: StepContext, layers: Iterable[StepOutput], scales: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """``|D - D_hat|^2`` of each linear at its distilled scales, from the weights themselves.

    Those of the published form are left out: the sums of their layer step give it for any scale.
    """
    found: dict[str, float] = {}
    with open_pair(context, []) as pair, one_thread_per_operation():
        for layer in layers:
            lines = {name: line for name, line in layer.data["linears"].items() if "sum_abs" not in line}
            with open_blob(context, codes_of(layer)) as codes:
                errors = each()(partial(_error_after, pair, codes, scales), lines, lines.values())
                found |= dict(zip(lines, errors, strict=True))
    return found


def _error_after(
    pair: tuple[TensorFiles, TensorFiles], codes: TensorFile, scales: Mapping[str, torch.Tensor], name: str, line: Json
) -> float:
    coding, linear = coding_of(line), Linear(**line["linear"])
    packed, left, right = parts_of(codes, name, line)
    own = scales[name].view(coding.masks, coding.values(*sides_of(line)))
    error = decode(packed, own, left, right, coding, linear.inputs).sub_(whole_delta(linear, *pair))
    return float(error.square_().sum(dtype=torch.float64))


def table_lines(variant: Checkpoint, lines: Mapping[str, Json]) -> tuple[dict[str, Json], list[Coding]]:
    """The artifact's lines of all linears, each with the place of its scales, and their codings."""
    theirs = variant.manifest["tensors"]
    plain = fine = 0
    table, codings = {}, []
    for name, line in lines.items():
        coding = coding_of(line)
        place = plain if coding.plain else fine
        table[name] = layout.sign_entry(Linear(**line["linear"]), theirs[name]["dtype"], place, line["sha256"], coding)
        plain, fine = (plain + 1, fine) if coding.plain else (plain, fine + values_of(line))
        codings.append(coding)
    return table, codings


def matrix_figures(
    lines: Mapping[str, Json],
    scales: Mapping[str, torch.Tensor],
    errors: Mapping[str, float],
    distillation: StepOutput | None,
) -> Json:
    """``matrices``: scales and error of each linear; ``distillation``: the loss curve, or None.

    ``errors`` are those that distillation left, where the layer steps' sums do not give them.
    """
    mixed = any("coding" in line for line in lines.values())
    matrices = []
    for name, line in lines.items():
        coding = coding_of(line)
        scale = float(scales[name]) if coding.plain else None
        figures: Json = {"name": name}
        if scale is not None:
            figures |= {"scale0": six_digits(line["scale"]), "scale": six_digits(scale)}
        figures["relative_error"] = _error(line | ({"error": errors[name]} if name in errors else {}), scale)
        if mixed:
            figures |= {"coding": coding.label, "bytes": sum(coding.sizes(*sides_of(line)).values())}
        matrices.append(figures)
    return {"matrices": matrices, "distillation": distillation.data["curve"] if distillation else None}


def _error(line: Json, scale: float | None) -> float:
    """``|D - D_hat| / |D|``."""
    if scale is None or "sum_abs" not in line:
        return relative_error(line["error"], line["sum_squares"])
    elements = math.prod(sides_of(line))
    error = line["sum_squares"] - 2 * scale * line["sum_abs"] + scale * scale * elements
    return relative_error(error, line["sum_squares"])
