"""What a job will need before any of it runs, from config.json and a manifest's totals alone. No torch here.

Three quantities, for each kind of step that a plan will ask for: how many there are, their *work* in units that a rate
measured here turns into seconds, and the most memory that one of them holds. Bytes are those of the result, part by
part, and of what is written on the way. A model whose shapes are not known here gets upper bounds instead, and the
estimate says so (``exact``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from compression_worker.contracts import Json

PROCESS_BYTES = 540_000_000
"""What a child holds that has loaded a model of no size: Python, torch, transformers and the methods' modules, measured
over every kind of step as 500 to 540 MB, since pages of the libraries count that happen to be in the page cache. A
child stays warm from step to step; one that never loaded a model holds 400 MB."""
ADDRESS_SPACE_BYTES = 1_200_000_000
"""What such a child maps beyond what it holds, measured with two threads: a limit of its address space leaves so much
less for models."""
FLOAT = 4
"""Bytes of a float32: training and measuring compute in it."""
MIXTURE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
Work = Callable[[Json, Mapping[str, float]], float]


@dataclass(frozen=True)
class Matrix:
    """One linear of a block: ``y (N) = W x (K)``."""

    outputs: int
    inputs: int

    @property
    def elements(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A transformer by its sizes. ``block``: the linears of one of its equal ``layers``; the rest counts elements."""

    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    block: tuple[Matrix, ...]
    embeddings: int
    head: int
    norms: int
    other: int

    @property
    def linears(self) -> int:
        """Weights in the block linears."""
        return self.layers * sum(matrix.elements for matrix in self.block)

    @property
    def tensors(self) -> int:
        """About how many tensors there are beside the linears: two norms a block, and those at both ends."""
        return 2 * self.layers + 3


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a checkpoint's manifest says without a weight."""

    config: Json = field(default_factory=dict)
    parameters: int = 0
    weight_bytes: int = 0
    size_bytes: int = 0

    @property
    def width(self) -> float:
        """Bytes of a weight."""
        return self.weight_bytes / max(self.parameters, 1)

    @property
    def side_bytes(self) -> int:
        """Tokenizer and configuration."""
        return max(0, self.size_bytes - self.weight_bytes)

    def shapes(self) -> Shapes | None:
        """None where the configuration is of a family that is not known here, or disagrees with the weights."""
        try:
            made = _gpt2(self) if "n_embd" in self.config else _llama(self)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
        return made if made and 0 < made.linears <= self.parameters else None


def _llama(model: Model) -> Shapes | None:
    """Llama, Mistral, Qwen and whatever else has three linears after four."""
    config = model.config
    if any(config.get(key) for key in MIXTURE_KEYS):
        return None
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    inner, heads = int(config["intermediate_size"]), int(config["num_attention_heads"])
    width = int(config.get("head_dim") or hidden // heads)
    query, shared = heads * width, int(config.get("num_key_value_heads") or heads) * width
    attention = (Matrix(query, hidden), Matrix(shared, hidden), Matrix(shared, hidden), Matrix(hidden, query))
    block = (*attention, Matrix(inner, hidden), Matrix(inner, hidden), Matrix(hidden, inner))
    sizes = {"layers": layers, "hidden": hidden, "inner": inner, "heads": heads}
    return _with_ends(model, block, sizes, int(config.get("vocab_size") or 0), hidden * (2 * layers + 1))


def _gpt2(model: Model) -> Shapes | None:
    config = model.config
    hidden, layers, heads = int(config["n_embd"]), int(config["n_layer"]), int(config["n_head"])
    inner = int(config.get("n_inner") or 4 * hidden)
    block = (Matrix(3 * hidden, hidden), Matrix(hidden, hidden), Matrix(inner, hidden), Matrix(hidden, inner))
    sizes = {"layers": layers, "hidden": hidden, "inner": inner, "heads": heads}
    vocabulary = int(config.get("vocab_size") or 0)
    return _with_ends(model, block, sizes, vocabulary, hidden * (2 * layers + 1), int(config.get("n_positions") or 0))


def _with_ends(
    model: Model, block: tuple[Matrix, ...], sizes: dict[str, int], vocabulary: int, norms: int, positions: int = 0
) -> Shapes:
    """Share out what is no linear: embeddings, an output head of its own if there is room for one, norms, the rest."""
    left = model.parameters - sizes["layers"] * sum(matrix.elements for matrix in block)
    table = vocabulary * sizes["hidden"]
    embeddings = min(left, table + positions * sizes["hidden"]) if table else left
    head = table if table and left - embeddings >= table else 0
    norms = min(norms, left - embeddings - head)
    other = left - embeddings - head - norms
    return Shapes(
        block=block, vocabulary=vocabulary, embeddings=embeddings, head=head, norms=norms, other=other, **sizes
    )


@dataclass(frozen=True, kw_only=True)
class StepLoad:
    """The steps of one kind. ``memory_bytes`` is a step's peak on a CPU; on a GPU it is split into the other two."""

    kind: str
    count: int
    units: float
    memory_bytes: int = PROCESS_BYTES
    gpu_bytes: int = 0
    gpu_host_bytes: int = PROCESS_BYTES


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job will come to. ``parts`` add up to what it publishes; ``sizes`` is what its steps' work counts in."""

    parts: tuple[Json, ...] = ()
    source_bytes: int = 0
    intermediate_bytes: int = 0
    steps: tuple[StepLoad, ...] = ()
    sizes: Mapping[str, float] = field(default_factory=dict)
    exact: bool = True

    @property
    def result_bytes(self) -> int:
        return sum(part["bytes"] for part in self.parts)

    @property
    def needed_bytes(self) -> int:
        """Free room to ask for: twice what will be written, so that a wrong guess does not stop a job of hours."""
        return 2 * (self.result_bytes + self.intermediate_bytes)

    @property
    def hungriest(self) -> StepLoad | None:
        return max(self.steps, key=lambda step: step.memory_bytes, default=None)

    def to_json(self) -> Json:
        return {**asdict(self), "sizes": dict(self.sizes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Estimate:
        known = {name: value[name] for name in ("source_bytes", "intermediate_bytes", "sizes", "exact")}
        return cls(parts=tuple(value["parts"]), steps=tuple(StepLoad(**step) for step in value["steps"]), **known)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a job is given, by its sizes. ``artifact_bytes`` and ``base`` where there is one."""

    variant: Model
    base: Model | None = None
    artifact_bytes: int = 0
    text_bytes: int = 0
    questions: int = 0
    question_bytes: int = 0


def import_estimate(size_bytes: int, weight_bytes: int) -> Estimate:
    """A folder of ``size_bytes`` is copied into the store through a small buffer, hashed on the way."""
    steps = (StepLoad(kind="checkpoint.import", count=1, units=float(size_bytes)),)
    parts = ({"name": "weights", "bytes": weight_bytes}, {"name": "side files", "bytes": size_bytes - weight_bytes})
    return Estimate(parts=parts, source_bytes=size_bytes, steps=steps, sizes={"source_bytes": float(size_bytes)})


def rehearsal_estimate(model: Model) -> Estimate:
    """Every file is hashed, the model is loaded in its own precision, and it answers once."""
    load = StepLoad(
        kind="release.rehearse",
        count=1,
        units=float(model.size_bytes),
        memory_bytes=PROCESS_BYTES + 2 * model.weight_bytes,
        gpu_bytes=model.weight_bytes,
        gpu_host_bytes=PROCESS_BYTES + 2 * model.weight_bytes,
    )
    return Estimate(steps=(load,), source_bytes=model.size_bytes, sizes={"source_bytes": float(model.size_bytes)})


def source_work(params: Json, sizes: Mapping[str, float]) -> float:
    """Steps that read every byte of a checkpoint once."""
    return sizes["source_bytes"]


def halvings(value: int, lowest: int) -> Iterable[int]:
    """``value`` halved again and again, never below ``lowest``."""
    while value > lowest:
        value = max(lowest, value // 2)
        yield value


def chunks_of(total: int, size: int) -> int:
    return math.ceil(total / size)
