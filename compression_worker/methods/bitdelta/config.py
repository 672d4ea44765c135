"""What a person may set of BitDelta, with the paper's values as defaults (arXiv:2402.10193). No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from compression_worker.bounds import one_of, positive, whole_number
from compression_worker.contracts import CompressionError

SCALES = ("tensor", "row", "column", "group")
FITS = ("mean", "activations")
ROWS = ("raw", "sign", "int4", "int8")
SCHEDULES = ("cosine", "constant")
UNITS = ("absolute", "relative")
CHUNK_STEPS = 25
"""Training steps of one distillation step: what a kill costs at most."""


@dataclass(frozen=True, kw_only=True)
class BitDeltaConfig:
    """Settings of BitDelta; those of the paper by default, and ``distill_steps=0`` gives its initial form.

    Paper: 200 steps of Adam (betas 0.9 and 0.999, no weight decay) on 4 samples of 128 tokens at 1e-4, cosine schedule.
    Beyond the paper: finer scales, more masks, a low-rank part, embeddings by row, and a target that is met by choosing
    all of these for each matrix.
    """

    target_ratio: float | None = field(
        default=None,
        metadata={
            "label": "Target ratio",
            "help": (
                "Weight bytes of the variant over every byte of the artifact. The coding of each matrix is then chosen "
                "for the least loss that this size allows; scales, masks and embeddings below are not used."
            ),
            "empty": "no target",
        },
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "label": "Target KL divergence",
            "help": (
                "Of the compressed model from the variant on the calibration text, in nats a token. The smallest "
                "artifact that keeps it is made; distillation steps have to be 0."
            ),
            "empty": "no target",
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
    scale: str = field(
        default="tensor",
        metadata={
            "label": "One scale per",
            "help": "tensor: one for each matrix, as published. row, column or group: closer, for a few more bytes.",
            "choices": SCALES,
            "advanced": True,
        },
    )
    group_size: int = field(
        default=64,
        metadata={
            "label": "Group size",
            "help": "Weights of a row that share a scale of kind group.",
            "advanced": True,
        },
    )
    masks: int = field(
        default=1,
        metadata={
            "label": "Masks",
            "help": "Stacked sign masks: each codes what the ones before it left, for one more bit a weight.",
            "advanced": True,
        },
    )
    residual_rank: int = field(
        default=0,
        metadata={
            "label": "Low-rank part",
            "help": "Rank of a factored part that is taken from the delta before the masks. 0: none.",
            "advanced": True,
        },
    )
    scale_fit: str = field(
        default="mean",
        metadata={
            "label": "Scales start at",
            "help": (
                "mean: the mean size of the delta, as published. activations: the least squares on layer inputs, "
                "which the calibration text gives."
            ),
            "choices": FITS,
            "advanced": True,
        },
    )

    distill_steps: int = field(
        default=200,
        metadata={
            "label": "Distillation steps",
            "help": "Training steps of the scales. 0 keeps the initial scales.",
            "default_with": {"target_kl": 0},
        },
    )
    batch_size: int = field(
        default=4,
        metadata={
            "label": "Batch size",
            "help": "Samples of calibration text in each training step.",
            "advanced": True,
        },
    )
    sequence_length: int = field(
        default=128,
        metadata={
            "label": "Sequence length",
            "help": "Tokens of a sample; longer texts are cut into several.",
            "advanced": True,
        },
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
            "advanced": True,
        },
    )
    schedule: str = field(
        default="cosine",
        metadata={
            "label": "Schedule",
            "help": "cosine: the learning rate falls to zero over all steps. constant: it stays.",
            "choices": SCHEDULES,
            "advanced": True,
        },
    )

    def __post_init__(self) -> None:
        for name in ("target_ratio", "target_kl"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name), 10_000.0)
        if self.target_ratio is not None and self.target_kl is not None:
            raise CompressionError("bad_setting", "target_ratio and target_kl are both set: choose one of them")
        if self.target_kl is not None and self.distill_steps:
            raise CompressionError(
                "bad_setting",
                f"distill_steps is {self.distill_steps}; with a target_kl it must be 0, because training the scales "
                "afterwards would move away from the target",
            )
        one_of("embeddings", self.embeddings, ROWS)
        one_of("scale", self.scale, SCALES)
        whole_number("group_size", self.group_size, 8, 65_536)
        whole_number("masks", self.masks, 1, 8)
        whole_number("residual_rank", self.residual_rank, 0, 4096)
        one_of("scale_fit", self.scale_fit, FITS)
        whole_number("distill_steps", self.distill_steps, 0, 100_000)
        whole_number("batch_size", self.batch_size, 1, 1024)
        whole_number("sequence_length", self.sequence_length, 2, 32_768)
        positive("learning_rate", self.learning_rate, 1.0)
        one_of("learning_rate_unit", self.learning_rate_unit, UNITS)
        one_of("schedule", self.schedule, SCHEDULES)

    @property
    def chooses(self) -> bool:
        """Whether a target decides the coding of each matrix."""
        return self.target_ratio is not None or self.target_kl is not None

    @property
    def senses(self) -> bool:
        """Whether layer inputs have to be seen before anything is coded."""
        return self.chooses or self.scale_fit == "activations"

    @property
    def calibrates(self) -> bool:
        """Whether a calibration text is needed."""
        return self.senses or self.distill_steps > 0
