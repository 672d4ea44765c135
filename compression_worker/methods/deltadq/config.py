"""What a person may set of DeltaDQ (arXiv:2410.08666). No torch.

The paper's text gives alpha, bits and parts; which linears, the exact count a group keeps, the form of the attention
error, one grid per matrix and the formula of the nominal ratio are our reading of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compression_worker.bounds import one_of, whole_number
from compression_worker.contracts import CompressionError

ROWS = ("raw", "sign", "int4", "int8")
CRITERIA = ("attention_error", "output_error")
UNQUANTIZED = 16
"""``num_bits`` that keeps what survives as bfloat16."""


@dataclass(frozen=True, kw_only=True)
class DeltaDQConfig:
    """Settings of DeltaDQ. The defaults are the paper's 128x: alpha 8, 4 bits, 8 parts."""

    alpha: int = field(
        default=8,
        metadata={
            "label": "Keep one weight in",
            "help": "Of each group of a row, one weight in so many survives, and is multiplied by as much (alpha).",
        },
    )
    num_bits: int = field(
        default=4,
        metadata={
            "label": "Bits of a survivor",
            "help": "1 to 8 on a uniform grid of each matrix; 16 keeps survivors as bfloat16, without quantization.",
        },
    )
    parts: int = field(
        default=8,
        metadata={
            "label": "Parts",
            "help": (
                "Separate quantization splits the codes by value into so many parts, a power of two. It changes the "
                "nominal ratio that the paper counts and no value; the true ratio stands beside it."
            ),
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "label": "Group size",
            "help": (
                "Weights of a row that share one exact count of survivors. Empty: the size of least error on the "
                "calibration text, of alpha, 2 alpha, 4 alpha … up to the whole row."
            ),
            "empty": "chosen by error",
        },
    )
    group_size_by: str = field(
        default="attention_error",
        metadata={
            "label": "Group size is chosen by",
            "help": (
                "attention_error: of the first layer's query-key products, as published. output_error: of all linears "
                "of the first layer."
            ),
            "choices": CRITERIA,
            "advanced": True,
        },
    )
    embeddings: str = field(
        default="raw",
        metadata={
            "label": "Embeddings and head",
            "help": (
                "raw: kept whole, as published. sign, int4, int8: only rows that changed, at 1, 4 or 8 bits an "
                "element. With a large vocabulary they are most of the file."
            ),
            "choices": ROWS,
        },
    )

    def __post_init__(self) -> None:
        whole_number("alpha", self.alpha, 1, 1024)
        if self.num_bits != UNQUANTIZED:
            whole_number("num_bits", self.num_bits, 1, 8)
        whole_number("parts", self.parts, 1, 256)
        if self.parts & (self.parts - 1):
            below = 1 << (self.parts.bit_length() - 1)
            raise CompressionError(
                "bad_setting",
                f"parts is {self.parts}, which is no power of two: {below} or {2 * below} split the codes evenly",
            )
        if self.num_bits == UNQUANTIZED and self.parts > 1:
            raise CompressionError(
                "bad_setting", f"parts is {self.parts}, and num_bits 16 makes no codes to split: set parts to 1"
            )
        if self.left_bits < 1:
            raise CompressionError(
                "bad_setting",
                f"parts is {self.parts} at num_bits {self.num_bits}: no bit of the code is left, and the paper's ratio "
                f"has no value. At most {1 << (self.num_bits - 1)} parts",
            )
        if self.group_size is not None:
            whole_number("group_size", self.group_size, 1, 1 << 20)
            if self.group_size % self.alpha:
                near = max(self.alpha, self.group_size // self.alpha * self.alpha)
                raise CompressionError(
                    "bad_setting",
                    f"group_size is {self.group_size}, no multiple of alpha {self.alpha}, so that a group cannot keep "
                    f"exactly one weight in {self.alpha}: {near} or {near + self.alpha} can",
                )
        one_of("group_size_by", self.group_size_by, CRITERIA)
        one_of("embeddings", self.embeddings, ROWS)

    @property
    def left_bits(self) -> int:
        """``k - log2 m``: bits of a code within its part."""
        return self.num_bits - (self.parts.bit_length() - 1)

    @property
    def nominal_ratio(self) -> float:
        """``16 alpha / (k - log2 m)``, as the paper counts (our reading: it gives all of its published ratios)."""
        return 16 * self.alpha / self.left_bits

    @property
    def calibrates(self) -> bool:
        """Whether a calibration text is needed."""
        return self.searches

    @property
    def searches(self) -> bool:
        """Whether the group size is chosen on calibration text."""
        return self.group_size is None
