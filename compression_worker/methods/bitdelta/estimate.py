"""What a BitDelta job will need, from shapes and settings alone: bytes by part, memory of each kind of step, work.

Extraction holds a few tiles and the codes of one block. Distillation holds, for ``P`` parameters of which ``L`` are
coded: the variant in float32 (``4 P``), the base as stored (``w L``) and the signs as bytes (``L``), the merged copy of
one matrix, and for the backward pass of ``B`` samples of ``T`` tokens what each layer keeps. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from compression_worker.contracts import Json
from compression_worker.methods.bitdelta.config import CHUNK_STEPS, BitDeltaConfig
from compression_worker.preflight import FLOAT, PROCESS_BYTES, Estimate, Inputs, Model, Shapes, StepLoad, halvings

TILE_BUFFERS = 20_000_000
"""Two threads with a tile of each side and their scratch."""
HIDDEN_KEPT, INNER_KEPT, LOGITS_KEPT = 12, 5, 5
"""Float32 vectors that the backward pass keeps for a token: of the hidden and the inner width in each layer, and of the
vocabulary once (teacher, student, their difference, its gradient and a copy)."""
STATE_VECTORS = 3
SENSED_TOKENS, TRIALS = 768, 24
"""Tokens that :mod:`.choose` looks at, and models that a target divergence costs about."""
STEP_DOCUMENT = 4_000
FINE = 2
ROW_BYTES = {"sign": 1 / 8, "int4": 0.5, "int8": 1.0}
"""Bytes of an element of embeddings and head that is coded by row, where every row changed."""
SIGN_LINE, RAW_LINE, FILE_LINE, FIGURE_LINE, FIXED_LINES = 262, 240, 118, 112, 1_900
"""Bytes of a manifest for a coded matrix, another tensor, a file, a matrix's figures, and the rest of it."""
LOSS_DIGITS = 10
HEADER_LINE = 118
SHORTEST_SEQUENCE, SMALLEST_BATCH = 16, 1


def estimate(config: BitDeltaConfig, inputs: Inputs) -> Estimate:
    """The whole job."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    parts = _parts(model, shapes, config)
    total = sum(part["bytes"] for part in parts)
    sizes = {
        "parameters": float(model.parameters),
        "kept_bytes": float(model.weight_bytes - round(_linears(model, shapes) * model.width)),
        "result_bytes": float(total),
    }
    return Estimate(
        parts=parts,
        source_bytes=model.weight_bytes,
        intermediate_bytes=_intermediates(model, shapes, config),
        steps=tuple(_loads(model, shapes, config, sizes)),
        sizes=sizes,
        exact=shapes is not None,
    )


def cheaper(config: BitDeltaConfig) -> Iterator[BitDeltaConfig]:
    """The same job for less memory, the changes that cost least first.

    A smaller batch, then shorter samples, then both at their smallest, and at last no distillation at all.
    """
    if not config.distill_steps:
        return
    for batch in halvings(config.batch_size, SMALLEST_BATCH):
        yield replace(config, batch_size=batch)
    for length in halvings(config.sequence_length, SHORTEST_SEQUENCE):
        yield replace(config, sequence_length=length)
    smallest = replace(config, batch_size=SMALLEST_BATCH)
    for length in halvings(config.sequence_length, SHORTEST_SEQUENCE):
        yield replace(smallest, sequence_length=length)
    yield replace(config, distill_steps=0)


def calmer(config: BitDeltaConfig) -> Iterator[BitDeltaConfig]:
    """What helps a distillation that diverged: a third of the learning rate; at last none."""
    if not config.distill_steps:
        return
    yield replace(config, learning_rate=float(f"{config.learning_rate / 3:.2g}"))
    yield replace(config, distill_steps=0)


def layer_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Weights compared and packed."""
    return float(sum(one["outputs"] * one["inputs"] for one in params["linears"]))


def sense_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Tokens looked at, forward and backward, times the parameters that each passes."""
    return float(SENSED_TOKENS * sizes["parameters"])


def measure_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Weights that every option is tried on."""
    linears = float(sum(one["outputs"] * one["inputs"] for one in params["linears"]))
    return linears or sizes["kept_bytes"]


def choose_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Weights coded again for each model that is measured; none for a target ratio."""
    measured = params["config"]["target_kl"] is not None
    return sizes["parameters"] * (TRIALS if measured else 1)


def rest_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes copied."""
    return sizes["kept_bytes"]


def distill_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Tokens trained on, times the parameters that each of them passes."""
    config = params["config"]
    tokens = (params["last"] - params["first"]) * config["batch_size"] * config["sequence_length"]
    return float(tokens * sizes["parameters"])


def assemble_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes hashed once more."""
    return sizes["result_bytes"]


def _linears(model: Model, shapes: Shapes | None) -> int:
    """Weights that are coded; all of them, where nothing is known."""
    return shapes.linears if shapes else model.parameters


def _words(inputs: int) -> int:
    return -(-inputs // 32)


def _parts(model: Model, shapes: Shapes | None, config: BitDeltaConfig) -> tuple[Json, ...]:
    """The ledger to come; the whole variant and one bit a weight where its shapes are not known."""
    if shapes is None:
        sizes = {"codes": model.parameters // 8, "other": model.weight_bytes, "side files": model.side_bytes}
        return tuple({"name": name, "bytes": size} for name, size in sizes.items())
    matrices = shapes.layers * len(shapes.block)
    width = model.width
    codes, scales = _coded(shapes, config)
    sizes = {
        "codes": codes,
        "scales": scales,
        "embeddings": round(shapes.embeddings * ROW_BYTES.get(config.embeddings, width)),
        "head": round(shapes.head * ROW_BYTES.get(config.embeddings, width)),
        "norms": round(shapes.norms * width),
        "other": round(shapes.other * width),
        "headers": HEADER_LINE * (matrices + shapes.tensors),
        "side files": model.side_bytes,
        "manifest": FIXED_LINES
        + (SIGN_LINE + FIGURE_LINE) * matrices
        + RAW_LINE * shapes.tensors
        + FILE_LINE * shapes.layers
        + LOSS_DIGITS * config.distill_steps,
    }
    if config.target_ratio:
        by_row = {"embeddings", "head"}
        sizes |= {name: sizes[name] // 16 for name in by_row}
        rest = sum(size for name, size in sizes.items() if name != "codes")
        sizes["codes"] = max(0, round(model.weight_bytes / config.target_ratio) - rest)
    return tuple({"name": name, "bytes": size} for name, size in sizes.items() if size)


def _coded(shapes: Shapes, config: BitDeltaConfig) -> tuple[int, int]:
    """Bytes of codes and of scales of all linears, by the settings; a target has bytes of its own to meet."""
    codes = scales = 0
    for one in shapes.block:
        values = {"tensor": 1, "row": one.outputs, "column": one.inputs}.get(config.scale)
        groups = one.outputs * -(-one.inputs // config.group_size)
        plain = config.scale == "tensor" and config.masks == 1 and not config.residual_rank
        codes += config.masks * 4 * _words(one.inputs) * one.outputs
        codes += FINE * min(config.residual_rank, one.outputs, one.inputs) * (one.outputs + one.inputs)
        scales += FLOAT if plain else FINE * config.masks * (groups if values is None else values)
    return shapes.layers * codes, shapes.layers * scales


def _chunks(config: BitDeltaConfig) -> int:
    return -(-config.distill_steps // CHUNK_STEPS)


def _intermediates(model: Model, shapes: Shapes | None, config: BitDeltaConfig) -> int:
    """States of the training and the documents of the steps; codes and kept tensors become the artifact's own files."""
    matrices = shapes.layers * len(shapes.block) if shapes else model.parameters // 10_000
    state = STATE_VECTORS * FLOAT * matrices + 24 * matrices
    documents = STEP_DOCUMENT * ((shapes.layers if shapes else 100) + 3) + 300 * matrices
    return _chunks(config) * (state + LOSS_DIGITS * config.distill_steps + STEP_DOCUMENT) + documents


def _loads(
    model: Model, shapes: Shapes | None, config: BitDeltaConfig, sizes: Mapping[str, float]
) -> Iterator[StepLoad]:
    linears = _linears(model, shapes)
    blocks = shapes.layers if shapes else 1
    yield StepLoad(kind="bitdelta.plan", count=1, units=1.0)
    if config.senses:
        yield from _choosing(model, shapes, config, sizes)
    codes = PROCESS_BYTES + TILE_BUFFERS + linears // blocks // 4 + _whole_matrices(shapes, config)
    yield StepLoad(kind="bitdelta.layer", count=blocks, units=float(linears), memory_bytes=codes, gpu_host_bytes=codes)
    yield StepLoad(kind="bitdelta.rest", count=1, units=sizes["kept_bytes"])
    if config.distill_steps:
        yield _distillation(model, shapes, config)
    # Errors that distillation left are taken from whole matrices, where the coding is finer than the published one.
    finer = _whole_matrices(shapes, config) if config.distill_steps else 0
    memory = PROCESS_BYTES + finer if finer else 0
    yield StepLoad(kind="bitdelta.assemble", count=1, units=sizes["result_bytes"], memory_bytes=memory)


def _whole_matrices(shapes: Shapes | None, config: BitDeltaConfig) -> int:
    """Finer codings hold whole matrices in fp32: two in flight, each with its rest and a mask spread out."""
    plain = config.scale == "tensor" and config.masks == 1 and not config.residual_rank
    if shapes is None or (plain and not config.senses):
        return 0
    return 2 * 4 * FLOAT * max(one.elements for one in shapes.block)


def _choosing(
    model: Model, shapes: Shapes | None, config: BitDeltaConfig, sizes: Mapping[str, float]
) -> Iterator[StepLoad]:
    """What has to be known first: the variant with one backward pass, every option of every matrix, the choice."""
    whole = FLOAT * model.parameters + _kept(shapes, replace(config, batch_size=2))
    tokens = SENSED_TOKENS
    yield StepLoad(
        kind="bitdelta.sense",
        count=1,
        units=float(tokens * model.parameters),
        memory_bytes=PROCESS_BYTES + model.weight_bytes + whole,
        gpu_bytes=whole,
        gpu_host_bytes=PROCESS_BYTES + model.weight_bytes + FLOAT * model.parameters,
    )
    if not config.chooses:
        return
    blocks = shapes.layers if shapes else 1
    matrices = PROCESS_BYTES + _whole_matrices(shapes, config)
    units = _linears(model, shapes) + sizes["kept_bytes"]
    yield StepLoad(kind="bitdelta.measure", count=blocks + 1, units=units, memory_bytes=matrices)
    logits = 0
    if config.target_kl is not None:
        logits = FLOAT * (model.parameters + 3 * tokens * (shapes.vocabulary if shapes else 0))
    yield StepLoad(
        kind="bitdelta.choose",
        count=1,
        units=choose_work({"config": {"target_kl": config.target_kl}}, sizes),
        memory_bytes=matrices + logits,
        gpu_bytes=logits,
        gpu_host_bytes=matrices + logits,
    )


def _distillation(model: Model, shapes: Shapes | None, config: BitDeltaConfig) -> StepLoad:
    linears = _linears(model, shapes)
    largest = max(one.elements for one in shapes.block) if shapes else 0
    # Where nothing is known it may be a mixture, whose merged experts are kept for the backward pass.
    experts = 0 if shapes else FLOAT * linears
    models = FLOAT * model.parameters + round(model.width * linears) + linears + experts
    training = models + 2 * FLOAT * largest + _kept(shapes, config)
    loading = PROCESS_BYTES + model.weight_bytes
    tokens = config.distill_steps * config.batch_size * config.sequence_length
    return StepLoad(
        kind="bitdelta.distill",
        count=_chunks(config),
        units=float(tokens * model.parameters),
        memory_bytes=loading + training,
        gpu_bytes=training,
        gpu_host_bytes=loading + FLOAT * model.parameters,
    )


def _kept(shapes: Shapes | None, config: BitDeltaConfig) -> int:
    """What the backward pass keeps. Attention keeps its weights, one for each pair of tokens and head."""
    if shapes is None:
        return 0
    tokens = config.batch_size * config.sequence_length
    layer = tokens * (HIDDEN_KEPT * shapes.hidden + INNER_KEPT * shapes.inner)
    attention = config.batch_size * shapes.heads * config.sequence_length**2
    return FLOAT * (shapes.layers * (layer + attention) + LOGITS_KEPT * tokens * shapes.vocabulary)
