"""Base and variant as the two sides of a delta: do they fit, what differs, and both open for reading.

Every delta method begins here. A refusal comes before any weight is read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from compression_worker.architecture import Architecture, Linear, describe
from compression_worker.checkpoints import Checkpoint, tokenizer_differs
from compression_worker.contracts import CompressionError, Json, StepContext
from compression_worker.making.inputs import architecture_of, opened
from compression_worker.making.table import same_as_base
from compression_worker.tensors import TensorFiles, checkpoint_files


def check_pair(base: Checkpoint, variant: Checkpoint, context: StepContext) -> Architecture:
    """Refuse a base on which the variant's delta cannot stand; say what differs and is handled."""
    ours, theirs = base.manifest, variant.manifest
    if ours["architecture"] != theirs["architecture"]:
        raise CompressionError(
            "architecture_mismatch",
            f"the base is a {ours['architecture']} and the variant a {theirs['architecture']}: a delta needs one "
            "architecture. Choose the base that the variant was tuned from",
        )
    architecture = architecture_of(variant)
    _check_blocks(len(architecture.blocks), len(describe(ours["config"]).blocks))
    for linear in architecture.linears():
        _check_linear(linear, ours["tensors"].get(linear.name), theirs["tensors"].get(linear.name))
    _say_what_differs(base, variant, architecture, context)
    return architecture


def without_equal(
    architecture: Architecture, base: Checkpoint, variant: Checkpoint, context: StepContext
) -> Architecture:
    """The architecture without the linears that are byte-equal in base and variant: those are part of the rest.

    Experts of a mixture stay, because they are one tensor in memory.
    """
    ours, theirs = base.manifest["tensors"], variant.manifest["tensors"]
    together = architecture.stacked()
    names = [linear.name for linear in architecture.linears() if linear.name not in together]
    equal = [name for name in names if same_as_base(ours[name], theirs[name])]
    if not equal:
        return architecture
    more = f", and {len(equal) - 1} more matrices are" if len(equal) > 1 else ""
    context.log(f"'{equal[0]}' is equal in base and variant{more}: it is the base's own and costs nothing", "info")
    return replace(
        architecture,
        blocks=tuple(tuple(one for one in block if one.name not in {*equal}) for block in architecture.blocks),
        parts=architecture.parts | dict.fromkeys(equal, "other"),
    )


@contextlib.contextmanager
def open_pair(context: StepContext, names: Iterable[str]) -> Iterator[tuple[TensorFiles, TensorFiles]]:
    """The files of base and variant, open; those that hold ``names`` at once, so that threads find them open."""
    base, variant = (opened(context, name) for name in ("base", "variant"))
    with checkpoint_files(base) as ours, checkpoint_files(variant) as theirs:
        for name in names:
            ours.file(name), theirs.file(name)
        yield ours, theirs


def whole_delta(linear: Linear, base: TensorFiles, variant: TensorFiles) -> torch.Tensor:
    """``D (N, K)`` in fp32."""
    delta = variant.file(linear.name).tensor(linear.name).to(torch.float32)
    delta -= base.file(linear.name).tensor(linear.name).to(torch.float32)
    return delta.T.contiguous() if linear.transposed else delta


def _check_blocks(variant: int, base: int) -> None:
    if variant != base:
        raise CompressionError(
            "shape_mismatch",
            f"the base has {base} transformer blocks and the variant {variant}: choose the base that the variant was "
            "tuned from",
        )


def _check_linear(linear: Linear, base: Json | None, variant: Json | None) -> None:
    where = f"'{linear.name}' of transformer block {linear.block}"
    if variant is None:
        raise CompressionError("missing_tensor", f"{where} is missing in the variant, whose config.json promises it")
    if base is None:
        raise CompressionError("missing_tensor", f"{where} is missing in the base: a delta needs both sides")
    if base["shape"] != variant["shape"] or tuple(variant["shape"]) != linear.shape:
        raise CompressionError(
            "shape_mismatch",
            f"{where} is {base['shape']} in the base, {variant['shape']} in the variant and {list(linear.shape)} by "
            "config.json: choose the base that the variant was tuned from",
        )
    for side in (base, variant):
        if side["dtype"] not in ("BF16", "F16", "F32"):
            raise CompressionError("wrong_dtype", f"{where} has dtype {side['dtype']}; BF16, F16 and F32 are known")


def _say_what_differs(base: Checkpoint, variant: Checkpoint, architecture: Architecture, context: StepContext) -> None:
    ours, theirs = base.manifest, variant.manifest
    before, after = ours["config"].get("vocab_size"), theirs["config"].get("vocab_size")
    if before != after:
        context.log(
            f"the vocabulary goes from {before} to {after} tokens: the variant's embeddings are kept whole", "info"
        )
    if tokenizer_differs(ours, theirs):
        context.log("base and variant have different tokenizers: the artifact carries the variant's", "warning")
    unknown = sorted(theirs["tensors"].keys() - architecture.shapes.keys() - dict(theirs["aliases"]).keys())
    if unknown:
        context.log(
            f"{len(unknown)} tensors are no part of the architecture and are kept whole: {unknown[0]} …", "warning"
        )
