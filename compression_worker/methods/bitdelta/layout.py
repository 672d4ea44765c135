"""How BitDelta lies on disk: which file holds which tensor, in which order, and what that weighs, from shapes alone.

Codes of block ``i`` are in ``codes-<i>.safetensors``, one int32 tensor ``(ceil(K/32), N)`` per linear (see
``kernels.packing``). A linear of the published form has its scale in the fp32 vector ``scales`` of
``scales.safetensors`` and knows its place in it. A finer coding stacks its masks ``(masks, ceil(K/32), N)``, keeps its
scales in the bf16 vector ``fine``, mask by mask, from its place on, and a low-rank part as ``name#left`` and
``name#right`` beside the codes. All other tensors of the variant are as :mod:`compression_worker.deltas` stores them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from compression_worker import ledger
from compression_worker.architecture import Linear, describe
from compression_worker.artifact import make_manifest
from compression_worker.contracts import Json
from compression_worker.making.table import (
    DIGEST,
    RAW_FILE,
    book,
    codes_file,
    file_line,
    file_size,
    raw_entry,
    sides_of,
)
from compression_worker.methods.bitdelta.coding import Coding
from compression_worker.methods.bitdelta.config import BitDeltaConfig
from compression_worker.tensors import Spec
from kernels.packing import words_for

SCALES_FILE = "scales.safetensors"
SCALES, FINE = "scales", "fine"
LAYOUT: Json = {"name": "signs-along-k", "version": 1, "word_bits": 32, "lowest_bit_first": True, "sign_of_zero": 1}
FINER_LAYOUT: Json = LAYOUT | {"version": 2}
"""Of artifacts that hold any line with a coding of its own; all others stay as the first release wrote them."""


def codes_specs(linears: Iterable[tuple[Linear, Coding]]) -> dict[str, Spec]:
    """The header of one block's codes."""
    specs = {}
    for linear, coding in linears:
        words = (words_for(linear.inputs), linear.outputs)
        specs[linear.name] = Spec("I32", words if coding.masks == 1 else (coding.masks, *words))
        if coding.rank:
            specs[f"{linear.name}#left"] = Spec("BF16", (linear.outputs, coding.rank))
            specs[f"{linear.name}#right"] = Spec("BF16", (coding.rank, linear.inputs))
    return specs


def scales_specs(plain: int, fine: int) -> dict[str, Spec]:
    """The header of the scales: ``plain`` in fp32, ``fine`` in bf16; a vector without a value is left out."""
    vectors = {SCALES: Spec("F32", (plain,)), FINE: Spec("BF16", (fine,))}
    return {name: spec for name, spec in vectors.items() if spec.shape[0]}


def layout_of(codings: Iterable[Coding]) -> Json:
    return LAYOUT if all(coding.plain for coding in codings) else FINER_LAYOUT


def sign_entry(linear: Linear, dtype: str, place: int, sha256: str, coding: Coding) -> Json:
    """The manifest's line of a linear; ``place`` is where its scales begin in their vector."""
    entry = {
        "kind": "sign",
        "file": codes_file(linear.block),
        "dtype": dtype,
        "shape": list(linear.shape),
        "scale": place,
        "sha256": sha256,
    }
    if not coding.plain:
        entry["coding"] = coding.to_json()
    return entry | {"transposed": True} if linear.transposed else entry


def coding_of(entry: Json) -> Coding:
    """How a line's linear is coded."""
    return Coding(**entry["coding"]) if "coding" in entry else Coding()


def weigh(entry: Json) -> tuple[Mapping[str, int], int]:
    """Bytes by part of a line of kind ``sign``, and the weights it stands for."""
    outputs, inputs = sides_of(entry)
    return coding_of(entry).sizes(outputs, inputs), outputs * inputs


def predict(
    config: Json,
    settings: BitDeltaConfig | None = None,
    *,
    dtype: str = "BF16",
    side_files: Mapping[str, int] | None = None,
) -> list[Json]:
    """The ledger that compressing a variant with this config.json will give, manifest included, from shapes alone.

    ``side_files`` are the sizes of the files beside the weights. No tensor is assumed to equal the base's.
    """
    settings = settings or BitDeltaConfig()
    architecture = describe(config)
    tensors: dict[str, Json] = {}
    files: dict[str, Json] = {name: file_line(size) for name, size in (side_files or {}).items()}
    for index, linear in enumerate(architecture.linears()):
        tensors[linear.name] = sign_entry(linear, dtype, index, DIGEST, Coding())
    for block, linears in enumerate(architecture.blocks):
        if linears:
            files[codes_file(block)] = file_line(file_size(codes_specs((one, Coding()) for one in linears)))
    raw = {name: Spec(dtype, shape) for name, shape in architecture.shapes.items() if name not in tensors}
    count = len(tensors)
    tensors |= {name: raw_entry(spec, architecture.parts[name], DIGEST) for name, spec in raw.items()}
    files |= {SCALES_FILE: file_line(file_size(scales_specs(count, 0))), RAW_FILE: file_line(file_size(raw))}
    whole = {name: Spec(dtype, shape) for name, shape in architecture.shapes.items()}
    written = book(tensors, files, side_files or {}, {"source_bytes": file_size(whole), "parameters": 1}, weigh)
    return ledger.with_manifest(written["parts"], _manifest_bytes(tensors, files, written, settings))


_TYPICAL = 0.00123456


def _manifest_bytes(
    tensors: Mapping[str, Json], files: Mapping[str, Json], written: Json, settings: BitDeltaConfig
) -> int:
    """A manifest as long as the real one, but for a few digits."""
    linears = [name for name, tensor in tensors.items() if tensor["kind"] == "sign"]
    figures = {
        "matrices": [
            {"name": name, "scale0": _TYPICAL, "scale": _TYPICAL, "relative_error": 0.612345} for name in linears
        ],
        "distillation": {"losses": [_TYPICAL] * settings.distill_steps, "windows": 1000},
    }
    side = {"fingerprint": DIGEST, "checkpoint": DIGEST}
    raw = make_manifest(
        method="bitdelta",
        config=asdict(settings),
        seed=0,
        base=side,
        variant=side,
        files=files,
        tensors=tensors,
        aliases=[],
        layout=LAYOUT,
        book=written,
        figures=figures,
        side_files=[name for name in files if not name.endswith(".safetensors")],
        code_version="1",
        libraries={"torch": "2.13.0", "safetensors": "0.8.0"},
    )
    return len(raw)
