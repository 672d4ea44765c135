"""What is no linear of a block: kept as it is, named where it equals the base's, or coded by changed row.

Norms, biases and everything unknown stay exact. Embeddings and output head are kept as well unless a coding by row is
asked for and the base has a tensor of that width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import Json, StepContext, StepOutput
from compression_worker.deltas.rows import CodedRows, code_rows, pieces_specs, rows_entry
from compression_worker.faults import failpoint
from compression_worker.making.blobs import write_pieces
from compression_worker.making.inputs import opened
from compression_worker.making.table import RAW_FILE, ROWS_FILE, relative_error, same_as_base
from compression_worker.tensors import Spec, TensorFiles, checkpoint_files, raw_bytes, write_file

BY_ROW = ("embeddings", "head")
"""Parts that may be coded by row."""


def keep_rest(context: StepContext, codings: Mapping[str, str]) -> StepOutput:
    """Every tensor that is not coded as a linear.

    ``codings``: the name of a tensor, or its part -> how its rows are coded (``raw``: not at all).

    The output's data: ``raw`` (name -> part), ``base`` (names equal to the base's), ``rows`` (table lines by name).
    """
    base, variant = (opened(context, name) for name in ("base", "variant"))
    parts, aliases = context.spec.params["parts"], dict(variant.manifest["aliases"])
    ours, theirs = base.manifest["tensors"], variant.manifest["tensors"]
    kept = [name for name in sorted(theirs) if parts.get(name) != "linears" and name not in aliases]
    same = [name for name in kept if same_as_base(ours.get(name), theirs[name])]
    chosen = {
        name: coding for name in kept if name not in same and (coding := _coding(name, parts, codings, base, variant))
    }
    raw = [name for name in kept if name not in {*same, *chosen}]
    with checkpoint_files(base) as base_files, checkpoint_files(variant) as files:
        rows_blob, rows, figures = _code(context, chosen, parts, base_files, files)
        with context.store.writer() as blob:
            data = {name: (_spec(theirs[name]), _watched(files, name, at, raw, context)) for at, name in enumerate(raw)}
            failpoint("delta.rest")
            write_file(blob, data)
    context.log(f"{len(raw)} tensors kept as they are, {len(same)} equal to the base's", "info")
    kinds = {name: parts.get(name, "other") for name in raw}
    output = {"raw": kinds, "base": same}
    if chosen:
        output |= {"rows": rows, "row_figures": figures}
    return StepOutput(blobs={RAW_FILE: blob.digest, **rows_blob}, data=output)


def _coding(name: str, parts: Json, codings: Mapping[str, str], base: Checkpoint, variant: Checkpoint) -> str:
    """How the rows of a tensor are coded; empty where they are not."""
    ours, theirs = base.manifest["tensors"].get(name), variant.manifest["tensors"][name]
    coding = codings.get(name, codings.get(parts.get(name, ""), "raw"))
    fits = ours and len(ours["shape"]) == len(theirs["shape"]) == 2 and ours["shape"][1] == theirs["shape"][1]
    return coding if fits and coding != "raw" else ""


def _code(
    context: StepContext, chosen: Mapping[str, str], parts: Json, base: TensorFiles, variant: TensorFiles
) -> tuple[dict[str, str], dict[str, Json], list[Json]]:
    """The file of coded rows (none where nothing is coded), its table lines, and figures for people."""
    pieces: dict[str, tuple[Spec, list[memoryview]]] = {}
    lines, figures = {}, []
    for name, coding in chosen.items():
        coded = code_rows(coding, base.file(name), variant.file(name), name)
        pieces |= pieces_specs(name, coded)
        lines[name] = rows_entry(variant.spec(name), parts[name], coding, coded, _digest(coded))
        total = lines[name]["shape"][0]
        context.log(f"'{name}': {coded.changed} of {total} rows changed, coded as {coding}", "info")
        figures.append(
            {
                "name": name,
                "relative_error": relative_error(coded.error, coded.energy),
                "coding": f"rows {coding}",
                "bytes": lines[name]["bytes"],
            }
        )
    if not chosen:
        return {}, {}, []
    return {ROWS_FILE: write_pieces(context, pieces)}, lines, figures


def _digest(coded: CodedRows) -> str:
    digest = hashlib.sha256()
    for piece in coded.pieces.values():
        digest.update(raw_bytes(piece))
    return digest.hexdigest()


def _watched(files: TensorFiles, name: str, at: int, names: list[str], context: StepContext) -> Iterator[memoryview]:
    yield from files.file(name).chunks(name)
    context.progress(at + 1, len(names), "tensors")


def _spec(tensor: Json) -> Spec:
    return Spec(tensor["dtype"], tuple(tensor["shape"]))
