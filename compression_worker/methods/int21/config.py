"""What a person may set of INT2.1 (arXiv:2306.08162). No torch.

The paper's text gives neither rank, loss weights nor learning rate: values marked *our reading* are one reconstruction
that satisfies the sizes it states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compression_worker.bounds import one_of, positive, whole_number
from compression_worker.contracts import CompressionError
from compression_worker.quantization.bases import BASES, base_config

STARTS = ("zero", "closed_form")
OBJECTIVES = ("lrec", "emef", "both")
SOURCES = ("text", "generations")
ADAPTER_DTYPES = ("float16", "bfloat16", "float32")
LEAST_TEMPERATURE = 0.05
FOR_BASE = ("num_bits", "group_size", "samples", "length", "calibration")
"""Settings that are handed to the method of the base, where it has them."""


@dataclass(frozen=True, kw_only=True)
class Int21Config:
    """Settings of INT2.1: a packed base, and low-rank adapters that learn what it lost."""

    base_method: str = field(
        default="gptq",
        metadata={
            "label": "Base",
            "help": "The method that quantizes the frozen base beneath the adapters.",
            "choices": BASES,
        },
    )
    num_bits: int = field(
        default=2,
        metadata={"label": "Bits of a weight", "help": "Of the base: 2, 3, 4 or 8 with GPTQ, 2, 3 or 4 with QuIP#."},
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "label": "Group size",
            "help": "Of a GPTQ base: inputs that share a scale and a zero. Empty: chosen by shape.",
            "empty": "chosen by shape",
        },
    )
    rank: int = field(
        default=16,
        metadata={
            "label": "Rank",
            "help": (
                "Of each adapter. 16 in float16 on every linear is 2.1 bits and 1.05 times the size of a 2-bit "
                "Llama-7B, as published (our reading)."
            ),
        },
    )
    objective: str = field(
        default="lrec",
        metadata={
            "label": "Adapters learn",
            "help": (
                "lrec: the answers of the full-precision model (error correction). emef: the next token of the text "
                "(task tuning). both: one after the other."
            ),
            "choices": OBJECTIVES,
        },
    )
    start: str = field(
        default="zero",
        metadata={
            "label": "Adapters begin",
            "help": (
                "zero: as if they were not there. closed_form: as the best low-rank approximation of what quantization "
                "lost, weighted by what each input carries; reads the calibration text once more."
            ),
            "choices": STARTS,
        },
    )
    tokens: int = field(
        default=262_144,
        metadata={
            "label": "Training tokens",
            "help": "2 to 10 million for a model of billions. Fewer where the text is short.",
        },
    )
    window_tokens: int = field(
        default=512,
        metadata={"label": "Tokens of a training window", "help": "1,024 or 2,048 where memory allows."},
    )
    batch_size: int = field(
        default=4,
        metadata={
            "label": "Windows in a training step",
            "help": "A few go through the model at a time, so that memory does not grow with them.",
        },
    )
    learning_rate: float = field(
        default=3e-4,
        metadata={"label": "Learning rate", "help": "Falls to zero along a cosine after a short rise (our reading)."},
    )
    epochs: int = field(
        default=1, metadata={"label": "Times that the text is read", "help": "Of training.", "advanced": True}
    )
    alpha: int | None = field(
        default=None,
        metadata={
            "label": "LoRA alpha",
            "help": "Adapters count alpha / rank times. Empty: twice the rank (our reading).",
            "empty": "twice the rank",
            "advanced": True,
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={"label": "Temperature", "help": "Of both models' answers in error correction.", "advanced": True},
    )
    ce_weight: float = field(
        default=0.0,
        metadata={
            "label": "Weight of the text itself",
            "help": "c in (1 - c) KL + c CE: 0 is pure error correction.",
            "advanced": True,
        },
    )
    teacher_logits: int = field(
        default=128,
        metadata={
            "label": "Logits of the teacher",
            "help": "The largest that are kept of each token; the rest counts as one class.",
            "advanced": True,
        },
    )
    held_out: int = field(
        default=8,
        metadata={
            "label": "Held-out windows",
            "help": "Windows of the text that are not trained on, and that the report measures.",
            "advanced": True,
        },
    )
    checkpointing: bool = field(
        default=True,
        metadata={
            "label": "Compute blocks twice",
            "help": "Keeps the inputs of blocks alone for the backward pass: less memory, a third more time.",
            "advanced": True,
        },
    )
    adapter_dtype: str = field(
        default="float16",
        metadata={
            "label": "Adapters are stored as",
            "help": "They are trained in float32.",
            "choices": ADAPTER_DTYPES,
            "advanced": True,
        },
    )
    chunk_tokens: int = field(
        default=32_768,
        metadata={
            "label": "Tokens of a training chunk",
            "help": "After so many tokens the state is stored, so that no more is lost to a worker that stops.",
            "advanced": True,
        },
    )
    samples: int = field(
        default=32,
        metadata={"label": "Calibration windows", "help": "What the method of the base reads.", "advanced": True},
    )
    length: int = field(
        default=512,
        metadata={"label": "Tokens of a calibration window", "help": "At most what the model reads.", "advanced": True},
    )
    calibration: str = field(
        default="text",
        metadata={
            "label": "Text comes from",
            "help": "text: a text set. generations: the model writes it, for calibration and for training.",
            "choices": SOURCES,
            "advanced": True,
        },
    )

    def __post_init__(self) -> None:
        one_of("base_method", self.base_method, BASES)
        whole_number("rank", self.rank, 1, 4096)
        one_of("objective", self.objective, OBJECTIVES)
        one_of("start", self.start, STARTS)
        whole_number("tokens", self.tokens, 1, 1 << 40)
        whole_number("window_tokens", self.window_tokens, 8, 1 << 17)
        whole_number("batch_size", self.batch_size, 1, 4096)
        positive("learning_rate", self.learning_rate, 1.0)
        whole_number("epochs", self.epochs, 1, 1000)
        if self.alpha is not None:
            whole_number("alpha", self.alpha, 1, 1 << 20)
        positive("temperature", self.temperature, 100.0)
        if self.temperature < LEAST_TEMPERATURE:
            raise CompressionError(
                "bad_setting",
                f"temperature is {self.temperature}; below {LEAST_TEMPERATURE} an answer is one token, no distribution",
            )
        if type(self.ce_weight) not in (int, float) or not 0 <= self.ce_weight < 1:
            raise CompressionError(
                "bad_setting",
                f"ce_weight is {self.ce_weight!r}; it must be from 0 to below 1: for 1 set objective=emef",
            )
        whole_number("teacher_logits", self.teacher_logits, 1, 1 << 20)
        whole_number("held_out", self.held_out, 1, 10_000)
        whole_number("chunk_tokens", self.chunk_tokens, 1, 1 << 40)
        one_of("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        one_of("calibration", self.calibration, SOURCES)
        self.base_config()

    def base_config(self) -> Any:
        """The settings of the base's own method; refuses what that method refuses, or does not have."""
        return base_config(self.base_method, {name: getattr(self, name) for name in FOR_BASE})

    @property
    def lora_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied with."""
        return self.lora_alpha / self.rank

    @property
    def calibrates(self) -> bool:
        """Whether a text is needed."""
        return self.calibration == "text"

    @property
    def phases(self) -> tuple[str, ...]:
        """What is trained, one after another."""
        return ("lrec", "emef") if self.objective == "both" else (self.objective,)

    @property
    def windows(self) -> int:
        """Training windows to ask for: whole training steps."""
        steps = max(1, round(self.tokens / (self.window_tokens * self.batch_size)))
        return steps * self.batch_size

    @property
    def chunk_steps(self) -> int:
        """Optimizer steps of one chunk."""
        return max(1, self.chunk_tokens // (self.window_tokens * self.batch_size))
