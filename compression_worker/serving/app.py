"""The HTTP side: OpenAI's completions, chat completions and models; health; metrics for Prometheus."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from compression_worker.contracts import Json
from compression_worker.serving.engine import Engine, Event, Started
from compression_worker.serving.metrics import exposition
from compression_worker.serving.protocol import DONE, ApiError, Ask, event, parse_ask, usage
from compression_worker.serving.variants import Variants

if TYPE_CHECKING:
    from compression_worker.serving.generation import Piece

BODY_LIMIT = 1_000_000
DRAIN_LIMIT = 10_000_000

Readiness = Callable[[], tuple[bool, Json]]
"""Whether this server answers for all that it should, and what to show of it."""


def create_app(variants: Variants, engine: Engine, readiness: Readiness) -> Starlette:
    """The application, around a table of variants, an engine and a word on readiness."""
    doors = Doors(variants, engine, readiness)
    return Starlette(
        routes=[
            Route("/v1/models", doors.models, methods=["GET"]),
            Route("/v1/models/{name:path}", doors.model, methods=["GET"]),
            Route("/v1/completions", doors.completions, methods=["POST"]),
            Route("/v1/chat/completions", doors.chat_completions, methods=["POST"]),
            Route("/livez", doors.livez, methods=["GET"]),
            Route("/readyz", doors.readyz, methods=["GET"]),
            Route("/metrics", doors.metrics, methods=["GET"]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _server_error},
    )


class Doors:
    """The routes. Each reads a request, asks the engine or the table, and shapes the answer."""

    def __init__(self, variants: Variants, engine: Engine, readiness: Readiness) -> None:
        self._variants, self._engine, self._readiness = variants, engine, readiness

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._models()})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        for model in self._models():
            if model["id"] == name:
                return JSONResponse(model)
        raise ApiError(404, f"the model '{name}' does not exist", code="model_not_found", param="model")

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, parse_ask(await _body(request), chat=False))

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, parse_ask(await _body(request), chat=True))

    async def livez(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, request: Request) -> Response:
        ready, details = self._readiness()
        return JSONResponse({"ready": ready} | details, status_code=200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(exposition(self._variants), media_type="text/plain; version=0.0.4")

    def _models(self) -> list[Json]:
        handles = sorted(self._variants.handles(), key=lambda handle: handle.alias)
        return [
            {
                "id": handle.alias,
                "object": "model",
                "created": 0,
                "owned_by": "deltaworks",
                "environment": handle.environment,
                "generation": handle.generation,
                "digest": handle.digest,
            }
            for handle in handles
        ]

    async def _answer(self, request: Request, ask: Ask) -> Response:
        """Wait for the first token, so that whatever goes wrong before it has a status of its own."""
        events = self._engine.answer(ask)
        try:
            started = await anext(events)
            first = await anext(events)
        except StopAsyncIteration:
            raise ApiError(503, "the server is stopping", code="stopping") from None
        except BaseException:
            await events.aclose()
            raise
        assert isinstance(started, Started)
        assert not isinstance(first, Started)
        if ask.stream:
            stream = _stream(ask, started, first, events)
            return StreamingResponse(stream, headers=_uncached(started), media_type="text/event-stream")
        return await _whole(request, started, first, events)


async def _whole(request: Request, started: Started, first: Piece, events: AsyncGenerator[Event]) -> Response:
    pieces = [first]
    async with contextlib.aclosing(events):
        async for piece in events:
            assert not isinstance(piece, Started)
            pieces.append(piece)
            if await request.is_disconnected():
                return Response(status_code=499)
    last = pieces[-1]
    if not last.finish_reason:
        raise ApiError(503, "the server is stopping", code="stopping")
    text = "".join(piece.text for piece in pieces)
    answer = started.envelope.whole(text, last.finish_reason, usage(started.prompt_tokens, last.tokens))
    return JSONResponse(answer, headers=started.envelope.headers)


async def _stream(ask: Ask, started: Started, first: Piece, events: AsyncGenerator[Event]) -> AsyncIterator[bytes]:
    envelope, last = started.envelope, first
    async with contextlib.aclosing(events):
        try:
            yield event(envelope.chunk(first.text, first.finish_reason, first=True))
            async for piece in events:
                assert not isinstance(piece, Started)
                last = piece
                if piece.text or piece.finish_reason:
                    yield event(envelope.chunk(piece.text, piece.finish_reason))
        except ApiError as error:
            # The status line is gone; clients of OpenAI's API read an error event in its place.
            yield event(error.body)
    if ask.include_usage and last.finish_reason:
        yield event(envelope.usage_chunk(usage(started.prompt_tokens, last.tokens)))
    yield DONE


def _uncached(started: Started) -> Mapping[str, str]:
    return started.envelope.headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _body(request: Request) -> bytes:
    """The request's body; what is over the limit is not kept.

    It is read on for a while all the same: a client that is cut off while it sends sees a broken connection and no
    reason.
    """
    if int(request.headers.get("content-length") or 0) > DRAIN_LIMIT:
        raise _too_large()
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size > DRAIN_LIMIT:
            break
        if size <= BODY_LIMIT:
            body += part
    if size > BODY_LIMIT:
        raise _too_large()
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is over {BODY_LIMIT} bytes", code="body_too_large", headers={"Connection": "close"})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed; its log says why").body, status_code=500)
