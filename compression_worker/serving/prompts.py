"""From a request to the token ids that a model is given, and whether they fit."""

from __future__ import annotations

from dataclasses import replace

from jinja2.exceptions import TemplateError

from compression_worker.serving.generation import Sampling, end_tokens
from compression_worker.serving.protocol import ApiError, Ask
from compression_worker.serving.variants import Resident


def prompt_ids(ask: Ask, resident: Resident) -> list[int]:
    """Token ids of the prompt or of the rendered chat; raises :class:`ApiError` where there are none to be had."""
    if isinstance(ask.prompt, list):
        return _known(ask.prompt, resident)
    ids = _chat_ids(ask, resident) if ask.chat else _encoded(resident, ask.prompt)
    return ids or _start(resident)


def fitting(ask: Ask, resident: Resident, prompt_tokens: int) -> Sampling:
    """The request's sampling; a length that nobody asked for shrinks to what is left of the context."""
    asked, limit = ask.sampling.max_tokens, resident.context_length
    left = limit - prompt_tokens
    if left < 1 or (ask.max_tokens_given and asked > left):
        part = f"{prompt_tokens} in the prompt" + (f", {asked} for the answer" if ask.max_tokens_given else "")
        raise ApiError(
            400,
            f"this model's context is {limit} tokens; the request needs more ({part}): shorten it",
            code="context_length_exceeded",
            param="messages" if ask.chat else "prompt",
        )
    return replace(ask.sampling, max_tokens=min(asked, left))


def _chat_ids(ask: Ask, resident: Resident) -> list[int]:
    """The tokenizer's own chat template where it has one, plain 'role: content' lines otherwise."""
    tokenizer = resident.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        lines = [f"{message['role']}: {message['content']}" for message in ask.messages]
        return _encoded(resident, "\n".join([*lines, "assistant:"]))
    try:
        text = tokenizer.apply_chat_template(ask.messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ApiError(400, f"the model's chat template refused the messages: {error}", param="messages") from error
    return _encoded(resident, text, special=False)


def _encoded(resident: Resident, text: str, *, special: bool = True) -> list[int]:
    return list(resident.tokenizer.encode(text, add_special_tokens=special))


def _known(ids: list[int], resident: Resident) -> list[int]:
    size = int(resident.model.config.vocab_size)
    if max(ids) >= size:
        raise ApiError(400, f"token ids must be below {size}", code="invalid_value", param="prompt")
    return ids


def _start(resident: Resident) -> list[int]:
    """What stands for an empty prompt: the token that begins a text, or one that ends one."""
    begin = resident.tokenizer.bos_token_id
    return [begin] if begin is not None else sorted(end_tokens(resident.model, resident.tokenizer))[:1] or [0]
