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


def estimate(config: QuipSharpConfig, inputs: Inputs) -> Estimate:
    """The whole job."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    parts = _parts(model, shapes, config)
    linears = shapes.linears if shapes else model.parameters
    sizes = shared.calibration_sizes(model, shapes, config.samples, config.length) | {
        "parameters": float(model.parameters),
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
    params = {
        "count": blocks,
        "config": {"num_bits": config.num_bits, "joint_search": config.joint_search, "passes": config.passes},
    }
    memory = PROCESS_BYTES + _stack_memory(_largest(model, shapes, config))
    yield StepLoad(
        kind="quip_sharp.layers",
        count=min(shared.STEPS, blocks),
        units=layers_work(params, sizes),
        memory_bytes=memory,
        gpu_bytes=(memory - PROCESS_BYTES) // 2,
        gpu_host_bytes=memory,
    )
    yield StepLoad(kind="quantization.rest", count=1, units=sizes["kept_bytes"])
    yield StepLoad(kind="quip_sharp.assemble", count=1, units=sizes["result_bytes"])


def _largest(model: Model, shapes: Shapes | None, config: QuipSharpConfig) -> list[Matrix]:
    """The two largest stacks: two threads have one each."""
    if shapes is None:
        side = round((model.parameters / 50) ** 0.5)
        return [Matrix(side, side)] * 2
    found = [Matrix(outputs, inputs) for outputs, inputs, _ in _stacks(shapes, config)]
    return sorted(found, key=lambda one: one.elements)[-2:]


def _stack_memory(largest: list[Matrix]) -> int:
    return sum(FLOAT * (MATRIX_COPIES * one.elements + HESSIAN_COPIES * one.inputs**2) for one in largest)
