"""BitDelta (arXiv:2402.10193): a fine-tune as the sign of its delta, one bit a weight, and one scale per matrix.

``D = W_f - W_b``; ``S = +1`` unless ``D < 0``; ``scale0 = mean |D|``, which minimises ``sum (|D| - scale)^2``.
Scales are then distilled: Adam on the squared difference between the logits of the variant and those of base plus
``scale * S``.
Every linear ``(N, K)`` of the transformer blocks is coded; all other tensors of the variant are kept as they are.

A job is the list of steps that :func:`plan_step` makes: one per block, one for the rest, chunks of distillation, and
the assembly of the artifact. Each reads and writes the store by digest and holds a few tiles of a matrix at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch

from compression_worker import gate
from compression_worker.architecture import Architecture, Linear, describe
from compression_worker.artifact import MANIFEST, Artifact, make_manifest
from compression_worker.checkpoints import Checkpoint, tokenizer_differs
from compression_worker.contracts import (
    CODE_VERSION,
    CompressionError,
    Json,
    PlannedStep,
    StepContext,
    StepOutput,
    sha256,
)
from compression_worker.faults import failpoint
from compression_worker.methods.bitdelta import layout
from compression_worker.methods.bitdelta.config import CHUNK_STEPS, BitDeltaConfig
from compression_worker.methods.bitdelta.merge import Merged, load_model
from compression_worker.methods.bitdelta.training import distill_step
from compression_worker.store import Store
from compression_worker.tensors import (
    Spec,
    TensorFiles,
    checkpoint_files,
    header_bytes,
    raw_bytes,
    write_file,
)
from kernels.sign_pack.reference import TILE_ELEMENTS, SignPack, sign_pack, sign_pack_tiles

__all__ = ["assemble_step", "distill_step", "layer_step", "load_model", "open_merged", "plan_step", "rest_step"]

METHOD = "bitdelta"


def plan_step(context: StepContext) -> StepOutput:
    """Check that base and variant fit, and list the steps. Reads no weight."""
    inputs = dict(context.spec.inputs)
    config = parse_config(context.spec.params["config"])
    if config.distill_steps and "calibration" not in inputs:
        raise CompressionError(
            "no_calibration",
            "distillation needs a text set to calibrate on: give one, or set distill_steps to 0 for the initial scales",
        )
    base, variant = (Checkpoint.open(context.store, inputs[name]) for name in ("base", "variant"))
    architecture = check_pair(base, variant, context)
    pair = {name: inputs[name] for name in ("base", "variant")}
    steps = _extraction_steps(architecture, pair)
    extracted = {step.name.replace(" ", "-"): f"@{index}" for index, step in enumerate(steps)}
    layers = {name: place for name, place in extracted.items() if name != "rest"}
    steps += _distillation_steps(config, pair | layers, inputs.get("calibration", ""), len(steps), context.spec.seed)
    last = {"distillation": f"@{len(steps) - 1}"} if config.distill_steps else {}
    params = {"config": asdict(config), "layers": list(layers)}
    steps.append(
        PlannedStep(
            name="assemble",
            kind="bitdelta.assemble",
            group="assemble",
            params=params,
            inputs=pair | extracted | last,
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
    return BitDeltaConfig(**value)


def check_pair(base: Checkpoint, variant: Checkpoint, context: StepContext) -> Architecture:
    """Refuse a base on which the variant's delta cannot stand; say what differs and is handled."""
    ours, theirs = base.manifest, variant.manifest
    if ours["architecture"] != theirs["architecture"]:
        raise CompressionError(
            "architecture_mismatch",
            f"the base is a {ours['architecture']} and the variant a {theirs['architecture']}: a delta needs one "
            "architecture. Choose the base that the variant was tuned from",
        )
    architecture = describe(theirs["config"]).renamed_for(theirs["tensors"])
    _check_blocks(len(architecture.blocks), len(describe(ours["config"]).blocks))
    for linear in architecture.linears():
        _check_linear(linear, ours["tensors"].get(linear.name), theirs["tensors"].get(linear.name))
    _say_what_differs(base, variant, architecture, context)
    return architecture


def layer_step(context: StepContext) -> StepOutput:
    """The codes and initial scales of one transformer block."""
    linears = [Linear(**linear) for linear in context.spec.params["linears"]]
    coded: dict[str, Json] = {}
    with _open_pair(context) as (base, variant), context.store.writer() as blob:
        blob.write(header_bytes(layout.codes_specs(linears)))
        # Two matrices in flight at most; each is cut into tiles that stay in one core's cache.
        threads = min(2, torch.get_num_threads())
        with _one_thread_per_operation():
            packed = _each(threads)(lambda one: _pack(one, base, variant), linears)
            for linear, signs in zip(linears, packed, strict=True):
                failpoint("bitdelta.matrix")
                words = raw_bytes(signs.packed)
                blob.write(words)
                coded[linear.name] = _layer_line(linear, signs, sha256(words))
                context.progress(len(coded), len(linears), "matrices")
    for name, line in coded.items():
        if not line["sum_abs"]:
            context.log(f"'{name}' is equal in base and variant: its scale is 0", "warning")
    return StepOutput(blobs={layout.codes_file(linears[0].block): blob.digest}, data={"linears": coded})


def rest_step(context: StepContext) -> StepOutput:
    """Every tensor that is not coded, as it is; what is byte-equal to the base's is only named."""
    base, variant = (_checkpoint(context, name) for name in ("base", "variant"))
    parts, aliases = context.spec.params["parts"], dict(variant.manifest["aliases"])
    ours, theirs = base.manifest["tensors"], variant.manifest["tensors"]
    kept = [name for name in sorted(theirs) if parts.get(name) != "linears" and name not in aliases]
    same = [name for name in kept if all(theirs[name][key] == ours.get(name, {}).get(key) for key in _IDENTITY)]
    raw = [name for name in kept if name not in set(same)]
    with checkpoint_files(variant) as files, context.store.writer() as blob:
        data = {name: (_spec(theirs[name]), _watched(files, name, at, raw, context)) for at, name in enumerate(raw)}
        failpoint("bitdelta.rest")
        write_file(blob, data)
    context.log(f"{len(raw)} tensors kept as they are, {len(same)} equal to the base's", "info")
    kinds = {name: parts.get(name, "other") for name in raw}
    return StepOutput(blobs={layout.RAW_FILE: blob.digest}, data={"raw": kinds, "base": same})


def assemble_step(context: StepContext) -> StepOutput:
    """Put the artifact together: final scales, side files and the manifest; every file is hashed once more."""
    variant = Checkpoint.open(context.store, context.spec.inputs["variant"])
    layers = [context.input(name) for name in context.spec.params["layers"]]
    rest = context.input("rest")
    distillation = context.input("distillation") if "distillation" in context.spec.inputs else None
    lines = {name: line for layer in layers for name, line in layer.data["linears"].items()}
    scales = _final_scales(lines, distillation)
    with context.store.writer() as blob:
        write_file(blob, {layout.SCALES: (layout.scales_specs(len(lines))[layout.SCALES], [raw_bytes(scales)])})
    failpoint("artifact.scales")
    side = {
        name: entry["sha256"]
        for name, entry in variant.manifest["files"].items()
        if not name.endswith(".safetensors") and name not in (gate.INDEX_FILE, MANIFEST)
    }
    blobs = {name: digest for layer in layers for name, digest in layer.blobs.items()}
    blobs |= {**rest.blobs, layout.SCALES_FILE: blob.digest, **side}
    verified = _each(min(2, torch.get_num_threads()))(context.store.verify, blobs.values())
    for done, _ in enumerate(verified, start=1):
        context.progress(done, len(blobs), "files")
    files = {name: {"sha256": digest, "size": context.store.size(digest)} for name, digest in blobs.items()}
    raw = _manifest(context, variant, files, lines, rest, scales, distillation, sorted(side))
    failpoint("artifact.manifest")
    digest = context.store.write_bytes(raw)
    return StepOutput(blobs={**blobs, MANIFEST: digest}, data=_result(context, digest))


def open_merged(base: Checkpoint, artifact: Artifact) -> Merged:
    """The tensors of the compressed model, for a restore."""
    return Merged(base, artifact)


_IDENTITY = ("dtype", "shape", "sha256")


def _extraction_steps(architecture: Architecture, pair: dict[str, str]) -> list[PlannedStep]:
    steps = [
        PlannedStep(
            name=f"layer {block}",
            kind="bitdelta.layer",
            group="layer",
            params={"linears": [asdict(linear) for linear in linears]},
            inputs=pair,
        )
        for block, linears in enumerate(architecture.blocks)
        if linears
    ]
    rest = PlannedStep(
        name="rest", kind="bitdelta.rest", group="rest", params={"parts": architecture.parts}, inputs=pair
    )
    return [*steps, rest]


def _distillation_steps(
    config: BitDeltaConfig, inputs: dict[str, str], calibration: str, first_index: int, seed: int
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
                inputs={**inputs, "calibration": calibration, **before},
                seed=seed,
            )
        )
    return steps


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


def _checkpoint(context: StepContext, name: str) -> Checkpoint:
    return _opened(context.store, context.spec.inputs[name])


@lru_cache(maxsize=4)
def _opened(store: Store, digest: str) -> Checkpoint:
    """Remembered, because every layer of a job asks for the same two manifests."""
    return Checkpoint.open(store, digest)


@contextlib.contextmanager
def _open_pair(context: StepContext) -> Iterator[tuple[TensorFiles, TensorFiles]]:
    base, variant = (_checkpoint(context, name) for name in ("base", "variant"))
    with checkpoint_files(base) as ours, checkpoint_files(variant) as theirs:
        # Opened here: threads then find the files open.
        for name in (linear["name"] for linear in context.spec.params["linears"]):
            ours.file(name), theirs.file(name)
        yield ours, theirs


@contextlib.contextmanager
def _one_thread_per_operation() -> Iterator[None]:
    """Parallel over matrices instead of inside each operation, which is too short to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Buffers(threading.local):
    """Memory of one thread for a tile of each side."""

    def __init__(self) -> None:
        self.pair = tuple(torch.empty(4 * TILE_ELEMENTS, dtype=torch.uint8) for _ in range(2))


_BUFFERS = _Buffers()


def _each(threads: int) -> Callable[..., Iterator[Any]]:
    """``map`` on that many threads; on one it is this one, so that a worker of one thread takes one core."""
    return _pool(threads).map if threads > 1 else map


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for the life of the process, which keep their buffers from one block to the next."""
    return ThreadPoolExecutor(threads)


def _pack(linear: Linear, base: TensorFiles, variant: TensorFiles) -> SignPack:
    ours, theirs = base.file(linear.name), variant.file(linear.name)
    if linear.transposed:
        signs = sign_pack(ours.tensor(linear.name).T, theirs.tensor(linear.name).T)
    else:
        rows = max(1, TILE_ELEMENTS // linear.inputs)
        one, other = _BUFFERS.pair
        tiles = zip(ours.row_tiles(linear.name, rows, one), theirs.row_tiles(linear.name, rows, other), strict=True)
        signs = sign_pack_tiles(tiles, linear.outputs, linear.inputs)
    # A sum of finite numbers is finite here unless one of them is not.
    if not torch.tensor(signs.sum_squares).isfinite():
        raise CompressionError("not_finite", f"the delta of '{linear.name}' is not finite: base or variant is damaged")
    return signs


def _layer_line(linear: Linear, signs: SignPack, digest: str) -> Json:
    elements = linear.outputs * linear.inputs
    scale = torch.tensor(signs.sum_abs / elements, dtype=torch.float32)
    return {
        "linear": asdict(linear),
        "scale": float(scale),
        "sum_abs": signs.sum_abs,
        "sum_squares": signs.sum_squares,
        "sha256": digest,
    }


def _watched(files: TensorFiles, name: str, at: int, names: list[str], context: StepContext) -> Iterator[memoryview]:
    yield from files.file(name).chunks(name)
    context.progress(at + 1, len(names), "tensors")


def _spec(tensor: Json) -> Spec:
    return Spec(tensor["dtype"], tuple(tensor["shape"]))


def _final_scales(lines: dict[str, Json], distillation: StepOutput | None) -> torch.Tensor:
    values = distillation.data["scales"] if distillation else [line["scale"] for line in lines.values()]
    return torch.tensor(values, dtype=torch.float32)


def _manifest(
    context: StepContext,
    variant: Checkpoint,
    files: dict[str, Json],
    lines: dict[str, Json],
    rest: StepOutput,
    scales: torch.Tensor,
    distillation: StepOutput | None,
    side: list[str],
) -> bytes:
    base = Checkpoint.open(context.store, context.spec.inputs["base"])
    theirs = variant.manifest["tensors"]
    tensors: dict[str, Json] = {}
    for index, (name, line) in enumerate(lines.items()):
        tensors[name] = layout.sign_entry(Linear(**line["linear"]), theirs[name]["dtype"], index, line["sha256"])
    for name, part in rest.data["raw"].items():
        tensors[name] = layout.raw_entry(_spec(theirs[name]), part, theirs[name]["sha256"])
    for name in rest.data["base"]:
        tensors[name] = layout.base_entry(_spec(theirs[name]), theirs[name]["sha256"])
    source = {"source_bytes": variant.manifest["weight_bytes"], "parameters": variant.manifest["parameters"]}
    return make_manifest(
        method=METHOD,
        config=context.spec.params["config"],
        seed=context.spec.seed,
        base={"fingerprint": base.fingerprint, "checkpoint": base.digest},
        variant={"fingerprint": variant.fingerprint, "checkpoint": variant.digest},
        files=files,
        tensors=tensors,
        aliases=variant.manifest["aliases"],
        layout=layout.LAYOUT,
        book=layout.book(tensors, files, side, source),
        figures=_figures(lines, scales, distillation),
        side_files=side,
        code_version=CODE_VERSION,
        libraries={name: version(name) for name in ("safetensors", "torch")},
    )


def _figures(lines: dict[str, Json], scales: torch.Tensor, distillation: StepOutput | None) -> Json:
    matrices = []
    for (name, line), scale in zip(lines.items(), scales.tolist(), strict=True):
        elements = line["linear"]["outputs"] * line["linear"]["inputs"]
        sums = line["sum_abs"], line["sum_squares"]
        matrices.append(layout.matrix_figures(name, line["scale"], scale, *sums, elements))
    curve = distillation.data["curve"] if distillation else None
    return {"matrices": matrices, "distillation": curve}


def _result(context: StepContext, digest: str) -> Json:
    """What the dashboard records of the artifact."""
    artifact = Artifact.open_store(context.store, digest)
    summary = artifact.summary()
    steps = summary["config"]["distill_steps"]
    return {
        "artifact": digest,
        "name_hint": f"{METHOD}-{steps}-steps" if steps else f"{METHOD}-initial",
        "ledger": summary.pop("parts"),
        "figures": artifact.manifest["figures"],
        **summary,
    }
