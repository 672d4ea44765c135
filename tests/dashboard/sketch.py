"""Methods that compute nothing, for the pages that show them: one with every kind of setting that a config may have, one
that compresses a model by itself at a choice of widths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from compression_worker.catalog import Method
from compression_worker.contracts import CompressionError
from compression_worker.preflight import Estimate, Inputs, StepLoad


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """Two groups, two advanced settings, three optional ones."""

    ratio: float | None = field(
        default=None,
        metadata={"label": "Target ratio", "help": "What to reach.", "empty": "no target", "group": "Target"},
    )
    limit: int | None = field(default=None, metadata={"label": "Limit", "group": "Target"})
    bits: int = field(default=4, metadata={"label": "Bits", "help": "Of a <code>.", "choices": (1, 2, 4)})
    way: str | None = field(default=None, metadata={"label": "Way", "choices": ("near", "far"), "empty": "either"})
    exact: bool = field(default=True, metadata={"label": "Exact", "advanced": True})
    group_size: int = field(default=64, metadata={"label": "Group size", "advanced": True, "help": "Of a row."})

    def __post_init__(self) -> None:
        if self.ratio is not None and not 1 < self.ratio < 1000:
            raise CompressionError("bad_setting", f"ratio is {self.ratio!r}; it must be above 1 and below 1000")
        if self.group_size % 8:
            raise CompressionError("bad_setting", f"group_size is {self.group_size}; it must be a multiple of 8")

    @property
    def calibrates(self) -> bool:
        return self.way == "far"


def estimate(config: SketchConfig, inputs: Inputs) -> Estimate:
    size = inputs.variant.weight_bytes
    return Estimate(
        parts=({"name": "codes", "bytes": size // 4}, {"name": "masks", "bytes": size // 8}),
        source_bytes=size,
        intermediate_bytes=0,
        steps=(StepLoad(kind="sketch.plan", count=1, units=1.0),),
        sizes={},
        exact=True,
    )


def cheaper(config: SketchConfig) -> Iterator[SketchConfig]:
    return iter(())


calmer = cheaper

SKETCH = Method(
    label="Sketch",
    summary="Draws <b>nothing</b> at all.",
    paper="nowhere",
    config="tests.dashboard.sketch:SketchConfig",
    implementation="tests.dashboard.sketch",
    forecast="tests.dashboard.sketch",
    when="In tests.",
    costs="Nothing.",
)


@dataclass(frozen=True, kw_only=True)
class AloneConfig:
    """Widths of which the constructor knows more than the form offers: 8 is refused, 3 is no choice."""

    bits: int = field(default=4, metadata={"label": "Bits", "choices": (2, 4, 8)})

    def __post_init__(self) -> None:
        if self.bits == 8:
            raise CompressionError("bad_setting", "bits is 8; this is not done yet")

    @property
    def calibrates(self) -> bool:
        return self.bits == 2


ALONE = replace(
    SKETCH,
    label="Alone",
    summary="Draws a whole model.",
    config="tests.dashboard.sketch:AloneConfig",
    needs_base=False,
)
