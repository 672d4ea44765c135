"""What a GPTQ job will need, from shapes and settings alone: bytes by part, memory of steps, work. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from compression_worker.contracts import Json
from compression_worker.methods.gptq.config import GROUP_SIZES, PER_ROW, GPTQConfig
from compression_worker.preflight import FLOAT, PROCESS_BYTES, Estimate, Inputs, Model, Shapes, StepLoad, halvings
from compression_worker.quantization import estimate as shared

LINE, FIGURES, RAW_LINE, FILE_LINE, FIXED_LINES, HEADER_LINE, INDEX_LINE = 280, 260, 240, 118, 2_900, 420, 330
STEP_DOCUMENT = 9_000
MATRIX_COPIES = 7
"""fp32 copies of a stack of matrices in flight: as read, ordered, errors, values, and a clip search's three."""
FEWEST_TOKENS = 256


def estimate(config: GPTQConfig, inputs: Inputs) -> Estimate:
    """The whole job."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    parts = _parts(model, shapes, config)
    linears = shapes.linears if shapes else model.parameters
    sizes = shared.calibration_sizes(model, shapes, config.samples, config.length) | {
        "parameters": float(model.parameters),
        "kept_bytes": float(model.weight_bytes - round(linears * model.width)),
        "result_bytes": float(sum(part["bytes"] for part in parts)),
    }
    full = config.inputs == "full"
    return Estimate(
        parts=parts,
        source_bytes=model.weight_bytes,
        intermediate_bytes=shared.intermediate_bytes(sizes, hessians=full) + STEP_DOCUMENT * 12,
        steps=tuple(_loads(config, model, shapes, sizes)),
        sizes=sizes,
        exact=shapes is not None,
    )


def cheaper(config: GPTQConfig) -> Iterator[GPTQConfig]:
    """The same job for less memory: fewer windows, of which the hidden states are kept."""
    for samples in halvings(config.samples, 1):
        if samples * config.length >= FEWEST_TOKENS:
            yield replace(config, samples=samples)


def calmer(config: GPTQConfig) -> Iterator[GPTQConfig]:
    """What helps a job that failed on its numbers: more damping."""
    if config.damping < 1:
        yield replace(config, damping=min(1.0, config.damping * 10))


def layers_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications: forward passes, products of inputs, and the feedback of each weight to those behind it."""
    own = params["count"] / sizes["blocks"]
    passes = 1 if params["config"]["inputs"] == "full" else 4
    forward = passes * sizes["tokens"] * (sizes["linears"] * own + sizes["squares"] * params["count"])
    return forward + sizes["linears"] * own * sizes["squares"] ** 0.5 * (1 + params["config"]["passes"])


def assemble_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes hashed once more."""
    return sizes["result_bytes"]


def _group(config: GPTQConfig, inputs: list[int]) -> int:
    if config.group_size == PER_ROW:
        return 0
    if config.group_size:
        return config.group_size
    return next((size for size in GROUP_SIZES if all(one % size == 0 for one in inputs)), 0)


def _parts(model: Model, shapes: Shapes | None, config: GPTQConfig) -> tuple[Json, ...]:
    if shapes is None:
        sizes = {
            "codes": round(model.parameters * config.num_bits / 8),
            "scales": round(model.parameters * (16 + config.num_bits) / 8 / GROUP_SIZES[-1]),
            "other": model.weight_bytes,
            "side files": model.side_bytes,
        }
        return tuple({"name": name, "bytes": size} for name, size in sizes.items())
    size = _group(config, [one.inputs for one in shapes.block])
    grids = sum((one.inputs // size if size else 1) * one.outputs for one in shapes.block) * shapes.layers
    indices = sum(one.inputs for one in shapes.block) * shapes.layers
    matrices, width = shapes.layers * len(shapes.block), model.width
    found = {
        "codes": shapes.linears * config.num_bits // 8,
        "scales": round(grids * (2 + config.num_bits / 8)) + 4 * indices,
        "embeddings": round(shapes.embeddings * width),
        "head": round(shapes.head * width),
        "norms": round(shapes.norms * width),
        "other": round(shapes.other * width),
        "headers": (HEADER_LINE + INDEX_LINE) * matrices + 200 * shapes.tensors,
        "side files": model.side_bytes + 400,
        "manifest": FIXED_LINES
        + (LINE + FIGURES) * matrices
        + RAW_LINE * shapes.tensors
        + FILE_LINE * (shapes.layers + 8),
    }
    return tuple({"name": name, "bytes": count} for name, count in found.items() if count)


def _loads(config: GPTQConfig, model: Model, shapes: Shapes | None, sizes: Mapping[str, float]) -> Iterator[StepLoad]:
    blocks = round(sizes["blocks"])
    full = config.inputs == "full"
    yield StepLoad(kind="gptq.plan", count=1, units=1.0)
    yield from shared.calibration_loads(model, shapes, sizes, hessians=full)
    stack = max((one.inputs * one.outputs for one in shapes.block), default=0) if shapes else model.parameters // 50
    memory = shared.block_memory(model, shapes, sizes) + 2 * MATRIX_COPIES * FLOAT * stack
    params = {"count": blocks, "config": {"inputs": config.inputs, "passes": config.passes}}
    yield StepLoad(
        kind="gptq.layers",
        count=min(shared.STEPS, blocks),
        units=layers_work(params, sizes),
        memory_bytes=memory,
        gpu_bytes=memory - PROCESS_BYTES,
        gpu_host_bytes=memory,
    )
    yield StepLoad(kind="quantization.rest", count=1, units=sizes["kept_bytes"])
    yield StepLoad(kind="gptq.assemble", count=1, units=sizes["result_bytes"])
