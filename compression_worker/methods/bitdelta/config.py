"""What a person may set of BitDelta, with the paper's values as defaults (arXiv:2402.10193). No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from compression_worker.contracts import CompressionError

SCHEDULES = ("cosine", "constant")
UNITS = ("absolute", "relative")
CHUNK_STEPS = 25
"""Training steps of one distillation step: what a kill costs at most."""


@dataclass(frozen=True, kw_only=True)
class BitDeltaConfig:
    """Settings of scale distillation; ``distill_steps=0`` gives BitDelta's initial form.

    Paper: 200 steps of Adam (betas 0.9 and 0.999, no weight decay) on 4 samples of 128 tokens at 1e-4, cosine schedule.
    """

    distill_steps: int = field(
        default=200,
        metadata={"label": "Distillation steps", "help": "Training steps of the scales. 0 keeps the initial scales."},
    )
    batch_size: int = field(
        default=4, metadata={"label": "Batch size", "help": "Samples of calibration text in each training step."}
    )
    sequence_length: int = field(
        default=128,
        metadata={"label": "Sequence length", "help": "Tokens of a sample; longer texts are cut into several."},
    )
    learning_rate: float = field(
        default=1e-4, metadata={"label": "Learning rate", "help": "Of Adam at the first step; the schedule lowers it."}
    )
    learning_rate_unit: str = field(
        default="absolute",
        metadata={
            "label": "Learning rate counts",
            "help": (
                "absolute: an Adam step changes a scale by about the learning rate, as published. relative: by about "
                "that share of its initial value, which suits models whose scales are far from one thousandth."
            ),
            "choices": UNITS,
        },
    )
    schedule: str = field(
        default="cosine",
        metadata={
            "label": "Schedule",
            "help": "cosine: the learning rate falls to zero over all steps. constant: it stays.",
            "choices": SCHEDULES,
        },
    )

    def __post_init__(self) -> None:
        _whole_number("distill_steps", self.distill_steps, 0, 100_000)
        _whole_number("batch_size", self.batch_size, 1, 1024)
        _whole_number("sequence_length", self.sequence_length, 2, 32_768)
        _positive("learning_rate", self.learning_rate, 1.0)
        _one_of("learning_rate_unit", self.learning_rate_unit, UNITS)
        _one_of("schedule", self.schedule, SCHEDULES)


def _whole_number(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise CompressionError("bad_setting", f"{name} is {value!r}; it must be a whole number from {low} to {high:,}")


def _positive(name: str, value: object, high: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(float(str(value))) or not 0 < float(str(value)) <= high:
        raise CompressionError("bad_setting", f"{name} is {value!r}; it must be above 0 and at most {high:g}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CompressionError("bad_setting", f"{name} is {value!r}; it may be one of {', '.join(choices)}")
