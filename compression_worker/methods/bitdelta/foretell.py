"""What an artifact with given codings will weigh, to the byte but for a few digits, before any of it is written."""

from __future__ import annotations

from collections.abc import Mapping

from compression_worker.architecture import Linear
from compression_worker.artifact import make_manifest
from compression_worker.contracts import Json, StepContext
from compression_worker.deltas.rows import pieces_shapes
from compression_worker.making.assembly import side_files
from compression_worker.making.inputs import opened
from compression_worker.making.table import (
    DIGEST,
    RAW_FILE,
    ROWS_FILE,
    base_entry,
    book,
    codes_file,
    file_line,
    file_size,
    raw_entry,
    same_as_base,
)
from compression_worker.methods.bitdelta import layout
from compression_worker.methods.bitdelta.coding import Coding
from compression_worker.tensors import Spec

TYPICAL = 0.00123456


def foretold_bytes(context: StepContext, codings: Mapping[str, Coding], rows: Mapping[str, tuple[str, int]]) -> int:
    """Bytes of the whole artifact. ``rows``: name -> coding and bytes of a tensor that may be coded by row."""
    base, variant = (opened(context, side) for side in ("base", "variant"))
    params = context.spec.params
    theirs, ours, parts = variant.manifest["tensors"], base.manifest["tensors"], params["parts"]
    linears = [Linear(**linear) for linear in params["linears"]]
    tensors, plain, fine = _linear_lines(linears, codings, theirs)
    raw: dict[str, Spec] = {}
    by_row: dict[str, Spec] = {}
    aliases = dict(variant.manifest["aliases"])
    for name, tensor in theirs.items():
        if name in tensors or name in aliases:
            continue
        spec = Spec(tensor["dtype"], tuple(tensor["shape"]))
        coding, size = rows.get(name, ("raw", 0))
        if same_as_base(ours.get(name), tensor):
            tensors[name] = base_entry(spec, DIGEST)
        elif coding == "raw":
            tensors[name] = raw_entry(spec, parts.get(name, "other"), DIGEST)
            raw[name] = spec
        else:
            by_row |= pieces_shapes(name, spec, coding)
            line = {"kind": "rows", "file": ROWS_FILE, "coding": coding, "changed": spec.shape[0], "bytes": size}
            tensors[name] = {**raw_entry(spec, parts[name], DIGEST), **line}
    side, shared = side_files(base, variant)
    sizes = variant.manifest["files"]
    files = {name: file_line(sizes[name]["size"]) for name in side}
    for block in {linear.block for linear in linears}:
        members = [(linear, codings[linear.name]) for linear in linears if linear.block == block]
        files[codes_file(block)] = file_line(file_size(layout.codes_specs(members)))
    files[layout.SCALES_FILE] = file_line(file_size(layout.scales_specs(plain, fine)))
    files[RAW_FILE] = file_line(file_size(raw))
    if by_row:
        stored = sum(size for coding, size in rows.values() if coding != "raw")
        files[ROWS_FILE] = file_line(file_size(by_row) - sum(spec.size for spec in by_row.values()) + stored)
    source = {"source_bytes": variant.manifest["weight_bytes"], "parameters": variant.manifest["parameters"]}
    written = book(tensors, files, side, source, layout.weigh)
    return sum(file["size"] for file in files.values()) + _manifest_bytes(
        context, tensors, files, written, list(side), shared, codings
    )


def _linear_lines(
    linears: list[Linear], codings: Mapping[str, Coding], theirs: Mapping[str, Json]
) -> tuple[dict[str, Json], int, int]:
    tensors: dict[str, Json] = {}
    plain = fine = 0
    for linear in linears:
        coding = codings[linear.name]
        place = plain if coding.plain else fine
        dtype = theirs[linear.name]["dtype"]
        tensors[linear.name] = layout.sign_entry(linear, dtype, place, DIGEST, coding)
        if coding.plain:
            plain += 1
        else:
            fine += coding.masks * coding.values(linear.outputs, linear.inputs)
    return tensors, plain, fine


def _manifest_bytes(
    context: StepContext,
    tensors: Mapping[str, Json],
    files: Mapping[str, Json],
    written: Json,
    side: list[str],
    shared: Mapping[str, Json],
    codings: Mapping[str, Coding],
) -> int:
    steps = context.spec.params["config"]["distill_steps"]
    figures = {
        "matrices": [
            {"name": name, "relative_error": 0.612345, "coding": coding.label, "bytes": 123_456}
            | ({"scale0": TYPICAL, "scale": TYPICAL} if coding.plain else {})
            for name, coding in codings.items()
        ],
        "distillation": {"losses": [TYPICAL] * steps, "windows": 1000} if steps else None,
        "target": {"ratio": 12.0, "expected": 12.0001},
    }
    pair = {"fingerprint": DIGEST, "checkpoint": DIGEST}
    raw = make_manifest(
        method="bitdelta",
        config=context.spec.params["config"],
        seed=context.spec.seed,
        base=pair,
        variant=pair,
        files=files,
        tensors=tensors,
        aliases=[],
        layout=layout.FINER_LAYOUT,
        book=written,
        figures=figures,
        side_files=[*side, *shared],
        shared=shared,
        code_version="1",
        libraries={"torch": "2.13.0+cpu", "safetensors": "0.8.0"},
    )
    return len(raw)
