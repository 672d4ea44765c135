"""What is no linear of a block stays as it is, in a file that transformers can read by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from compression_worker import gate
from compression_worker.architecture import Architecture
from compression_worker.artifact import QUANTIZATION
from compression_worker.checkpoints import Checkpoint
from compression_worker.contracts import CompressionError, Json, PlannedStep, StepContext, StepOutput, canonical_json
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import RAW_FILE
from compression_worker.tensors import Spec, checkpoint_files, write_file

TRANSFORMERS = {"format": "pt"}
"""The metadata without which transformers refuses a safetensors file."""


def checked_source(checkpoint: Checkpoint) -> Architecture:
    """The architecture of ``checkpoint``, whose tensors hold what its config.json promises. Reads no weight."""
    architecture = architecture_of(checkpoint)
    tensors = checkpoint.manifest["tensors"]
    for linear in architecture.linears():
        where = f"'{linear.name}' of transformer block {linear.block}"
        if linear.name not in tensors:
            raise CompressionError("missing_tensor", f"{where} is missing, and config.json promises it")
        one = tensors[linear.name]
        if tuple(one["shape"]) != linear.shape:
            raise CompressionError(
                "shape_mismatch", f"{where} is {one['shape']} and {list(linear.shape)} by config.json: import it again"
            )
        if one["dtype"] not in ("BF16", "F16", "F32"):
            raise CompressionError("wrong_dtype", f"{where} has dtype {one['dtype']}; BF16, F16 and F32 are known")
    return architecture


def rest_planned(variant: str, parts: Mapping[str, str], tuned: Mapping[str, str] | None = None) -> PlannedStep:
    """The step that keeps what no method codes.

    ``tuned``: steps, under names that begin with ``tuned``. What their outputs list as ``tuned`` they have changed, and
    it is not kept here.
    """
    return PlannedStep(
        name="rest",
        kind="quantization.rest",
        group="rest",
        params={"parts": dict(parts)},
        inputs={"variant": variant, **(tuned or {})},
    )


def rest_step(context: StepContext) -> StepOutput:
    """Every tensor that is no block linear, as it is. The output's data: ``raw`` (name -> part)."""
    variant = opened(context, "variant")
    parts, aliases = context.spec.params["parts"], dict(variant.manifest["aliases"])
    tensors = variant.manifest["tensors"]
    steps = (context.input(name) for name in context.spec.inputs if name.startswith("tuned"))
    left = {*aliases, *(name for step in steps for name in step.data["tuned"])}
    names = [name for name in sorted(tensors) if parts.get(name) != "linears" and name not in left]
    with checkpoint_files(variant) as files, context.store.writer() as blob:

        def watched(at: int, name: str) -> Iterator[memoryview]:
            yield from files.file(name).chunks(name)
            context.progress(at + 1, len(names), "tensors")

        data = {
            name: (Spec(tensors[name]["dtype"], tuple(tensors[name]["shape"])), watched(at, name))
            for at, name in enumerate(names)
        }
        write_file(blob, data, TRANSFORMERS)
    context.log(f"{len(names)} tensors kept as they are", "info")
    return StepOutput(blobs={RAW_FILE: blob.digest}, data={"raw": {name: parts.get(name, "other") for name in names}})


def loadable(
    context: StepContext, quantization: Json, raw: Iterable[str], coded: Mapping[str, str], size: int
) -> dict[str, str]:
    """config.json that says how the weights are quantized, and the index that says in which file each tensor lies.

    ``coded`` maps a tensor of the method's own files to its file; ``size`` is all of them in bytes. The digests, by
    name of file.
    """
    config = {**opened(context, "variant").manifest["config"], QUANTIZATION: quantization}
    weight_map = {**dict.fromkeys(raw, RAW_FILE), **coded}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return {
        "config.json": context.store.write_bytes(canonical_json(config)),
        gate.INDEX_FILE: context.store.write_bytes(canonical_json(index)),
    }
