"""What calibration and quantization steps need, from shapes and settings alone. No torch.

``sizes`` of a job that calibrates hold ``tokens`` (windows times their length), ``hidden``, ``blocks``, ``linears``
(weights in block linears) and ``squares`` (the sum over distinct inputs of a block of ``K^2``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from compression_worker.contracts import Json
from compression_worker.preflight import FLOAT, PROCESS_BYTES, Model, Shapes, StepLoad, halvings

BATCH_TOKENS = 2048
"""As :mod:`compression_worker.quantization.calibration` runs them."""
STEPS = 8
DOUBLE = 8
FORWARD_AND_BACKWARD = 4
"""Passes over the weights of a training step: forward, again where blocks are computed twice, and backward."""
ACTIVATION_COPIES = 6
"""Tensors as wide as the widest linear that live at once while a batch goes through a block."""


def calibration_sizes(model: Model, shapes: Shapes | None, samples: int, length: int) -> dict[str, float]:
    """The sizes that work is counted in."""
    tokens = float(samples * length)
    if shapes is None:
        return {
            "tokens": tokens,
            "hidden": float(model.parameters) ** 0.5 / 10,
            "blocks": 1.0,
            "linears": float(model.parameters),
            "squares": float(model.parameters),
        }
    return {
        "tokens": tokens,
        "hidden": float(shapes.hidden),
        "blocks": float(shapes.layers),
        "linears": float(shapes.linears),
        "squares": float(sum(inputs**2 for inputs in distinct_inputs(shapes))),
    }


def distinct_inputs(shapes: Shapes) -> list[int]:
    """``K`` of each distinct input of a block: neighbours of one width read one input."""
    found: list[int] = []
    for number, matrix in enumerate(shapes.block):
        if not number or matrix.inputs != shapes.block[number - 1].inputs or number == 4:
            found.append(matrix.inputs)
    return found


def tokens_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Values of the hidden states that are looked up."""
    return sizes["tokens"] * sizes["hidden"]


def hessians_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications of a forward pass and of the products ``x^T x``."""
    return params["count"] * sizes["tokens"] * (sizes["linears"] / sizes["blocks"] + sizes["squares"])


def rest_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes copied."""
    return sizes["kept_bytes"]


def text_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Tokens cut into windows."""
    return (params["windows"] + params["held_out"]) * sizes["window_tokens"]


def logits_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications of the full model's forward pass."""
    return params["count"] * sizes["window_tokens"] * sizes["parameters"]


def train_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications of the forward and backward passes of a chunk of optimizer steps."""
    windows = (params["last"] - params["first"]) * params["config"]["batch_size"]
    return FORWARD_AND_BACKWARD * windows * sizes["window_tokens"] * sizes["parameters"]


def read_length(model: Model, length: int) -> int:
    """``length``, or as many tokens as the model can read."""
    said = model.config.get("max_position_embeddings") or model.config.get("n_positions") or length
    return min(length, int(said))


def cheaper_training(config: Any) -> Iterator[Any]:
    """The same training for less memory: blocks computed twice, then shorter windows."""
    if not config.checkpointing:
        config = replace(config, checkpointing=True)
        yield config
    for length in halvings(config.window_tokens, 64):
        yield replace(config, window_tokens=length)


def hidden_bytes(sizes: Mapping[str, float]) -> int:
    """Hidden states between two steps."""
    return round(FLOAT * sizes["tokens"] * sizes["hidden"])


def intermediate_bytes(sizes: Mapping[str, float], *, hessians: bool) -> int:
    """Hidden states at the borders of steps, and the lower triangles of all Hessians where those are kept."""
    borders = min(STEPS, round(sizes["blocks"])) + 1
    kept = FLOAT * sizes["squares"] / 2 * sizes["blocks"] if hessians else 0
    return borders * hidden_bytes(sizes) + round(kept)


def block_memory(model: Model, shapes: Shapes | None, sizes: Mapping[str, float]) -> int:
    """A block in fp32, its Hessians in fp64 with one product, and a batch of activations."""
    block = sizes["linears"] / sizes["blocks"]
    widest = max((max(one.inputs, one.outputs) for one in shapes.block), default=0) if shapes else sizes["hidden"] * 4
    activations = ACTIVATION_COPIES * FLOAT * min(sizes["tokens"], BATCH_TOKENS) * widest
    return PROCESS_BYTES + round(FLOAT * block + (DOUBLE + FLOAT) * sizes["squares"] + activations)


def calibration_loads(
    model: Model, shapes: Shapes | None, sizes: Mapping[str, float], *, hessians: bool
) -> Iterator[StepLoad]:
    """The steps before those of a method."""
    table = round((shapes.embeddings if shapes else model.parameters / 10) * model.width)
    memory = PROCESS_BYTES + 2 * table + hidden_bytes(sizes)
    yield StepLoad(
        kind="calibration.tokens",
        count=1,
        units=tokens_work({}, sizes),
        memory_bytes=memory,
        gpu_bytes=table,
        gpu_host_bytes=memory,
    )
    if hessians:
        memory = block_memory(model, shapes, sizes)
        yield StepLoad(
            kind="calibration.hessians",
            count=min(STEPS, round(sizes["blocks"])),
            units=hessians_work({"count": sizes["blocks"]}, sizes),
            memory_bytes=memory,
            gpu_bytes=memory - PROCESS_BYTES,
            gpu_host_bytes=memory,
        )
