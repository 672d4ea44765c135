"""What an INT2.1 job will need, from shapes and settings alone: bytes by part, memory of steps, work. No torch.

The base's part is the estimate of its own method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from compression_worker.catalog import METHODS
from compression_worker.contracts import Json
from compression_worker.methods.int21.config import Int21Config
from compression_worker.methods.int21.memory import Pass, Peaks, adapter_parameters, peaks
from compression_worker.preflight import (
    FLOAT,
    PROCESS_BYTES,
    Estimate,
    Inputs,
    Model,
    Shapes,
    StepLoad,
    chunks_of,
)
from compression_worker.quantization.estimate import cheaper_training, read_length, train_work
from compression_worker.quantization.passes import at_once

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
LINE, FIGURES, POINT, ADAPTER_HEADER, FIXED = 12, 40, 130, 130, 2_600
STEP_DOCUMENT = 6_000
SINGULAR = 20
"""Multiplications of a singular value decomposition, in those of one product of the matrix with itself."""
CODED = ("codes", "scales")


def estimate(config: Int21Config, inputs: Inputs) -> Estimate:
    """The whole job."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    beneath: Estimate = METHODS[config.base_method].forecaster().estimate(config.base_config(), inputs)
    adapter = _adapter_parameters(model, shapes, config.rank)
    vocabulary = shapes.vocabulary if shapes else int(model.config.get("vocab_size") or 0)
    length = read_length(model, config.window_tokens)
    parts = (*beneath.parts, *_parts(config, shapes, adapter))
    sizes = {
        **beneath.sizes,
        "parameters": float(model.parameters),
        "window_tokens": float(length),
        "adapter": float(adapter),
        "widest": float(max((max(one.inputs, one.outputs) for one in shapes.block), default=0)) if shapes else 0.0,
        "adapted_bytes": float(sum(part["bytes"] for part in parts)),
    }
    return Estimate(
        parts=parts,
        source_bytes=beneath.source_bytes,
        intermediate_bytes=beneath.intermediate_bytes + beneath.result_bytes + _intermediate(config, length, adapter),
        steps=(*beneath.steps, *_loads(config, model, shapes, sizes, _packed_bytes(beneath), vocabulary)),
        sizes=sizes,
        exact=beneath.exact,
    )


def training_peaks(
    config: Int21Config, model: Model, packed_bytes: int, item_bytes: int, length: int | None = None
) -> Peaks | None:
    """Bytes of tensors at the peak of training; None where the shapes of the model are not known here."""
    shapes = model.shapes()
    if shapes is None:
        return None
    length = read_length(model, config.window_tokens) if length is None else length
    together = at_once(config.batch_size, length, shapes.vocabulary)
    one = Pass(tokens=together * length, item_bytes=item_bytes, rank=config.rank, checkpointing=config.checkpointing)
    return peaks(shapes, packed_bytes, one)


def cheaper(config: Int21Config) -> Iterator[Int21Config]:
    """The same job for less memory: blocks computed twice, then shorter windows."""
    yield from cheaper_training(config)


def calmer(config: Int21Config) -> Iterator[Int21Config]:
    """What helps a job that diverged: a third of the learning rate."""
    yield replace(config, learning_rate=config.learning_rate / 3)


def start_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications of one decomposition for each matrix."""
    return SINGULAR * sizes["linears"] * max(sizes["widest"], 1.0)


def assemble_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes hashed once more."""
    return sizes["adapted_bytes"]


def _packed_bytes(beneath: Estimate) -> int:
    return sum(part["bytes"] for part in beneath.parts if part["name"] in CODED)


def _adapter_parameters(model: Model, shapes: Shapes | None, rank: int) -> int:
    """Of square matrices of hidden size 1,000 where shapes are not known."""
    return adapter_parameters(shapes, rank) if shapes else rank * model.parameters // 500


def _parts(config: Int21Config, shapes: Shapes | None, adapter: int) -> Iterator[Json]:
    """What the base does not have."""
    matrices = shapes.layers * len(shapes.block) if shapes else 0
    points = chunks_of(config.windows, config.chunk_steps * config.batch_size) * config.epochs * len(config.phases)
    steps = config.windows // config.batch_size * config.epochs * len(config.phases)
    yield {"name": "adapter", "bytes": ITEM_BYTES[config.adapter_dtype] * adapter}
    yield {"name": "headers", "bytes": 2 * ADAPTER_HEADER * matrices + 1_400}
    yield {"name": "manifest", "bytes": FIXED + (LINE + FIGURES) * matrices + POINT * points + 9 * steps}


def _chunks(config: Int21Config) -> int:
    return chunks_of(config.windows, config.chunk_steps * config.batch_size)


def _intermediate(config: Int21Config, length: int, adapter: int) -> int:
    """The text, answers of the teacher, and the state behind each chunk."""
    tokens = (config.windows + config.held_out) * length
    answers = tokens * FLOAT * (2 * config.teacher_logits + 1)
    states = _chunks(config) * config.epochs * len(config.phases) * 3 * FLOAT * adapter
    return tokens * FLOAT + answers + states + STEP_DOCUMENT * 8


def _loads(
    config: Int21Config,
    model: Model,
    shapes: Shapes | None,
    sizes: Mapping[str, float],
    packed_bytes: int,
    vocabulary: int,
) -> Iterator[StepLoad]:
    length, chunks = round(sizes["window_tokens"]), _chunks(config)
    windows = config.windows + config.held_out
    yield StepLoad(kind="teacher.text", count=1, units=float(windows * length))
    logits = 3 * FLOAT * max(length * vocabulary, min(windows * length * vocabulary, 1 << 25))
    yield StepLoad(
        kind="teacher.logits",
        count=1 + (chunks if "lrec" in config.phases else 0),
        units=windows * length * sizes["parameters"],
        memory_bytes=PROCESS_BYTES + FLOAT * model.parameters + logits,
        gpu_bytes=model.weight_bytes + logits,
        gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes,
    )
    if config.start == "closed_form":
        side = round(sizes["widest"]) or 4096
        yield StepLoad(
            kind="int21.start",
            count=1,
            units=start_work({}, sizes),
            memory_bytes=PROCESS_BYTES + 8 * 8 * side**2 + 2 * FLOAT * round(sizes["adapter"]),
            gpu_bytes=8 * 8 * side**2,
        )
    runs = config.epochs * len(config.phases)
    params = {
        "first": 0,
        "last": config.windows // config.batch_size * runs,
        "config": {"batch_size": config.batch_size},
    }
    cpu, gpu = _training_memory(config, model, packed_bytes)
    yield StepLoad(
        kind="int21.train",
        count=chunks * runs,
        units=train_work(params, sizes),
        memory_bytes=PROCESS_BYTES + cpu,
        gpu_bytes=gpu,
        gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes,
    )
    yield StepLoad(kind="int21.assemble", count=1, units=sizes["adapted_bytes"])


def _training_memory(config: Int21Config, model: Model, packed_bytes: int) -> tuple[int, int]:
    """Tensors at the peak on a CPU, which computes in float32, and on a GPU."""
    cpu = training_peaks(config, model, packed_bytes, FLOAT)
    gpu = training_peaks(config, model, packed_bytes, 2)
    dense = 2 * FLOAT * model.parameters
    return (cpu.packed if cpu else dense), (gpu.packed if gpu else dense)
