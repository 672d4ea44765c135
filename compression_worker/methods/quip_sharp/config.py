"""What a person may set of QuIP# (arXiv:2402.04396), with the paper's values where a CPU can pay them. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from compression_worker.bounds import one_of, positive, whole_number
from compression_worker.contracts import CompressionError

BITS = (2, 3, 4)
RHO = {2: 0.9, 3: 0.98, 4: 1.03}
"""How wide the weights are made for the codebook, in its own units: the paper's value for each number of bits."""
TUNINGS = ("none", "block", "end_to_end", "both")
SOURCES = ("text", "generations")
MOST_LOGITS = 1024


@dataclass(frozen=True, kw_only=True)
class QuipSharpConfig:
    """Settings of QuIP#: 2 bits without fine-tuning by default.

    Paper: 6,144 windows as long as the model's context for the Hessians; for fine-tuning 256 windows and 128 more that
    choose the best epoch, 5 epochs of a batch of 8 for each block, then the whole model.
    """

    num_bits: int = field(
        default=2,
        metadata={
            "label": "Bits a weight",
            "help": "2: one code word for 8 weights. 3 and 4: a second code word for what the first one leaves.",
            "choices": BITS,
        },
    )
    samples: int = field(
        default=32,
        metadata={
            "label": "Calibration windows",
            "help": "Windows of the calibration text that the Hessians are made from. The paper reads 6,144.",
        },
    )
    length: int = field(
        default=512,
        metadata={
            "label": "Tokens of a window",
            "help": "At most what the model can read; the paper takes all of that, 2,048 or 4,096 tokens.",
        },
    )
    tuning: str = field(
        default="none",
        metadata={
            "label": "Fine-tuning",
            "help": (
                "none: rounding alone. block: each block makes up for its own rounding errors. end_to_end: sign "
                "vectors and norms of the whole model learn its full-precision answers. both: one after the other, as "
                "published."
            ),
            "choices": TUNINGS,
        },
    )
    passes: int = field(
        default=10,
        metadata={
            "label": "Refinement passes",
            "help": "Each pass rounds all columns once more with the others fixed. 0: none. As published: 10.",
            "advanced": True,
        },
    )
    rho: float | None = field(
        default=None,
        metadata={
            "label": "Width of the weights",
            "help": (
                "In units of the codebook (rho). Empty: what loses least in each stack of matrices. Published: 0.9, "
                "0.98 and 1.03 at 2, 3 and 4 bits."
            ),
            "empty": "of least loss",
            "advanced": True,
        },
    )
    fuse: bool = field(
        default=True,
        metadata={
            "label": "Stack matrices of one input",
            "help": "Query, key and value, and gate and up, are transformed and rounded as one matrix, as published.",
            "advanced": True,
        },
    )
    joint_search: bool = field(
        default=False,
        metadata={
            "label": "Both code words together",
            "help": "At 4 bits: the best pair of 16 first code words. About a tenth less error for much more time.",
            "advanced": True,
        },
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
    damping: float = field(
        default=0.01,
        metadata={
            "label": "Damping",
            "help": "Share of the mean of a Hessian's diagonal that is added to it.",
            "advanced": True,
        },
    )
    block_epochs: int = field(
        default=5,
        metadata={
            "label": "Epochs of each block",
            "help": "Times that the windows are read after each matrix of a block is rounded; the best epoch is kept.",
            "advanced": True,
        },
    )
    batch_size: int = field(
        default=8,
        metadata={
            "label": "Windows in a batch",
            "help": "Of the fine-tuning of blocks. The whole model is tuned one window at a time.",
            "advanced": True,
        },
    )
    tuning_epochs: int = field(
        default=4,
        metadata={
            "label": "Epochs of the whole model",
            "help": "Times that the windows are read in end-to-end fine-tuning. The published code reads them 8 times.",
            "advanced": True,
        },
    )
    learning_rate: float = field(
        default=5e-5,
        metadata={
            "label": "Learning rate",
            "help": "Of weights, norms and head in fine-tuning.",
            "advanced": True,
        },
    )
    sign_learning_rate: float | None = field(
        default=None,
        metadata={
            "label": "Learning rate of signs",
            "help": "Of the sign vectors. Empty: 0.0005 at 2 bits, else 0.00005, as published.",
            "empty": "as published",
            "advanced": True,
        },
    )
    teacher_logits: int = field(
        default=128,
        metadata={
            "label": "Logits of the teacher",
            "help": (
                "The largest logits that are kept for each token, with the sum of the rest, for end-to-end fine-tuning."
            ),
            "advanced": True,
        },
    )
    train_head: bool = field(
        default=False,
        metadata={
            "label": "Tune the output head",
            "help": "As published, in end-to-end fine-tuning. A head that is tied to the embeddings stays as it is.",
            "advanced": True,
        },
    )

    def __post_init__(self) -> None:
        if self.num_bits not in BITS:
            raise CompressionError("bad_setting", f"num_bits is {self.num_bits!r}; the codebooks have 2, 3 and 4 bits")
        whole_number("samples", self.samples, 1, 100_000)
        whole_number("length", self.length, 8, 1 << 17)
        one_of("tuning", self.tuning, TUNINGS)
        whole_number("passes", self.passes, 0, 100)
        if self.rho is not None:
            positive("rho", self.rho, 4.0)
        if self.joint_search and self.num_bits != 4:
            raise CompressionError(
                "bad_setting", f"joint_search is for num_bits 4, and num_bits is {self.num_bits}: set one of the two"
            )
        one_of("calibration", self.calibration, SOURCES)
        positive("damping", self.damping, 1.0)
        whole_number("block_epochs", self.block_epochs, 1, 1000)
        whole_number("batch_size", self.batch_size, 1, 1024)
        whole_number("tuning_epochs", self.tuning_epochs, 1, 1000)
        positive("learning_rate", self.learning_rate, 1.0)
        if self.sign_learning_rate is not None:
            positive("sign_learning_rate", self.sign_learning_rate, 1.0)
        whole_number("teacher_logits", self.teacher_logits, 1, MOST_LOGITS)
        if self.tunes_blocks and self.samples < 2:
            raise CompressionError(
                "bad_setting", "samples is 1: fine-tuning of blocks needs a window to learn from and one to judge by"
            )

    @property
    def calibrates(self) -> bool:
        """Whether a calibration text is needed."""
        return self.calibration == "text"

    @property
    def tunes_blocks(self) -> bool:
        return self.tuning in ("block", "both")

    @property
    def tunes_whole(self) -> bool:
        return self.tuning in ("end_to_end", "both")

    @property
    def sign_rate(self) -> float:
        """The learning rate of sign vectors."""
        if self.sign_learning_rate is not None:
            return self.sign_learning_rate
        return 5e-4 if self.num_bits == 2 else 5e-5

    @property
    def training_windows(self) -> int:
        """Windows that blocks learn from; the others, a third, choose the best epoch, as published."""
        return max(1, math.ceil(self.samples * 2 / 3) if self.samples > 2 else self.samples - 1)
