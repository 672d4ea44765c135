"""What a person may set of GPTQ (arXiv:2210.17323). No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from compression_worker.bounds import one_of, positive, whole_number
from compression_worker.contracts import CompressionError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (128, 64, 32)
"""What is tried in turn where no group size is given."""
PER_ROW = -1
FORMATS = ("gptq_v2", "gptq")
SOURCES = ("text", "generations")
INPUTS = ("quantized", "full")


@dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """Settings of GPTQ."""

    num_bits: int = field(
        default=4,
        metadata={
            "label": "Bits of a weight",
            "help": (
                "2, 3, 4 or 8. At 2 bits a uniform grid hardly speaks any more: use QuIP#, or correct it with INT2.1."
            ),
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "label": "Group size",
            "help": (
                "Inputs that share a scale and a zero. Empty: the largest of 128, 64 and 32 that divides every "
                "matrix. -1: one for a whole row."
            ),
            "empty": "chosen by shape",
        },
    )
    symmetric: bool = field(
        default=False,
        metadata={
            "label": "Symmetric grid",
            "help": "The zero stands in the middle. A little worse, and what the fastest kernels of vLLM ask for.",
        },
    )
    clip: bool = field(
        default=True,
        metadata={
            "label": "Search the range",
            "help": (
                "Tries narrower ranges of each group and keeps the one of least error, counted by how much each input "
                "matters. Off as published."
            ),
            "advanced": True,
        },
    )
    act_order: bool = field(
        default=True,
        metadata={
            "label": "Largest inputs first",
            "help": "Rounds the inputs that matter most first. Groups stay as they lie, so no gather is due.",
            "advanced": True,
        },
    )
    true_sequential: bool = field(
        default=True,
        metadata={
            "label": "Matrix after matrix",
            "help": "Inside a block each matrix sees what the quantized ones before it make.",
            "advanced": True,
        },
    )
    inputs: str = field(
        default="quantized",
        metadata={
            "label": "Calibrate behind",
            "help": (
                "quantized: each block sees the outputs of the quantized blocks before it, as published. full: those "
                "of the full-precision model, so that blocks are independent and several jobs share one calibration."
            ),
            "choices": INPUTS,
            "advanced": True,
        },
    )
    passes: int = field(
        default=0,
        metadata={
            "label": "Refinement passes",
            "help": "Rounds each weight so many times again with all others fixed. 0 as published.",
            "advanced": True,
        },
    )
    damping: float = field(
        default=0.01,
        metadata={
            "label": "Damping",
            "help": "Added to the Hessian's diagonal, as a share of its mean. Raised where that is too little.",
            "advanced": True,
        },
    )
    samples: int = field(
        default=32,
        metadata={"label": "Calibration windows", "help": "The paper reads 128 windows of 2048 tokens."},
    )
    length: int = field(
        default=512, metadata={"label": "Tokens of a window", "help": "At most what the model can read."}
    )
    calibration: str = field(
        default="text",
        metadata={
            "label": "Calibration comes from",
            "help": "text: a text set. generations: the model writes it, where there is no text like that of its work.",
            "choices": SOURCES,
            "advanced": True,
        },
    )
    checkpoint_format: str = field(
        default="gptq_v2",
        metadata={
            "label": "Format of zeros",
            "help": "gptq_v2 stores them as they are. gptq, for older runtimes, less one.",
            "choices": FORMATS,
            "advanced": True,
        },
    )

    def __post_init__(self) -> None:
        whole_number("num_bits", self.num_bits, 2, 8)
        if self.num_bits not in BITS:
            raise CompressionError("bad_setting", f"num_bits is {self.num_bits}; it may be one of 2, 3, 4, 8")
        if self.group_size is not None and self.group_size != PER_ROW:
            whole_number("group_size", self.group_size, 8, 1 << 16)
        whole_number("passes", self.passes, 0, 100)
        positive("damping", self.damping, 1.0)
        whole_number("samples", self.samples, 1, 100_000)
        whole_number("length", self.length, 8, 1 << 17)
        one_of("inputs", self.inputs, INPUTS)
        one_of("calibration", self.calibration, SOURCES)
        one_of("checkpoint_format", self.checkpoint_format, FORMATS)

    @property
    def calibrates(self) -> bool:
        """Whether a calibration text is needed."""
        return self.calibration == "text"

    @property
    def bits_per_weight(self) -> float:
        """Codes, fp16 scales and packed zeros of a group of 128, or of the group size that is given."""
        group = self.group_size if self.group_size and self.group_size > 0 else GROUP_SIZES[0]
        return self.num_bits + (16 + self.num_bits) / group
