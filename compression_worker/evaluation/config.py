"""The settings of an evaluation; what the web form and the command line offer. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from compression_worker.contracts import CompressionError, Json


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much to measure, and on what."""

    window_tokens: int = field(
        default=256,
        metadata={
            "label": "Tokens in a window",
            "help": "Text is read in windows of this many tokens, each without what came before.",
        },
    )
    max_windows: int = field(
        default=40,
        metadata={"label": "Windows", "help": "Windows to read at most, from the beginning of the text set."},
    )
    max_choices: int = field(
        default=100,
        metadata={"label": "Questions", "help": "Questions to answer at most, from the beginning of the choice set."},
    )
    prompts: str = field(
        default="",
        metadata={"label": "Prompts", "help": "Prompts to continue, one a line. Empty: the first samples' beginnings."},
    )
    max_new_tokens: int = field(
        default=48,
        metadata={"label": "Tokens to add", "help": "Tokens that each prompt is continued by. 0: no answers are made."},
    )
    bootstrap_resamples: int = field(
        default=2000, metadata={"label": "Resamples", "help": "Bootstrap resamples behind each 95 % interval."}
    )
    seed: int = field(default=0, metadata={"label": "Seed", "help": "Seed of the bootstrap."})

    def __post_init__(self) -> None:
        limits = {
            "window_tokens": (8, 8192),
            "max_windows": (2, 10_000),
            "max_choices": (1, 10_000),
            "max_new_tokens": (0, 1024),
            "bootstrap_resamples": (200, 20_000),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in limits.items():
            _check_range(name, getattr(self, name), low, high)
        if not isinstance(self.prompts, str):
            raise _refused("prompts must be text, one prompt a line")
        if len(self.prompt_list) > 50 or len(self.prompts) > 20_000 or "\0" in self.prompts:
            raise _refused("prompts may be at most 50 lines and 20,000 characters, without NUL")

    @property
    def prompt_list(self) -> list[str]:
        """The prompts given, without blank lines."""
        return [line.strip() for line in self.prompts.splitlines() if line.strip()]

    @classmethod
    def from_json(cls, value: Json) -> EvaluationConfig:
        """From a form or a job's parameters; ``prompts`` may be a list. Refuses names that it does not know."""
        unknown = sorted(set(value) - {each.name for each in fields(cls)})
        if unknown:
            raise _refused(f"there is no setting '{unknown[0]}'")
        prompts = value.get("prompts", "")
        if isinstance(prompts, list | tuple):
            value = value | {"prompts": "\n".join(str(prompt) for prompt in prompts)}
        return cls(**value)


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refused(f"{name} must be a whole number")
    if not low <= value <= high:
        raise _refused(f"{name} is {value}; give {low} to {high}")


def _refused(message: str) -> CompressionError:
    return CompressionError("bad_setting", f"evaluation settings: {message}")
