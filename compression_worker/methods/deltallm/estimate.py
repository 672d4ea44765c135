"""What a DeltaLLM job will need, from shapes and settings alone: bytes by part, memory of steps, work. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from compression_worker.catalog import METHODS
from compression_worker.contracts import CompressionError, Json
from compression_worker.methods.deltallm.config import ITEM_BYTES, SIGN, DeltaLLMConfig, sign_bytes
from compression_worker.methods.deltallm.groups import Budget, Depth, saving
from compression_worker.methods.deltallm.sizing import depth_of, size_of
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
from compression_worker.quantization import estimate as shared
from compression_worker.quantization.passes import at_once

LINE, SHARED_LINE, FIGURES, HEADER_LINE, CANDIDATE, FIXED = 236, 330, 130, 165, 24, 3_300
POINT, STEP = 130, 17
RANK_POINTS, RANK_POINT = 6, 58
STEP_DOCUMENT = 4_000
STATES = 4
"""A parameter that is trained: itself, its gradient, and AdamW's two moments."""
ATTENTION = {7: 4, 4: 2}
"""Linears of a block -> how many of them, the first ones, are attention's."""


@dataclass(frozen=True)
class Plan:
    """What arithmetic on shapes says: how many follow at what rank, and the sides of one block's shared matrices.

    ``scales``: numbers that a follower keeps beside its factors. ``is_signs``: differences are signs, without a rank.
    """

    size: Budget
    depth: Depth
    sides: tuple[tuple[int, int], ...]
    scales: int = 0
    is_signs: bool = False

    @property
    def delta_parameters(self) -> int:
        """What is trained of differences: factors, or a scale of each matrix."""
        if self.is_signs:
            return self.size.followers * len(self.sides)
        return self.size.factors(self.sides) + self.size.followers * self.scales

    def delta_bytes(self, item_bytes: int) -> int:
        """Differences as stored."""
        if self.is_signs:
            return self.size.followers * sum(sign_bytes(n, k) for n, k in self.sides)
        return item_bytes * self.delta_parameters

    @property
    def shared_weights(self) -> int:
        """Weights that are not stored."""
        return self.size.followers * saving(self.sides, 0)


def estimate(config: DeltaLLMConfig, inputs: Inputs) -> Estimate:
    """The whole job."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    plan = planned(config, model, shapes)
    beneath: Estimate | None = None
    if config.quantizes:
        beneath = METHODS[config.base_method].forecaster().estimate(config.base_config(), inputs)
    parts = tuple(_parts(config, model, shapes, plan, beneath))
    length = shared.read_length(model, config.window_tokens)
    candidates = len(plan.depth.candidates) if plan else 1
    sizes = {
        **shared.calibration_sizes(model, shapes, config.samples, config.length),
        **(beneath.sizes if beneath else {}),
        "parameters": float(model.parameters),
        "window_tokens": float(length),
        "candidates": float(candidates),
        "shared_bytes": float(sum(part["bytes"] for part in parts)),
    }
    starts = _start_bytes(config, plan)
    answers = (config.text_windows + config.held_out) * length * FLOAT * (2 * config.teacher_logits + 2)
    states = _chunks(config) * 3 * FLOAT * (plan.delta_parameters if plan else 0)
    hessians = shared.intermediate_bytes(sizes, hessians=True) if config.start == "svd_covariance" else 0
    written = beneath.intermediate_bytes + beneath.result_bytes if beneath else 0
    loads = _loads(config, model, shapes, sizes, plan, starts)
    if beneath:
        known = {load.kind for load in beneath.steps}
        loads = iter([*beneath.steps, *(load for load in loads if load.kind not in known)])
    return Estimate(
        parts=parts,
        source_bytes=model.size_bytes,
        intermediate_bytes=written + answers + starts + states + hessians + STEP_DOCUMENT * 8,
        steps=tuple(loads),
        sizes=sizes,
        exact=plan is not None,
    )


def planned(config: DeltaLLMConfig, model: Model, shapes: Shapes | None) -> Plan | None:
    """None where shapes are not known here, or where the job itself will refuse the settings."""
    if shapes is None:
        return None
    sides = tuple(_sides(config, shapes))
    depth = depth_of(config, shapes.layers, range(shapes.layers))
    try:
        size = size_of(config, depth, sides, model.parameters)
    except CompressionError:
        return None
    return Plan(size, depth, sides, config.scales_of(len(sides)), config.share_form == SIGN)


def cheaper(config: DeltaLLMConfig) -> Iterator[DeltaLLMConfig]:
    """The same job for less memory: blocks computed twice, then shorter windows."""
    yield from shared.cheaper_training(config)


def calmer(config: DeltaLLMConfig) -> Iterator[DeltaLLMConfig]:
    """What helps a job that diverged: a third of the learning rate; or factors that reach further."""
    yield replace(config, learning_rate=config.learning_rate / 3)
    if config.delta_dtype == "float16":
        yield replace(config, delta_dtype="bfloat16")


def choose_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications: each candidate runs about half the model; at the end each of some ranks runs all of it."""
    windows = params["config"]["measure_windows"] * (1 + sizes["candidates"] / 2)
    if params.get("final"):
        windows += params["config"]["held_out"] * RANK_POINTS
    return windows * sizes["window_tokens"] * sizes["parameters"]


def assemble_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes written and hashed."""
    return sizes["shared_bytes"]


def _sides(config: DeltaLLMConfig, shapes: Shapes) -> Iterator[tuple[int, int]]:
    """``(N, K)`` of the matrices of a block that are shared."""
    first = ATTENTION[len(shapes.block)]
    for kind in config.kinds:
        own = shapes.block[:first] if kind == "attention" else shapes.block[first:]
        yield from ((one.outputs, one.inputs) for one in own)


def _chunks(config: DeltaLLMConfig) -> int:
    return chunks_of(config.windows, config.chunk_steps * config.batch_size) * config.epochs


def _passing(config: DeltaLLMConfig, shapes: Shapes, length: int, item: int) -> int:
    """What a pass forward and backward keeps beside weights: inputs of blocks, one block's inside, and two logits."""
    tokens = length * at_once(config.batch_size, length, shapes.vocabulary)
    inside = 7 * shapes.hidden + 6 * shapes.inner
    kept = shapes.layers * (shapes.hidden if config.checkpointing else shapes.hidden + inside)
    return item * tokens * (kept + max(2 * shapes.vocabulary, inside))


def _start_bytes(config: DeltaLLMConfig, plan: Plan | None) -> int:
    """Factors of each candidate, kept behind the round that first measured it."""
    if plan is None:
        return 0
    sharing = plan.size.followers - plan.size.left_out
    pairs = sharing if config.by_hand else 2 * len(plan.depth.candidates)
    return pairs * plan.delta_bytes(ITEM_BYTES[config.delta_dtype]) // sharing if sharing else 0


def _parts(
    config: DeltaLLMConfig, model: Model, shapes: Shapes | None, plan: Plan | None, beneath: Estimate | None
) -> Iterator[Json]:
    if shapes is None or plan is None:
        if beneath:
            yield from beneath.parts
            return
        yield {"name": "other", "bytes": model.weight_bytes}
        yield {"name": "side files", "bytes": model.side_bytes}
        return
    width, matrices = model.width, shapes.layers * len(shapes.block)
    followers = plan.size.followers * len(plan.sides)
    measured = 0 if config.by_hand else len(plan.size.rounds(config.picks_per_round))
    candidates = measured * len(plan.depth.candidates)
    lines = (LINE + FIGURES) * (matrices - followers) + (SHARED_LINE + FIGURES) * followers + LINE * shapes.tensors
    sizes = {
        "deltas": plan.delta_bytes(ITEM_BYTES[config.delta_dtype]),
        "linears": round((shapes.linears - plan.shared_weights) * width),
        "embeddings": round(shapes.embeddings * width),
        "head": round(shapes.head * width),
        "norms": round(shapes.norms * width),
        "other": round(shapes.other * width),
        "headers": HEADER_LINE * (matrices + followers + shapes.tensors),
        "side files": model.side_bytes,
        "manifest": FIXED
        + lines
        + CANDIDATE * candidates
        + POINT * _chunks(config)
        + STEP * config.steps * config.epochs
        + RANK_POINT * RANK_POINTS,
    }
    if beneath:
        sizes = _on_base(sizes, beneath, plan.shared_weights / shapes.linears)
    yield from ({"name": name, "bytes": size} for name, size in sizes.items() if size)


def _on_base(sizes: Mapping[str, int], beneath: Estimate, shared_share: float) -> dict[str, int]:
    """Parts of a packed base less those of shared weights, and the factors beside them."""
    found: dict[str, int] = {"deltas": sizes["deltas"]}
    for part in beneath.parts:
        less = shared_share if part["name"] in ("codes", "scales", "headers") else 0
        found[part["name"]] = round(part["bytes"] * (1 - less))
    return found


def _loads(
    config: DeltaLLMConfig,
    model: Model,
    shapes: Shapes | None,
    sizes: Mapping[str, float],
    plan: Plan | None,
    starts: int,
) -> Iterator[StepLoad]:
    length = round(sizes["window_tokens"])
    vocabulary = shapes.vocabulary if shapes else int(model.config.get("vocab_size") or 0)
    windows = config.text_windows + config.held_out
    yield StepLoad(kind="teacher.text", count=1, units=float(windows * length))
    logits = 3 * FLOAT * max(length * vocabulary, min(windows * length * vocabulary, 1 << 25))
    yield StepLoad(
        kind="teacher.logits",
        count=(1 if config.by_hand else 2) + chunks_of(config.windows, config.chunk_steps * config.batch_size),
        units=windows * length * sizes["parameters"],
        memory_bytes=PROCESS_BYTES + FLOAT * model.parameters + logits,
        gpu_bytes=model.weight_bytes + logits,
        gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes,
    )
    if config.start == "svd_covariance":
        yield from shared.calibration_loads(model, shapes, sizes, hessians=True)
    measured = 1 if config.by_hand or plan is None else len(plan.size.rounds(config.picks_per_round))
    factors = 2 * starts
    outputs = FLOAT * length * (shapes.hidden * shapes.layers if shapes else 0)
    square = 8 * 6 * max((max(pair) for pair in plan.sides), default=0) ** 2 if plan else 0
    passing = max(3 * FLOAT * length * vocabulary + outputs, square)
    said = {"config": {"measure_windows": config.measure_windows, "held_out": config.held_out}}
    work = [choose_work({**said, "final": final}, sizes) for final in [False] * (measured - 1) + [True]]
    yield StepLoad(
        kind="deltallm.choose",
        count=measured,
        units=sum(work),
        memory_bytes=PROCESS_BYTES + FLOAT * model.parameters + factors + passing,
        gpu_bytes=model.weight_bytes + factors + passing,
        gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes + factors,
    )
    if chunks := _chunks(config):
        trained = STATES * FLOAT * (plan.delta_parameters if plan else 0)
        params = {
            "first": 0,
            "last": config.steps * config.epochs,
            "config": {"batch_size": config.batch_size},
        }
        cpu, gpu = (
            trained + _passing(config, shapes, length, item) if shapes else FLOAT * model.parameters
            for item in (FLOAT, 2)
        )
        yield StepLoad(
            kind="deltallm.train",
            count=chunks,
            units=shared.train_work(params, sizes),
            memory_bytes=PROCESS_BYTES + FLOAT * model.parameters + cpu,
            gpu_bytes=model.weight_bytes + gpu,
            gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes,
        )
    yield StepLoad(kind="deltallm.assemble", count=1, units=sizes["shared_bytes"])
