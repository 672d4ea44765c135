"""What a person may set of DeltaLLM (arXiv:2501.18596). No torch.

The paper gives neither ranks nor schedules nor learning rates, and says little of how layers are grouped: values marked
*our reading* are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compression_worker.bounds import one_of, positive, whole_number
from compression_worker.contracts import CompressionError
from compression_worker.methods.deltallm.groups import parse_groups

MODULES = {"mlp": ("mlp",), "mlp_attention": ("mlp", "attention"), "attention": ("attention",)}
"""Setting -> the kinds of module of a block that are shared."""
STARTS = ("svd", "svd_covariance", "zero")
DELTA_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class DeltaLLMConfig:
    """Settings of DeltaLLM: layers that share the weights of an earlier one, and keep a low-rank difference each."""

    target_reduction: float | None = field(
        default=0.12,
        metadata={
            "label": "Fewer parameters",
            "help": (
                "Share of all parameters that goes away: 0.12 is 12 %. As many layers as that takes are shared, at the "
                "highest rank that still reaches it. Not used where followers or groups are given."
            ),
            "empty": "followers or groups say it",
        },
    )
    followers: int | None = field(
        default=None,
        metadata={
            "label": "Layers that follow",
            "help": "How many blocks use the weights of an earlier one. Empty: as many as the share above takes.",
            "empty": "from the share of parameters",
        },
    )
    groups: str = field(
        default="",
        metadata={
            "label": "Groups by hand",
            "help": (
                "Anchor and followers by number of block, from 0: 4:5,6;10:11. Empty: chosen by what each candidate "
                "costs on the text."
            ),
        },
    )
    rank: int = field(
        default=64,
        metadata={
            "label": "Rank",
            "help": (
                "Of each difference (our reading). With a share of parameters as the target it decides how many layers "
                "follow, and then grows as far as the target allows."
            ),
        },
    )
    modules: str = field(
        default="mlp",
        metadata={
            "label": "What is shared",
            "help": "Of a block. MLPs bear it better than attention.",
            "choices": tuple(MODULES),
        },
    )
    start: str = field(
        default="svd",
        metadata={
            "label": "Differences begin",
            "help": (
                "svd: as the best low-rank approximation of what differs. svd_covariance: the same, weighted by what "
                "each input carries. zero: as if layers were equal."
            ),
            "choices": STARTS,
        },
    )
    window_tokens: int = field(
        default=512,
        metadata={"label": "Tokens of a training window", "help": "1,024 or 2,048 where memory allows."},
    )
    measure_windows: int = field(
        default=4,
        metadata={
            "label": "Windows to choose by",
            "help": "Windows of the text on which each candidate is measured.",
            "advanced": True,
        },
    )
    picks_per_round: int = field(
        default=2,
        metadata={
            "label": "Choices in a round",
            "help": "After so many followers are chosen, the candidates that are left are measured again.",
            "advanced": True,
        },
    )
    protect_first: int = field(
        default=2,
        metadata={
            "label": "First blocks that never follow",
            "help": "They may be anchors (our reading).",
            "advanced": True,
        },
    )
    protect_last: int = field(
        default=2,
        metadata={"label": "Last blocks that never follow", "help": "Our reading.", "advanced": True},
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
    delta_dtype: str = field(
        default="float16",
        metadata={
            "label": "Differences are stored as",
            "help": "They are trained in float32.",
            "choices": DELTA_DTYPES,
            "advanced": True,
        },
    )
    samples: int = field(
        default=32,
        metadata={
            "label": "Calibration windows",
            "help": "What a start that is weighted by inputs reads.",
            "advanced": True,
        },
    )
    length: int = field(
        default=512,
        metadata={"label": "Tokens of a calibration window", "help": "At most what the model reads.", "advanced": True},
    )

    def __post_init__(self) -> None:
        if self.target_reduction is not None:
            positive("target_reduction", self.target_reduction, 1.0)
        if self.followers is not None:
            whole_number("followers", self.followers, 1, 10_000)
        parse_groups(self.groups)
        if self.target_reduction is None and self.followers is None and not self.groups.strip():
            raise CompressionError(
                "bad_setting", "nothing says how much is shared: set target_reduction, followers or groups"
            )
        whole_number("rank", self.rank, 1, 1 << 16)
        one_of("modules", self.modules, tuple(MODULES))
        one_of("start", self.start, STARTS)
        whole_number("window_tokens", self.window_tokens, 8, 1 << 17)
        whole_number("measure_windows", self.measure_windows, 1, 10_000)
        whole_number("picks_per_round", self.picks_per_round, 1, 10_000)
        whole_number("protect_first", self.protect_first, 0, 10_000)
        whole_number("protect_last", self.protect_last, 0, 10_000)
        whole_number("teacher_logits", self.teacher_logits, 1, 1 << 20)
        whole_number("held_out", self.held_out, 1, 10_000)
        one_of("delta_dtype", self.delta_dtype, DELTA_DTYPES)
        whole_number("samples", self.samples, 1, 1 << 20)
        whole_number("length", self.length, 8, 1 << 17)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of module that are shared."""
        return MODULES[self.modules]

    @property
    def by_hand(self) -> dict[int, int]:
        """Follower -> anchor, as given; empty where they are chosen."""
        return parse_groups(self.groups)

    @property
    def text_windows(self) -> int:
        """Windows of text beside those that are held out."""
        return self.measure_windows
