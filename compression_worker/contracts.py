"""The shapes that cross a process or a disk: steps, their results, metrics, and the one error a job may say no with.

Nothing here imports torch, Django or Celery, so that the web process, a worker's parent process and the child
that computes all speak of the same things.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compression_worker.store import Store

CODE_VERSION = "2"
"""Part of every step's key. Raise it when a change of code changes the bytes that a step makes."""

Json = dict[str, Any]


class CompressionError(Exception):
    """The job says no: bad input, or a target that cannot be met.

    The message is for a person and says what is wrong, where, and what to do. ``code`` is a stable word for
    programs (``shape_mismatch``, ``truncated_file`` …).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes. Refuses NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(data: bytes | memoryview) -> str:
    """Lower-case hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One pure unit of work: what a parent process writes to a child as one JSON line.

    ``params``, ``inputs`` and ``seed`` decide the result, and nothing else does. ``inputs`` maps a name to the
    digest of a document in the store: a checkpoint manifest, an artifact manifest or another step's output.
    """

    kind: str
    params: Json = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    @property
    def key(self) -> str:
        """SHA-256 of all that decides the result: two steps with one key have one output."""
        return sha256(canonical_json(asdict(self) | {"code": CODE_VERSION}))

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Json) -> StepSpec:
        return cls(kind=value["kind"], params=value["params"], inputs=value["inputs"], seed=value["seed"])


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step that a plan asks for.

    A value of ``inputs`` is a digest, or ``"@3"`` for the output of the plan's fourth step. ``group`` is what the
    page counts (``layer``, ``distill``, ``target`` …); ``name`` is what a person reads (``layer 3``).
    """

    name: str
    kind: str
    group: str = ""
    params: Json = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def to_json(self) -> Json:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What a step leaves behind: the digests of its blobs, a few figures, and (from a plan) the steps to come.

    It is stored as canonical JSON; its digest is the step's output digest. Nothing in it depends on the clock, the
    machine or the attempt, so that a repeated step gives an equal digest.
    """

    blobs: Mapping[str, str] = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    steps: tuple[PlannedStep, ...] = ()

    def to_bytes(self) -> bytes:
        return canonical_json({"blobs": self.blobs, "data": self.data, "steps": [s.to_json() for s in self.steps]})

    @staticmethod
    def is_one(raw: bytes) -> bool:
        """Whether a document is a step's output and not a manifest or a text."""
        return raw.startswith(b'{"blobs":')

    @classmethod
    def from_bytes(cls, raw: bytes) -> StepOutput:
        value = json.loads(raw)
        return cls(
            blobs=value["blobs"],
            data=value["data"],
            steps=tuple(PlannedStep(**step) for step in value["steps"]),
        )


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step's function is given, beside the pure specification.

    ``progress(done, total, unit)`` and ``log(text, level)`` speak to whoever watches. ``measure(name, value)`` hands
    over what depends on clock and machine (seconds, bytes per second): it is shown on pages and is no part of the
    output. ``import_roots`` names the folders that an import may read.
    """

    store: Store
    spec: StepSpec
    progress: Callable[[int, int, str], None]
    log: Callable[[str, str], None]
    measure: Callable[[str, float], None]
    import_roots: Mapping[str, Path] = field(default_factory=dict)
    device: str = "cpu"

    def input(self, name: str) -> StepOutput:
        """The output document of the step named as input ``name``."""
        return StepOutput.from_bytes(self.store.read_bytes(self.spec.inputs[name]))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One measured quantity with its 95 % interval (``low``, ``high``), as ``evaluate --json`` prints it."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    higher_is_better: bool
    samples: int

    def to_json(self) -> Json:
        return asdict(self)
