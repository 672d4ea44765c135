"""From what the steps left to the parts of an artifact: final scales, table lines, figures for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from compression_worker.architecture import Linear
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.making.blobs import read_blob
from compression_worker.making.table import relative_error, six_digits
from compression_worker.methods.bitdelta import layout
from compression_worker.methods.bitdelta.coding import Coding


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
    for digest in (layer.blobs["fine"] for layer in layers if "fine" in layer.blobs):
        fine |= read_blob(context, digest)
    pieces = [
        torch.tensor([line["scale"]]) if coding_of(line).plain else fine.get(name, torch.zeros(0)).reshape(-1)
        for name, line in lines.items()
    ]
    return torch.cat(pieces).to(torch.float32) if pieces else torch.zeros(0)


def scale_vectors(
    context: StepContext, lines: Mapping[str, Json], layers: Sequence[StepOutput], distillation: StepOutput | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The final scales as they are stored: those of the published form in fp32, all finer ones in bf16."""
    if distillation is None:
        whole = initial_scales(context, lines, layers)
    elif "scales" in distillation.data:
        whole = torch.tensor(distillation.data["scales"], dtype=torch.float32)
    else:
        whole = read_blob(context, distillation.blobs["scales"])["scales"]
    pieces = whole.split([values_of(line) for line in lines.values()])
    plain = [piece for piece, line in zip(pieces, lines.values(), strict=True) if coding_of(line).plain]
    fine = [piece for piece, line in zip(pieces, lines.values(), strict=True) if not coding_of(line).plain]
    nothing = torch.zeros(0)
    return torch.cat([nothing, *plain]), torch.cat([nothing, *fine]).to(torch.bfloat16)


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


def matrix_figures(lines: Mapping[str, Json], plain: torch.Tensor, distillation: StepOutput | None) -> Json:
    """``matrices``: scales and error of each linear; ``distillation``: the loss curve, or None.

    The error of the published form is that of its final scale; that of a finer coding is before distillation.
    """
    scales = iter(plain.tolist())
    mixed = any("coding" in line for line in lines.values())
    matrices = []
    for name, line in lines.items():
        coding = coding_of(line)
        scale = next(scales) if coding.plain else None
        figures: Json = {"name": name}
        if scale is not None:
            figures |= {"scale0": six_digits(line["scale"]), "scale": six_digits(scale)}
        figures["relative_error"] = _error(line, scale)
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
