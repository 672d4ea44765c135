"""Answers on a small pool of threads: a bounded queue in front, one handle an answer, numbers that must be finite.

The web side awaits events that a pool thread sends: :class:`Started` once, then pieces of text. Whatever goes wrong
arrives as an exception at the same place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from compression_worker.serving.generation import NonFinite, Piece, generate
from compression_worker.serving.prompts import fitting, prompt_ids
from compression_worker.serving.protocol import ApiError, Ask, Envelope
from compression_worker.serving.variants import Handle, NotReady, UnknownModel, Variants

logger = logging.getLogger(__name__)

ERRORS_ALLOWED = 3
ERROR_WINDOW_SECONDS = 30.0
RETRY_AFTER = {"Retry-After": "1"}


@dataclass(frozen=True)
class Started:
    """The answer has begun: whose it is, and how many tokens its prompt has."""

    envelope: Envelope
    prompt_tokens: int


Event = Started | Piece


class ErrorBudget:
    """Counts non-finite answers of a handle: at the third within 30 s it is used up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._struck: dict[tuple[str, int, str], deque[float]] = {}

    def strike(self, handle: Handle) -> bool:
        """Note one more; True when the budget is used up."""
        now = self._clock()
        with self._lock:
            key = (handle.environment, handle.generation, handle.digest)
            times = self._struck.setdefault(key, deque(maxlen=ERRORS_ALLOWED))
            times.append(now)
            return len(times) == ERRORS_ALLOWED and now - times[0] <= ERROR_WINDOW_SECONDS


class Engine:
    """``answers`` at once on as many threads, at most ``queue`` more waiting; beyond that a request is sent away."""

    def __init__(self, variants: Variants, *, answers: int = 2, queue: int = 32) -> None:
        self._variants = variants
        self._pool = ThreadPoolExecutor(answers, thread_name_prefix="answer")
        self._room = threading.Semaphore(answers + queue)
        self._budget = ErrorBudget()
        self._closing = threading.Event()

    def close(self) -> None:
        """Give up on running answers at their next token."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def answer(self, ask: Ask) -> AsyncGenerator[Event]:
        """The events of one answer. Closing the iterator gives the answer up."""
        if not self._room.acquire(blocking=False):
            raise ApiError(503, "too many requests are waiting; try again", code="overloaded", headers=RETRY_AFTER)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        left = threading.Event()

        def send(value: Event | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, value)

        try:
            self._pool.submit(self._run, ask, send, left)
        except RuntimeError:
            self._room.release()
            raise ApiError(503, "the server is stopping", code="stopping", headers=RETRY_AFTER) from None
        try:
            while (value := await events.get()) is not None:
                if isinstance(value, BaseException):
                    raise value
                yield value
        finally:
            left.set()

    def _run(self, ask: Ask, send: Callable[[Event | BaseException | None], None], left: threading.Event) -> None:
        try:
            for value in self._events(ask, lambda: left.is_set() or self._closing.is_set()):
                send(value)
            send(None)
        except ApiError as error:
            send(error)
        except Exception as error:
            logger.exception("an answer broke")
            send(ApiError(500, f"the answer broke: {type(error).__name__}", code="internal_error"))
        finally:
            self._room.release()

    def _events(self, ask: Ask, abandoned: Callable[[], bool]) -> Iterator[Event]:
        if abandoned():
            return
        with self._checkout(ask.model) as handle:
            outcome = "error"
            try:
                ids = prompt_ids(ask, handle.resident)
                sampling = fitting(ask, handle.resident, len(ids))
                yield Started(_envelope(ask, handle), len(ids))
                last = Piece("", 0)
                for last in generate(handle.resident.model, handle.resident.tokenizer, ids, sampling, abandoned):
                    yield last
                outcome = "ok" if last.finish_reason else "abandoned"
            except NonFinite as error:
                outcome = "non_finite"
                self._strike(handle)
                raise ApiError(500, str(error), code="non_finite") from error
            except ApiError:
                outcome = "refused"
                raise
            finally:
                self._variants.count(handle, outcome)

    @contextlib.contextmanager
    def _checkout(self, alias: str) -> Iterator[Handle]:
        try:
            with self._variants.checkout(alias) as handle:
                yield handle
        except UnknownModel:
            message = f"the model '{alias}' does not exist; GET /v1/models lists those that answer"
            raise ApiError(404, message, code="model_not_found", param="model") from None
        except NotReady:
            message = f"the model '{alias}' is not ready yet; try again"
            raise ApiError(503, message, code="not_ready", headers=RETRY_AFTER) from None

    def _strike(self, handle: Handle) -> None:
        used_up = self._budget.strike(handle)
        if not used_up or handle.fallback is None:
            return
        message = f"{ERRORS_ALLOWED} answers of {handle.digest[:12]} were not finite; full precision answers instead"
        if self._variants.swap(handle.fallen_back(message), only_from=handle):
            logger.error("%s generation %d: %s", handle.environment, handle.generation, message)


def _envelope(ask: Ask, handle: Handle) -> Envelope:
    name = ("chatcmpl-" if ask.chat else "cmpl-") + uuid.uuid4().hex
    return Envelope(id=name, created=int(time.time()), chat=ask.chat, handle=handle)
