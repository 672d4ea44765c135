"""What a person may set of DeltaLLM (arXiv:2501.18596). No torch.

The paper gives neither ranks nor schedules nor learning rates, and says little of how layers are grouped: values marked
*our reading* are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from compression_worker.bounds import one_of, positive, whole_number
from compression_worker.contracts import CompressionError
from compression_worker.methods.deltallm.groups import parse_groups, parse_ranks
from compression_worker.quantization.bases import BASES, base_config

MODULES = {"mlp": ("mlp",), "mlp_attention": ("mlp", "attention"), "attention": ("attention",)}
"""Setting -> the kinds of module of a block that are shared."""
TRAINED = ("deltas", "deltas_lora")
REPLACEMENTS = ("progressive", "none")
STARTS = ("svd", "svd_covariance", "zero")
FOR_BASE = ("num_bits", "group_size", "samples", "length")
"""Settings that are handed to the method of a packed base, where it has them."""
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
DELTA_DTYPES = tuple(ITEM_BYTES)
DROPPINGS = ("none", "measured")
LOW_RANK, SCALED, SIGN = "low_rank", "scaled", "sign"
FORMS = (LOW_RANK, SCALED, SIGN)


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
                "Anchor and followers by number of block, from 0: 4:5,6;10:11. With @, a group has a rank of its own: "
                "4:5,6@32; its blocks are left out at @0. Empty: chosen by what each candidate costs on the text."
            ),
        },
    )
    rank: int = field(
        default=64,
        metadata={
            "label": "Rank",
            "help": (
                "Of each difference (our reading). With a share of parameters as the target it decides how many layers "
                "follow, and then grows as far as the target allows. Groups by hand may have ranks of their own."
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
    tokens: int = field(
        default=131_072,
        metadata={
            "label": "Training tokens",
            "help": "30 to 40 million in the paper; 0: no training. Fewer where the text is short.",
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
        default=1e-3,
        metadata={"label": "Learning rate", "help": "Falls to zero along a cosine after a short rise (our reading)."},
    )
    replacement: str = field(
        default="progressive",
        metadata={
            "label": "Modules are replaced",
            "help": (
                "progressive: each follower's module goes its new way with a probability that rises to 1. none: all of "
                "them from the first step on."
            ),
            "choices": REPLACEMENTS,
        },
    )
    train: str = field(
        default="deltas",
        metadata={
            "label": "What is trained",
            "help": (
                "deltas: the differences alone. deltas_lora: LoRA adapters too, on the linears that neither follow nor "
                "are followed; they are merged into the weights at the end."
            ),
            "choices": TRAINED,
        },
    )
    lora_rank: int = field(
        default=16,
        metadata={
            "label": "Rank of the adapters",
            "help": "Of deltas_lora; adapters count twice, and cost no bytes (our reading).",
            "advanced": True,
        },
    )
    hidden_weight: float = field(
        default=0.0,
        metadata={
            "label": "Weight of hidden states",
            "help": (
                "Of the squared distance between what comes out of a block and what came out of it before, added to "
                "the loss. 0: answers alone."
            ),
            "advanced": True,
        },
    )
    p0: float = field(
        default=0.3,
        metadata={
            "label": "First probability",
            "help": "That a module goes its new way in the first step (our reading).",
            "advanced": True,
        },
    )
    slope: float | None = field(
        default=None,
        metadata={
            "label": "Rise of the probability",
            "help": "In each step. Empty: it reaches 1 where the last share begins (our reading).",
            "empty": "reaches 1 where the last share begins",
            "advanced": True,
        },
    )
    final_share: float = field(
        default=0.5,
        metadata={
            "label": "Last share of the steps",
            "help": "In which every module goes its new way (our reading).",
            "advanced": True,
        },
    )
    epochs: int = field(
        default=1, metadata={"label": "Times that the text is read", "help": "Of training.", "advanced": True}
    )
    ce_weight: float = field(
        default=0.0,
        metadata={
            "label": "Weight of the text itself",
            "help": "c in (1 - c) KL + c CE: 0 is the teacher's answers alone.",
            "advanced": True,
        },
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
    checkpointing: bool = field(
        default=True,
        metadata={
            "label": "Compute blocks twice",
            "help": "Keeps the inputs of blocks alone for the backward pass: less memory, a third more time.",
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
    delta_dtype: str = field(
        default="float16",
        metadata={
            "label": "Differences are stored as",
            "help": "They are trained in float32.",
            "choices": DELTA_DTYPES,
            "advanced": True,
        },
    )
    share_form: str = field(
        default=LOW_RANK,
        metadata={
            "label": "Form of a difference",
            "help": (
                "low_rank: two factors, as published. scaled: the anchor's weight is also multiplied with a number of "
                "each matrix, fitted and trained: nearer where layers are not alike. sign: one bit a weight and one "
                "scale, to compare with at equal bytes; needs followers or groups."
            ),
            "choices": FORMS,
            "advanced": True,
        },
    )
    dropping: str = field(
        default="none",
        metadata={
            "label": "Blocks left out",
            "help": (
                "none: every follower keeps a difference, as published. measured: as many blocks as the share of "
                "parameters has room for do nothing any more (the modules that are shared), those that cost least on "
                "the text; followers make up for the rest of it. Saves time too; needs share_form=scaled. What is left "
                "learns with train=deltas_lora."
            ),
            "choices": DROPPINGS,
            "advanced": True,
        },
    )
    base_method: str = field(
        default="none",
        metadata={
            "label": "Anchors are",
            "help": (
                "none: as they are in the checkpoint. Otherwise the method that quantizes everything that is not "
                "shared; differences then mend what that lost as well."
            ),
            "choices": ("none", *BASES),
        },
    )
    num_bits: int = field(
        default=4,
        metadata={
            "label": "Bits of a weight",
            "help": "Of quantized anchors: 2, 3, 4 or 8 with GPTQ, 2, 3 or 4 with QuIP#.",
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "label": "Group size",
            "help": "Of GPTQ anchors: inputs that share a scale and a zero. Empty: chosen by shape.",
            "empty": "chosen by shape",
            "advanced": True,
        },
    )
    samples: int = field(
        default=32,
        metadata={
            "label": "Calibration windows",
            "help": "What quantized anchors, or a start that is weighted by inputs, read.",
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
        whole_number("tokens", self.tokens, 0, 1 << 40)
        whole_number("batch_size", self.batch_size, 1, 4096)
        positive("learning_rate", self.learning_rate, 1.0)
        one_of("replacement", self.replacement, REPLACEMENTS)
        self._shares("p0", "final_share", "ce_weight")
        if self.slope is not None:
            positive("slope", self.slope, 1.0)
        one_of("train", self.train, TRAINED)
        whole_number("lora_rank", self.lora_rank, 1, 4096)
        if type(self.hidden_weight) not in (int, float) or not 0 <= self.hidden_weight <= 1e6:
            raise CompressionError("bad_setting", f"hidden_weight is {self.hidden_weight!r}; it must be from 0 to 1e6")
        self._check_together()
        whole_number("epochs", self.epochs, 1, 1000)
        whole_number("chunk_tokens", self.chunk_tokens, 1, 1 << 40)
        whole_number("window_tokens", self.window_tokens, 8, 1 << 17)
        whole_number("measure_windows", self.measure_windows, 1, 10_000)
        whole_number("picks_per_round", self.picks_per_round, 1, 10_000)
        whole_number("protect_first", self.protect_first, 0, 10_000)
        whole_number("protect_last", self.protect_last, 0, 10_000)
        whole_number("teacher_logits", self.teacher_logits, 1, 1 << 20)
        whole_number("held_out", self.held_out, 1, 10_000)
        one_of("delta_dtype", self.delta_dtype, DELTA_DTYPES)
        one_of("share_form", self.share_form, FORMS)
        if self.share_form == SIGN and self.start != "svd":
            raise CompressionError(
                "bad_setting", f"start is {self.start!r}; differences of signs have one start: leave it"
            )
        if self.share_form == SIGN and self.followers is None and not self.groups.strip():
            raise CompressionError(
                "bad_setting",
                "share_form=sign keeps a bit of every weight, and has no rank to meet a share of "
                "parameters with: set followers or groups",
            )
        if self.share_form == SIGN and self.own_ranks:
            raise CompressionError(
                "bad_setting", "groups have ranks, and share_form=sign has none: leave out what stands behind @"
            )
        self._check_dropping()
        one_of("base_method", self.base_method, ("none", *BASES))
        if self.quantizes:
            self.base_config()
        elif self.group_size is not None:
            raise CompressionError("bad_setting", "group_size is set, and anchors are not quantized: set base_method")
        whole_number("samples", self.samples, 1, 1 << 20)
        whole_number("length", self.length, 8, 1 << 17)

    @property
    def tunes_others(self) -> bool:
        """Whether linears that are not shared learn too."""
        return self.train == "deltas_lora" and self.tokens > 0

    def scales_of(self, matrices: int) -> int:
        """How many numbers a follower of so many matrices keeps beside its factors."""
        return matrices if self.share_form == SCALED else 0

    @property
    def drops(self) -> bool:
        """Whether the target is met by leaving blocks out, as far as it has room for them."""
        return self.dropping == "measured"

    @property
    def quantizes(self) -> bool:
        """Whether there is a packed base."""
        return self.base_method != "none"

    def base_config(self) -> Any:
        """The settings of the base's own method; refuses what that method refuses, or does not have."""
        return base_config(self.base_method, {name: getattr(self, name) for name in FOR_BASE})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of module that are shared."""
        return MODULES[self.modules]

    @property
    def by_hand(self) -> dict[int, int]:
        """Follower -> anchor, as given; empty where they are chosen."""
        return parse_groups(self.groups)

    @property
    def own_ranks(self) -> dict[int, int]:
        """Follower -> rank, of the groups by hand that have one of their own."""
        return parse_ranks(self.groups)

    def _check_together(self) -> None:
        """Refuse what needs the whole model's own weights beside quantized ones, or weights that do not stay."""
        if self.hidden_weight and self.quantizes:
            raise CompressionError(
                "bad_setting",
                "hidden_weight is set, and base_method too: a quantized model has no hidden states of the whole one to "
                "come near to; set hidden_weight=0",
            )
        if self.tunes_others and self.quantizes:
            raise CompressionError(
                "bad_setting", "train=deltas_lora merges into weights, and a quantized base has none: set train=deltas"
            )
        if self.tunes_others and self.hidden_weight:
            raise CompressionError(
                "bad_setting",
                "hidden_weight compares with the model as it was, and train=deltas_lora changes it: choose one of them",
            )

    def _check_dropping(self) -> None:
        """Refuse blocks left out in a form that has no number for that, or beside other ways to say how many follow."""
        one_of("dropping", self.dropping, DROPPINGS)
        if self.share_form != SCALED and (self.drops or 0 in self.own_ranks.values()):
            what = "dropping=measured" if self.drops else "rank 0 behind @"
            raise CompressionError(
                "bad_setting",
                f"{what} leaves blocks out, and share_form is {self.share_form!r}: set share_form={SCALED}",
            )
        if self.drops and (self.target_reduction is None or self.followers is not None or self.groups.strip()):
            raise CompressionError(
                "bad_setting",
                "dropping=measured meets a share of parameters: set target_reduction, and neither followers nor "
                "groups; blocks are left out by hand with @0 behind their group",
            )

    def _shares(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise CompressionError("bad_setting", f"{name} is {value!r}; it must be from 0 to 1")

    @property
    def steps(self) -> int:
        """Optimizer steps of one reading of the text; 0 where nothing is trained."""
        return max(1, round(self.tokens / (self.window_tokens * self.batch_size))) if self.tokens else 0

    @property
    def windows(self) -> int:
        """Training windows: whole training steps."""
        return self.steps * self.batch_size

    @property
    def text_windows(self) -> int:
        """Windows of text beside those that are held out; candidates are measured on the first of them."""
        return max(self.windows, self.measure_windows)

    @property
    def chunk_steps(self) -> int:
        """Optimizer steps of one chunk."""
        return max(1, self.chunk_tokens // (self.window_tokens * self.batch_size))


def sign_bytes(outputs: int, inputs: int) -> int:
    """Bytes of the signs of a matrix, in words along its inputs, and of their scale."""
    return 4 * (outputs * -(-inputs // 32) + 1)
