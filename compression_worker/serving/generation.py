"""Turning a prompt into text, token by token: a KV cache, greedy or sampled choice, stop strings, clean UTF-8.

The loop is our own because one answer must stay on one model, be given up when its client leaves, and fail loudly
when a model produces numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""How many tokens before a new one a tokenizer is shown, so that spaces and split characters come out right."""


class NonFinite(Exception):
    """The model's logits held NaN or infinity: there is no next token."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop. Temperature 0 is greedy; ``seed`` makes a sampled answer repeatable."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that is ready to be shown, how many tokens were made so far, and at the end why it ended."""

    text: str
    tokens: int
    finish_reason: str = ""


class Detokenizer:
    """Text of a growing list of tokens. Holds back what may still change: characters whose bytes are not all there."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._shown = len(self._ids)
        self._start = 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        return self._advance(final=False)

    def rest(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        after = self._decode(self._ids[self._start :])
        if not final and (after.endswith(REPLACEMENT) or len(after) <= len(before)):
            return ""
        self._start = max(self._shown - CONTEXT_TOKENS, self._start)
        self._shown = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Cuts text before the first stop string; holds back an ending that may become one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.hit = True
            return self._cut(min(found), drop=True)
        return self._cut(len(self._held) - self._possible_start())

    def rest(self) -> str:
        return self._cut(len(self._held))

    def _cut(self, at: int, *, drop: bool = False) -> str:
        ready, self._held = self._held[:at], "" if drop else self._held[at:]
        return ready

    def _possible_start(self) -> int:
        """Length of the longest ending of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


def generate(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    abandoned: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """Pieces of the answer to ``prompt_ids``; the last one carries ``stop`` or ``length``.

    Ends without a last piece when ``abandoned`` says that nobody listens. Raises :class:`NonFinite`.
    """
    ends = end_tokens(model, tokenizer)
    choose = Chooser(sampling, model.device)
    text, stops = Detokenizer(tokenizer, prompt_ids), StopStrings(sampling.stop)
    cache, fresh = None, list(prompt_ids)
    for made in range(1, sampling.max_tokens + 1):
        if abandoned():
            return
        logits, cache = next_logits(model, fresh, cache)
        token = choose(logits)
        ready = "" if token in ends else stops.feed(text.feed(token))
        if token in ends or made == sampling.max_tokens:
            ready += "" if stops.hit else stops.feed(text.rest())
            ready += stops.rest()
            yield Piece(ready, made, "stop" if token in ends or stops.hit else "length")
            return
        yield Piece(ready, made, "stop" if stops.hit else "")
        if stops.hit:
            return
        fresh = [token]


@torch.inference_mode()
def next_logits(model: Any, ids: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits ``[vocabulary]`` in fp32 after ``ids`` are appended to what ``cache`` holds, and the grown cache."""
    tokens = torch.tensor([ids], dtype=torch.long, device=model.device)
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[0, -1].float()
    if not bool(torch.isfinite(logits).all()):
        raise NonFinite("the model's logits are not finite")
    return logits, output.past_key_values


class Chooser:
    """Picks the next token: the likeliest one, or one sampled from the smallest set that holds ``top_p``."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._sampling = sampling
        self._generator = torch.Generator(device=device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        probabilities, order = torch.softmax(logits / self._sampling.temperature, dim=-1).sort(descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= self._sampling.top_p] = 0
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, from the generation config, the config and the tokenizer."""
    sources = [getattr(model, "generation_config", None), model.config, tokenizer]
    found: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(found)


def smoke(model: Any, tokenizer: Any) -> None:
    """Answer a few tokens to a fixed prompt; raises :class:`NonFinite` when the numbers are not finite."""
    ids = tokenizer.encode("The") or sorted(end_tokens(model, tokenizer)) or [0]
    for _ in generate(model, tokenizer, ids, Sampling(max_tokens=3, temperature=0.0)):
        pass
