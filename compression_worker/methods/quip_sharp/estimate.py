"""What a QuIP# job will need, from shapes and settings alone: bytes by part, memory of steps, work. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from compression_worker.contracts import Json
from compression_worker.methods.quip_sharp.config import QuipSharpConfig
from compression_worker.preflight import (
    FLOAT,
    PROCESS_BYTES,
    Estimate,
    Inputs,
    Matrix,
    Model,
    Shapes,
    StepLoad,
    halvings,
)
from compression_worker.quantization import estimate as shared

WORD = 8
SCALE_BYTES, SIGN_BYTES = 4, 2
LINE, STACK_LINE, FIGURES, RAW_LINE, FILE_LINE, FIXED_LINES = 190, 330, 250, 200, 110, 3_200
HEADER_LINE, INDEX_LINE = 190, 130
STEP_DOCUMENT = 14_000
MATRIX_COPIES = 9
"""fp32 copies of a stack in flight: as read, stacked, rotated, its targets, errors, values, and what is turned back."""
HESSIAN_COPIES = 6
ROUNDING = {2: 60, 3: 200, 4: 130}
"""Multiplications that rounding eight weights costs, over eight, by bits."""
FEWEST_TOKENS = 256
STACKS = 3
"""Stacks of a block after which it is trained."""
PASSES = 3
"""A pass forward and back, in passes forward."""
TRAINED_COPIES = 4
"""fp32 copies of what is trained: values, gradients, and the optimizer's two."""
CHUNK_WINDOWS = 32
"""Windows of a step of end-to-end fine-tuning."""


def estimate(config: QuipSharpConfig, inputs: Inputs) -> Estimate:
    """The whole job."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    parts = _parts(model, shapes, config)
    linears = shapes.linears if shapes else model.parameters
    sizes = shared.calibration_sizes(model, shapes, config.samples, config.length) | {
        "parameters": float(model.parameters),
        "windows": float(config.samples),
        "kept_bytes": float(model.weight_bytes - round(linears * model.width)),
        "result_bytes": float(sum(part["bytes"] for part in parts)),
    }
    return Estimate(
        parts=parts,
        source_bytes=model.weight_bytes,
        intermediate_bytes=shared.intermediate_bytes(sizes, hessians=True) + STEP_DOCUMENT * 12,
        steps=tuple(_loads(config, model, shapes, sizes)),
        sizes=sizes,
        exact=shapes is not None,
    )


def cheaper(config: QuipSharpConfig) -> Iterator[QuipSharpConfig]:
    """The same job for less memory: fewer windows, of which the hidden states are kept; matrices one by one."""
    for samples in halvings(config.samples, 2 if config.tunes_blocks else 1):
        if samples * config.length >= FEWEST_TOKENS:
            yield replace(config, samples=samples)
    if config.fuse:
        yield replace(config, fuse=False)


def calmer(config: QuipSharpConfig) -> Iterator[QuipSharpConfig]:
    """What helps a job that failed on its numbers: more damping, and smaller steps where it trains."""
    if config.damping < 1:
        yield replace(config, damping=min(1.0, config.damping * 10))
    if config.tuning != "none":
        yield replace(config, learning_rate=config.learning_rate / 3, sign_learning_rate=config.sign_rate / 3)


def layers_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications: the rounding of each weight, and its feedback to those behind it, in every pass."""
    own = params["count"] / sizes["blocks"]
    config = params["config"]
    each = sizes["squares"] ** 0.5 + ROUNDING[config["num_bits"]] * (20 if config["joint_search"] else 1)
    return sizes["linears"] * own * each * (1 + config["passes"])


def tune_layers_work(params: Json, sizes: Mapping[str, float]) -> float:
    """As :func:`layers_work`, and the passes of training after each stack but the last, forward and back."""
    config = params["config"]
    passes = STACKS * config["block_epochs"] * PASSES
    forward = sizes["linears"] * params["count"] / sizes["blocks"] * sizes["tokens"]
    return layers_work(params, sizes) + passes * forward


def teacher_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Tokens answered, times the parameters that each passes."""
    return sizes["tokens"] * sizes["parameters"]


def tune_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Tokens learnt from, or looked at to choose the epoch, times parameters."""
    lesson = sizes["windows"] * 2 / 3
    learnt = (params["last"] - params["first"]) / max(lesson, 1.0)
    looked = sizes["tokens"] / 3 if params["ends"] else 0.0
    return (PASSES * learnt * sizes["tokens"] * 2 / 3 + looked) * sizes["parameters"]


def assemble_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes hashed once more."""
    return sizes["result_bytes"]


def _stacks(shapes: Shapes, config: QuipSharpConfig) -> list[tuple[int, int, int]]:
    """``(N, K, matrices)`` of each stack of a block: neighbours of one input, as calibration sees them."""
    found: list[tuple[int, int, int]] = []
    for number, matrix in enumerate(shapes.block):
        together = config.fuse and number in _FUSED.get(len(shapes.block), ())
        if together:
            outputs, inputs, count = found.pop()
            found.append((outputs + matrix.outputs, inputs, count + 1))
        else:
            found.append((matrix.outputs, matrix.inputs, 1))
    return found


_FUSED = {7: (1, 2, 5)}
"""By the linears of a block, those that read what the one before them reads: key, value and up."""


def _code_bytes(stacks: list[tuple[int, int, int]], bits: int) -> int:
    return sum((outputs + outputs % 2) * (-(-inputs // WORD) * WORD) * bits // 8 for outputs, inputs, _ in stacks)


def _parts(model: Model, shapes: Shapes | None, config: QuipSharpConfig) -> tuple[Json, ...]:
    if shapes is None:
        sizes = {
            "codes": round(model.parameters * config.num_bits / 8),
            "other": model.weight_bytes,
            "side files": model.side_bytes,
        }
        return tuple({"name": name, "bytes": size} for name, size in sizes.items())
    stacks = _stacks(shapes, config)
    signs = sum(outputs + inputs for outputs, inputs, _ in stacks) if config.tuning != "none" else 0
    matrices, width = shapes.layers * len(shapes.block), model.width
    pieces = shapes.layers * len(stacks) * (2 if config.num_bits == 2 else 3)
    norm_width = FLOAT if config.tuning != "none" else width
    found = {
        "codes": shapes.layers * _code_bytes(stacks, config.num_bits),
        "scales": SCALE_BYTES * matrices + SIGN_BYTES * signs * shapes.layers,
        "embeddings": round(shapes.embeddings * width),
        "head": round(shapes.head * (FLOAT if config.tunes_whole and config.train_head else width)),
        "norms": round(shapes.norms * norm_width),
        "other": round(shapes.other * width),
        "headers": HEADER_LINE * pieces + RAW_LINE * shapes.tensors // 2,
        "side files": model.side_bytes + INDEX_LINE * (pieces + shapes.tensors) + 300,
        "manifest": FIXED_LINES
        + (LINE + FIGURES) * matrices
        + STACK_LINE * shapes.layers * len(stacks)
        + RAW_LINE * shapes.tensors
        + FILE_LINE * (shapes.layers + 8),
    }
    return tuple({"name": name, "bytes": size} for name, size in found.items() if size)


def _loads(
    config: QuipSharpConfig, model: Model, shapes: Shapes | None, sizes: Mapping[str, float]
) -> Iterator[StepLoad]:
    blocks = round(sizes["blocks"])
    yield StepLoad(kind="quip_sharp.plan", count=1, units=1.0)
    yield from shared.calibration_loads(model, shapes, sizes, hessians=True)
    params: Json = {
        "count": blocks,
        "config": {"num_bits": config.num_bits, "joint_search": config.joint_search, "passes": config.passes},
    }
    memory = PROCESS_BYTES + _stack_memory(_largest(model, shapes, config))
    kind, work = "quip_sharp.layers", layers_work(params, sizes)
    if config.tunes_blocks:
        params["config"] |= {"block_epochs": config.block_epochs}
        kind, work = "quip_sharp.tune_layers", tune_layers_work(params, sizes)
        block = sizes["linears"] / blocks
        memory += shared.block_memory(model, shapes, sizes) + round(FLOAT * block * (TRAINED_COPIES + 1))
    yield StepLoad(
        kind=kind,
        count=min(shared.STEPS, blocks),
        units=work,
        memory_bytes=memory,
        gpu_bytes=memory - PROCESS_BYTES,
        gpu_host_bytes=memory,
    )
    if config.tunes_whole:
        yield from _tuning_loads(config, model, shapes, sizes)
    yield StepLoad(kind="quantization.rest", count=1, units=sizes["kept_bytes"])
    yield StepLoad(kind="quip_sharp.assemble", count=1, units=sizes["result_bytes"])


def _tuning_loads(
    config: QuipSharpConfig, model: Model, shapes: Shapes | None, sizes: Mapping[str, float]
) -> Iterator[StepLoad]:
    """The whole model in fp32, once; logits of a window and what a pass back needs of it."""
    vocabulary = shapes.vocabulary if shapes else model.parameters // max(1, round(sizes["hidden"]))
    hidden, blocks = sizes["hidden"], sizes["blocks"]
    whole = FLOAT * (model.parameters + 4 * config.length * vocabulary)
    lesson = max(1, round(config.samples * 2 / 3))
    steps = -(-lesson // CHUNK_WINDOWS)
    for kind, count, extra in (
        ("quip_sharp.teacher", 1, 0.0),
        ("quip_sharp.tune", steps * config.tuning_epochs, FLOAT * 24 * config.length * hidden * blocks),
    ):
        if kind == "quip_sharp.teacher":
            units = teacher_work({}, sizes)
        else:
            units = tune_work({"first": 0, "last": lesson, "ends": True}, sizes) * config.tuning_epochs
        memory = round(whole + extra)
        yield StepLoad(
            kind=kind,
            count=count,
            units=units,
            memory_bytes=PROCESS_BYTES + model.weight_bytes + memory,
            gpu_bytes=memory,
            gpu_host_bytes=PROCESS_BYTES + model.weight_bytes + FLOAT * model.parameters,
        )


def _largest(model: Model, shapes: Shapes | None, config: QuipSharpConfig) -> list[Matrix]:
    """The two largest stacks: two threads have one each."""
    if shapes is None:
        side = round((model.parameters / 50) ** 0.5)
        return [Matrix(side, side)] * 2
    found = [Matrix(outputs, inputs) for outputs, inputs, _ in _stacks(shapes, config)]
    return sorted(found, key=lambda one: one.elements)[-2:]


def _stack_memory(largest: list[Matrix]) -> int:
    return sum(FLOAT * (MATRIX_COPIES * one.elements + HESSIAN_COPIES * one.inputs**2) for one in largest)
