"""The shapes of OpenAI's HTTP API: what a request may say, how an answer and an error look. No torch, no network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compression_worker.contracts import Json
from compression_worker.serving.generation import Sampling
from compression_worker.serving.variants import Handle

COMPLETION_TOKENS = 16
CHAT_TOKENS = 256
STOP_LIMIT = 4
ROLES = frozenset({"system", "developer", "user", "assistant"})
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
"""Fields that would change the answer and that this server cannot do, with the values that mean 'as it is'."""


class ApiError(Exception):
    """A request that gets an error answer in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> Json:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A checked request. ``prompt`` is text or token ids; a chat has ``messages`` instead."""

    model: str
    sampling: Sampling
    prompt: str | list[int] = ""
    messages: list[Json] = field(default_factory=list)
    max_tokens_given: bool = False
    stream: bool = False
    include_usage: bool = False

    @property
    def chat(self) -> bool:
        return bool(self.messages)


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What every part of one answer repeats."""

    id: str
    created: int
    chat: bool
    handle: Handle

    @property
    def headers(self) -> dict[str, str]:
        return {
            "X-Deltaworks-Environment": self.handle.environment,
            "X-Deltaworks-Epoch": str(self.handle.epoch),
            "X-Deltaworks-Generation": str(self.handle.generation),
            "X-Deltaworks-Digest": self.handle.digest,
        }

    def whole(self, text: str, finish_reason: str, usage: Json) -> Json:
        choice: Json = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._frame(kind) | {"choices": [choice], "usage": usage}

    def chunk(self, text: str, finish_reason: str | None = None, *, first: bool = False) -> Json:
        choice: Json = {"index": 0, "finish_reason": finish_reason or None, "logprobs": None}
        delta: Json = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        choice |= {"delta": delta} if self.chat else {"text": text}
        return self._frame(self._chunk_kind) | {"choices": [choice]}

    def usage_chunk(self, usage: Json) -> Json:
        return self._frame(self._chunk_kind) | {"choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _frame(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.handle.alias,
            "system_fingerprint": self.handle.digest[:16],
        }


def usage(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(value: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def parse_ask(raw: bytes, *, chat: bool) -> Ask:
    """The checked request in ``raw``; raises :class:`ApiError` that names the field."""
    body = _object(raw)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _bad("model", "'model' must be the name of a model; GET /v1/models lists them")
    for name, plain in UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in plain:
            raise _bad(name, f"'{name}' is not supported by this server; leave it out", "unsupported_parameter")
    tokens = _tokens(body, chat=chat)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _bad("stream_options", "'stream_options' must be an object")
    return Ask(
        model=model,
        prompt="" if chat else _prompt(body.get("prompt")),
        messages=_messages(body.get("messages")) if chat else [],
        sampling=_sampling(body, tokens or (CHAT_TOKENS if chat else COMPLETION_TOKENS)),
        max_tokens_given=tokens is not None,
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
    )


def _object(raw: bytes) -> Json:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def _sampling(body: Json, max_tokens: int) -> Sampling:
    seed = body.get("seed")
    if seed is not None and (not _is_int(seed) or not -(2**63) <= seed < 2**63):
        raise _bad("seed", "'seed' must be an integer of 64 bits")
    return Sampling(
        max_tokens=max_tokens,
        temperature=_number(body, "temperature", 1.0, low=0.0, high=2.0),
        top_p=_number(body, "top_p", 1.0, low=1e-6, high=1.0),
        seed=seed,
        stop=_stops(body.get("stop")),
    )


def _tokens(body: Json, *, chat: bool) -> int | None:
    names = ["max_completion_tokens", "max_tokens"] if chat else ["max_tokens"]
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if not _is_int(value) or value < 1:
            raise _bad(name, f"'{name}' must be an integer of at least 1")
        return int(value)
    return None


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(_is_int(token) and token >= 0 for token in value):
        return value
    raise _bad("prompt", "'prompt' must be one string or one list of token ids")


def _messages(value: object) -> list[Json]:
    if not isinstance(value, list) or not value:
        raise _bad("messages", "'messages' must be a list with at least one message")
    return [_message(each, f"messages[{at}]") for at, each in enumerate(value)]


def _message(value: object, where: str) -> Json:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise _bad(where, f"'{where}' must have a 'role' out of {', '.join(sorted(ROLES))}")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(part, where) for part in content)
    if not isinstance(content, str):
        raise _bad(where, f"the 'content' of '{where}' must be text")
    return {"role": value["role"], "content": content}


def _text_part(part: object, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise _bad(where, f"the 'content' of '{where}' may hold parts of type 'text' only")


def _stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > STOP_LIMIT:
        raise _bad("stop", f"'stop' must be a string or a list of at most {STOP_LIMIT} strings")
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise _bad("stop", "each stop string must be a string that is not empty")
    return tuple(stops)


def _number(body: Json, name: str, default: float, *, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(name, f"'{name}' must be a number")
    if not low <= value <= high:
        raise _bad(name, f"'{name}' must lie between {low:g} and {high:g}")
    return float(value)


def _flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(name, f"'{name}' must be true or false")
    return bool(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)
