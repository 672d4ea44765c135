"""What a DeltaLLM job will need, from shapes and settings alone: bytes by part, memory of steps, work. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from compression_worker.contracts import CompressionError, Json
from compression_worker.methods.deltallm.config import DeltaLLMConfig
from compression_worker.methods.deltallm.groups import Budget, Depth, budget, check_rank, rounds, saving
from compression_worker.methods.deltallm.layout import ITEM_BYTES
from compression_worker.preflight import FLOAT, PROCESS_BYTES, Estimate, Inputs, Model, Shapes, StepLoad, halvings
from compression_worker.quantization import estimate as shared

LINE, SHARED_LINE, FIGURES, HEADER_LINE, CANDIDATE, FIXED = 236, 330, 130, 105, 24, 3_300
STEP_DOCUMENT = 4_000
ATTENTION = {7: 4, 4: 2}
"""Linears of a block -> how many of them, the first ones, are attention's."""


@dataclass(frozen=True)
class Plan:
    """What arithmetic on shapes says: how many follow at what rank, and the sides of one block's shared matrices."""

    size: Budget
    depth: Depth
    sides: tuple[tuple[int, int], ...]

    @property
    def delta_parameters(self) -> int:
        return self.size.followers * self.size.rank * sum(n + k for n, k in self.sides)

    @property
    def shared_weights(self) -> int:
        """Weights that are not stored."""
        return self.size.followers * saving(self.sides, 0)


def estimate(config: DeltaLLMConfig, inputs: Inputs) -> Estimate:
    """The whole job."""
    model, shapes = inputs.variant, inputs.variant.shapes()
    plan = planned(config, model, shapes)
    parts = tuple(_parts(config, model, shapes, plan))
    length = _length(config, model)
    candidates = len(plan.depth.candidates) if plan else 1
    sizes = {
        **shared.calibration_sizes(model, shapes, config.samples, config.length),
        "parameters": float(model.parameters),
        "window_tokens": float(length),
        "candidates": float(candidates),
        "result_bytes": float(sum(part["bytes"] for part in parts)),
    }
    starts = _start_bytes(config, plan)
    answers = (config.text_windows + config.held_out) * length * FLOAT * (2 * config.teacher_logits + 2)
    hessians = shared.intermediate_bytes(sizes, hessians=True) if config.start == "svd_covariance" else 0
    return Estimate(
        parts=parts,
        source_bytes=model.size_bytes,
        intermediate_bytes=answers + starts + hessians + STEP_DOCUMENT * 8,
        steps=tuple(_loads(config, model, shapes, sizes, plan, starts)),
        sizes=sizes,
        exact=plan is not None,
    )


def planned(config: DeltaLLMConfig, model: Model, shapes: Shapes | None) -> Plan | None:
    """None where shapes are not known here, or where the job itself will refuse the settings."""
    if shapes is None:
        return None
    sides = tuple(_sides(config, shapes))
    depth = Depth(
        blocks=shapes.layers,
        alike=tuple(range(shapes.layers)),
        protect_first=config.protect_first,
        protect_last=config.protect_last,
    )
    try:
        if config.by_hand:
            depth.check(config.by_hand)
            check_rank(sides, config.rank)
            size = Budget(len(config.by_hand), config.rank)
        else:
            target = config.target_reduction
            size = budget(sides, model.parameters, depth, target=target, followers=config.followers, rank=config.rank)
    except CompressionError:
        return None
    return Plan(size, depth, sides)


def cheaper(config: DeltaLLMConfig) -> Iterator[DeltaLLMConfig]:
    """The same job for less memory: shorter windows."""
    for length in halvings(config.window_tokens, 64):
        yield replace(config, window_tokens=length)


def calmer(config: DeltaLLMConfig) -> Iterator[DeltaLLMConfig]:
    """What helps a job that failed on its numbers: factors that reach further."""
    if config.delta_dtype == "float16":
        yield replace(config, delta_dtype="bfloat16")


def choose_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Multiplications: each candidate runs about half the model."""
    windows = params["config"]["measure_windows"] * sizes["window_tokens"]
    return (1 + sizes["candidates"] / 2) * windows * sizes["parameters"]


def assemble_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Bytes written and hashed."""
    return sizes["result_bytes"]


def _sides(config: DeltaLLMConfig, shapes: Shapes) -> Iterator[tuple[int, int]]:
    """``(N, K)`` of the matrices of a block that are shared."""
    first = ATTENTION[len(shapes.block)]
    for kind in config.kinds:
        own = shapes.block[:first] if kind == "attention" else shapes.block[first:]
        yield from ((one.outputs, one.inputs) for one in own)


def _length(config: DeltaLLMConfig, model: Model) -> int:
    said = model.config.get("max_position_embeddings") or model.config.get("n_positions") or config.window_tokens
    return min(config.window_tokens, int(said))


def _start_bytes(config: DeltaLLMConfig, plan: Plan | None) -> int:
    """Factors of each candidate, kept behind the round that first measured it."""
    if plan is None:
        return 0
    pairs = plan.size.followers if config.by_hand else 2 * len(plan.depth.candidates)
    return pairs * ITEM_BYTES[config.delta_dtype] * plan.size.rank * sum(n + k for n, k in plan.sides)


def _parts(config: DeltaLLMConfig, model: Model, shapes: Shapes | None, plan: Plan | None) -> Iterator[Json]:
    if shapes is None or plan is None:
        yield {"name": "other", "bytes": model.weight_bytes}
        yield {"name": "side files", "bytes": model.side_bytes}
        return
    width, matrices = model.width, shapes.layers * len(shapes.block)
    followers = plan.size.followers * len(plan.sides)
    measured = 0 if config.by_hand else len(rounds(plan.size.followers, config.picks_per_round))
    candidates = measured * len(plan.depth.candidates)
    lines = (LINE + FIGURES) * (matrices - followers) + (SHARED_LINE + FIGURES) * followers + LINE * shapes.tensors
    sizes = {
        "deltas": ITEM_BYTES[config.delta_dtype] * plan.delta_parameters,
        "linears": round((shapes.linears - plan.shared_weights) * width),
        "embeddings": round(shapes.embeddings * width),
        "head": round(shapes.head * width),
        "norms": round(shapes.norms * width),
        "other": round(shapes.other * width),
        "headers": HEADER_LINE * (matrices + followers + shapes.tensors),
        "side files": model.side_bytes,
        "manifest": FIXED + lines + CANDIDATE * candidates,
    }
    yield from ({"name": name, "bytes": size} for name, size in sizes.items() if size)


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
        count=1 if config.by_hand else 2,
        units=windows * length * sizes["parameters"],
        memory_bytes=PROCESS_BYTES + FLOAT * model.parameters + logits,
        gpu_bytes=model.weight_bytes + logits,
        gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes,
    )
    if config.start == "svd_covariance":
        yield from shared.calibration_loads(model, shapes, sizes, hessians=True)
    measured = [0] if config.by_hand or plan is None else rounds(plan.size.followers, config.picks_per_round)
    factors = 2 * starts
    outputs = FLOAT * length * (shapes.hidden * shapes.layers if shapes else 0)
    square = 8 * 6 * max((max(pair) for pair in plan.sides), default=0) ** 2 if plan else 0
    passing = max(3 * FLOAT * length * vocabulary + outputs, square)
    work = choose_work({"config": {"measure_windows": config.measure_windows}}, sizes)
    yield StepLoad(
        kind="deltallm.choose",
        count=len(measured),
        units=work * len(measured),
        memory_bytes=PROCESS_BYTES + FLOAT * model.parameters + factors + passing,
        gpu_bytes=model.weight_bytes + factors + passing,
        gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes + factors,
    )
    yield StepLoad(kind="deltallm.assemble", count=1, units=sizes["result_bytes"])
