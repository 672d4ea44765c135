"""What a DeltaDQ job will need, from shapes and settings alone: bytes by part, memory of each kind of step, work.

A layer step holds one matrix of each side in fp32 on two threads, the mask of some rows and a code for each survivor.
No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from compression_worker.contracts import Json
from compression_worker.methods.deltadq.config import DeltaDQConfig
from compression_worker.preflight import FLOAT, PROCESS_BYTES, Estimate, Inputs, Model, Shapes, StepLoad

MATRIX_COPIES = 5
"""fp32 copies of a matrix in flight: both sides, survivors with their positions, the delta that comes back."""
SEARCH_TOKENS = 8 * 128
GRID_BYTES, LINE, FILE_LINE, RAW_LINE, FIXED_LINES, HEADER_LINE = 8, 470, 118, 240, 2_600, 118
ROW_BYTES = {"sign": 1 / 8, "int4": 0.5, "int8": 1.0}
STEP_DOCUMENT = 6_000


def estimate(config: DeltaDQConfig, inputs: Inputs) -> Estimate:
    """The whole job. Codes are counted at their full width: what entropy coding saves is not known before."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    parts = _parts(model, shapes, config)
    linears = shapes.linears if shapes else model.parameters
    sizes = {
        "parameters": float(model.parameters),
        "kept_bytes": float(model.weight_bytes - round(linears * model.width)),
        "result_bytes": float(sum(part["bytes"] for part in parts)),
    }
    return Estimate(
        parts=parts,
        source_bytes=model.weight_bytes,
        intermediate_bytes=STEP_DOCUMENT * ((shapes.layers if shapes else 100) + 4),
        steps=tuple(_loads(model, shapes, config, sizes)),
        sizes=sizes,
        exact=shapes is not None,
    )


def cheaper(config: DeltaDQConfig) -> Iterator[DeltaDQConfig]:
    """The same job for less memory: the search loads the whole variant, a given group size does not."""
    if config.searches:
        yield replace(config, group_size=config.alpha)


def calmer(config: DeltaDQConfig) -> Iterator[DeltaDQConfig]:
    """What helps a job that failed on its numbers: more survivors."""
    if config.alpha > 2:
        alpha = config.alpha // 2
        fits = config.group_size is None or config.group_size % alpha == 0
        yield replace(config, alpha=alpha, group_size=config.group_size if fits else alpha)


def search_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Tokens looked at, times the parameters that each passes."""
    return float(SEARCH_TOKENS * sizes["parameters"])


def layer_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Weights masked and quantized."""
    return float(sum(one["outputs"] * one["inputs"] for one in params["linears"]))


def rest_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes copied."""
    return sizes["kept_bytes"]


def assemble_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes hashed once more."""
    return sizes["result_bytes"]


def _parts(model: Model, shapes: Shapes | None, config: DeltaDQConfig) -> tuple[Json, ...]:
    bits = config.num_bits / config.alpha
    if shapes is None:
        sizes = {
            "codes": round(model.parameters * bits / 8),
            "other": model.weight_bytes,
            "side files": model.side_bytes,
        }
        return tuple({"name": name, "bytes": size} for name, size in sizes.items())
    matrices, width = shapes.layers * len(shapes.block), model.width
    sizes = {
        "codes": round(shapes.linears * bits / 8),
        "scales": GRID_BYTES * matrices,
        "embeddings": round(shapes.embeddings * ROW_BYTES.get(config.embeddings, width)),
        "head": round(shapes.head * ROW_BYTES.get(config.embeddings, width)),
        "norms": round(shapes.norms * width),
        "other": round(shapes.other * width),
        "headers": HEADER_LINE * (matrices + shapes.tensors),
        "side files": model.side_bytes,
        "manifest": FIXED_LINES + LINE * matrices + RAW_LINE * shapes.tensors + FILE_LINE * shapes.layers,
    }
    return tuple({"name": name, "bytes": size} for name, size in sizes.items() if size)


def _loads(
    model: Model, shapes: Shapes | None, config: DeltaDQConfig, sizes: Mapping[str, float]
) -> Iterator[StepLoad]:
    blocks = shapes.layers if shapes else 1
    largest = max(one.elements for one in shapes.block) if shapes else model.parameters // 100
    yield StepLoad(kind="deltadq.plan", count=1, units=1.0)
    matrices = PROCESS_BYTES + 2 * MATRIX_COPIES * FLOAT * largest
    if config.searches:
        whole = FLOAT * model.parameters
        yield StepLoad(
            kind="deltadq.search",
            count=1,
            units=search_work({}, sizes),
            memory_bytes=matrices + model.weight_bytes + whole,
            gpu_bytes=whole,
            gpu_host_bytes=matrices + model.weight_bytes + whole,
        )
    linears = float(shapes.linears if shapes else model.parameters)
    yield StepLoad(kind="deltadq.layer", count=blocks, units=linears, memory_bytes=matrices, gpu_host_bytes=matrices)
    yield StepLoad(kind="deltadq.rest", count=1, units=sizes["kept_bytes"])
    yield StepLoad(kind="deltadq.assemble", count=1, units=sizes["result_bytes"])
