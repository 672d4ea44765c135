"""How QuIP# lies on disk.

Code words of block ``i`` are in ``codes-<i>.safetensors``, under ``<stack>#<piece>``, where a stack has the name of its
first matrix: ``codes`` int16 ``(N', K'/8)``; ``second`` uint8 at 3 bits, int16 at 4 bits; ``scales`` fp32, one of each
matrix. Signs are not stored: the manifest's seed makes them. Where fine-tuning trained them, they are
``signs_in (K,)`` and ``signs_out (N,)`` in fp16. Norms (and a head) that were trained are in ``tuned.safetensors``.

Every matrix has a line; the line of a stack's first one says how the stack is transformed, and has its padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from compression_worker.architecture import Linear
from compression_worker.contracts import Json
from compression_worker.making.table import codes_file, sides_of

TUNED_FILE = "tuned.safetensors"
QUANT_METHOD = "deltaworks_quip_sharp"
"""The name by which transformers knows how to load the artifact's folder."""
MATRIX, VECTOR = "matrix", "vector"
"""What a line of kind ``lattice`` is coded as."""
CODES, SECOND, SCALES, SIGNS_IN, SIGNS_OUT = "codes", "second", "scales", "signs_in", "signs_out"
SCALE_BYTES, SIGN_BYTES = 4, 2
LAYOUT: Json = {
    "name": "e8p-stacks",
    "version": 1,
    "codebook": "E8P",
    "word": "pattern in bits 15 to 8, sign byte in bits 7 to 0; of equally near points the lowest word",
    "residual_scale": {"3": 2.04, "4": 3.45},
    "signs": {"generator": "philox4x32-10", "key": "seed", "streams": ["2 stream: inputs", "2 stream + 1: outputs"]},
    "rule": "W_i = scale_i diag(signs_out) Q_out codes Q_in^T diag(signs_in), rows of the i-th matrix",
}


def key(stack: str, piece: str) -> str:
    """The name of one of a stack's tensors in its file. No weight of a checkpoint has such a name."""
    return f"{stack}#{piece}"


def stack_tensors(
    stack: str, planes: Sequence[torch.Tensor], scales: torch.Tensor, signs: Sequence[torch.Tensor] = ()
) -> dict[str, torch.Tensor]:
    """The tensors of a stack by their names in its file; ``signs`` are ``(s_in, s_out)`` where they were trained."""
    named = {**dict(zip((CODES, SECOND), planes, strict=False)), SCALES: scales.to(torch.float32)}
    named |= {name: sign.to(torch.float16) for name, sign in zip((SIGNS_IN, SIGNS_OUT), signs, strict=False)}
    return {key(stack, piece): tensor.cpu().contiguous() for piece, tensor in named.items()}


def stack_entries(
    linears: Sequence[Linear], dtypes: Mapping[str, str], bits: int, rotation: Json, *, trained: bool
) -> dict[str, Json]:
    """The manifest's lines of the matrices of one stack, in their order."""
    stack, first = linears[0].name, 0
    columns = rotation["input_plan"]["n"]
    lines = {}
    for linear in linears:
        outputs = linear.outputs + (rotation["output_plan"]["n"] - rotation["outputs"] if not first else 0)
        lines[linear.name] = {
            "kind": "lattice",
            "coding": MATRIX,
            "file": codes_file(linear.block),
            "dtype": dtypes[linear.name],
            "shape": list(linear.shape),
            "stack": stack,
            "first": first,
            "bits": bits,
            "bytes": outputs * columns * bits // 8,
            "scale_bytes": SCALE_BYTES + (SIGN_BYTES * linear.outputs if trained else 0),
        }
        if linear.transposed:
            lines[linear.name]["transposed"] = True
        first += linear.outputs
    lines[stack]["rotation"] = rotation
    lines[stack]["pieces"] = [linear.name for linear in linears]
    if trained:
        lines[stack]["trained"] = True
        lines[stack]["scale_bytes"] += SIGN_BYTES * rotation["inputs"]
    return lines


def vector_entry(dtype: str, shape: Sequence[int], part: str, size: int) -> Json:
    """The line of a norm or head that was trained: stored as ``size`` bytes, and rounded to ``dtype`` when restored."""
    return {
        "kind": "lattice",
        "coding": VECTOR,
        "file": TUNED_FILE,
        "dtype": dtype,
        "shape": list(shape),
        "part": part,
        "bytes": size,
    }


def weigh(entry: Json) -> tuple[Mapping[str, int], int]:
    """Bytes by part of a line of kind ``lattice``, and the weights it stands for."""
    if entry["coding"] == VECTOR:
        return {entry["part"]: entry["bytes"]}, 0
    outputs, inputs = sides_of(entry)
    return {"codes": entry["bytes"], "scales": entry["scale_bytes"]}, outputs * inputs
