"""The HTTP side: who may ask, what is refused before it waits, answers whole or as they come, clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from optikit.errors import LockedError, OptikitError, UsageError
from optikit.serving import openai_api
from optikit.serving.answers import ChatShape, Shape, failure, usage
from optikit.serving.completion import Piece, joined, write
from optikit.serving.metrics import Metrics, Watch

if TYPE_CHECKING:
    from starlette.types import Send

    from optikit.runtime.decoder import Tokens
    from optikit.runtime.generate import TextGenerator
    from optikit.serving.openai_api import Sampled
    from optikit.serving.scheduler import Scheduler

BODY_SECONDS = 30
"""A body that takes longer to come isn't waited for."""
SEND_SECONDS = 60
"""A client that takes no byte for so long is gone."""
RETRY_SECONDS = 1
"""When a client should ask again that found the queue full."""
SHORT = 4000
"""Characters that are made tokens at once; longer texts are, beside the others' answers, in a thread."""
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False)
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server lets clients do.

    Attributes:
        api_key: What they have to send; "" lets everybody in.
        most_bytes: Longest body.
        interval_s: Least time between two events of a stream but its first and its last, s.
    """

    api_key: str = field(default="", repr=False)
    most_bytes: int = 2**20
    interval_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request that was understood: its prompts as tokens, and the shape of its answer."""

    said: Sampled
    prompts: Sequence[Tokens]
    shape: Shape
    echo: bool = False
    anew: bool = False


class Service:
    """OpenAI's API over a scheduler.

    Args:
        scheduler: Writes.
        generator: The tokenizer, its templates and the ends of texts.
        model: The model's name.
        limits: What clients may do.
    """

    def __init__(self, scheduler: Scheduler, generator: TextGenerator, model: str, limits: Limits) -> None:
        self._scheduler, self._generator, self._model, self._limits = scheduler, generator, model, limits
        self._by = generator.tokenizer
        self._metrics = Metrics(scheduler)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._figures),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
        ]
        handlers: Any = {HTTPException: _told, Exception: _failed}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "running": self._scheduler.running, "waiting": self._scheduler.waiting})

    async def _figures(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _: Request) -> Response:
        about = {"id": self._model, "object": "model", "created": 0, "owned_by": "optikit"}
        about["max_model_len"] = self._scheduler.target.max_tokens
        return JSONResponse({"object": "list", "data": [about]})

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Return a handler that asks for the key first, and counts."""

        async def handle(request: Request) -> Response:
            key = self._limits.api_key
            given = request.headers.get("authorization", "").encode("utf-8", "replace")
            if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
                told = failure("the API key is wrong or missing", kind="authentication_error", code="invalid_api_key")
                response: Response = JSONResponse(told, 401, {"WWW-Authenticate": "Bearer"})
            else:
                try:
                    response = await handler(request)
                except OptikitError as error:
                    response = _refusal(error)
            self._metrics.requests.labels(path=request.url.path, status=str(response.status_code)).inc()
            return response

        return handle

    async def _body(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            HTTPException: It is too long, or doesn't come.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self._limits.most_bytes:
                        raise HTTPException(413, f"the body has more than {self._limits.most_bytes} bytes")
        except TimeoutError:
            raise HTTPException(408, f"the body didn't come within {BODY_SECONDS} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the client is gone") from None
        return bytes(body)

    async def _complete(self, request: Request) -> Response:
        said = openai_api.read(openai_api.Completion, await self._body(request))
        self._require_known(said)
        prompts = [await self._encode(each) for each in said.prompts]
        echoed = [self._by.decode(each.tolist()) for each in prompts for _ in range(said.n)] if said.echo else ()
        shape = Shape(f"cmpl-{uuid.uuid4().hex}", self._model, said, self._by, echoed)
        echo = said.echo and said.told is not None
        if said.max_tokens == 0 and not echo:
            raise UsageError("max_tokens is 0, and nothing is echoed", fix="ask for a token, or echo with logprobs")
        return await self._respond(request, _Asked(said=said, prompts=prompts, shape=shape, echo=echo))

    async def _chat(self, request: Request) -> Response:
        said = openai_api.read(openai_api.Chat, await self._body(request))
        self._require_known(said)
        turns = [each.turn() for each in said.messages]
        tokens = await _beside(lambda: self._generator.encode_chat(turns), sum(len(each["content"]) for each in turns))
        shape = ChatShape(f"chatcmpl-{uuid.uuid4().hex}", self._model, said, self._by)
        return await self._respond(request, _Asked(said=said, prompts=[tokens], shape=shape, anew=True))

    def _require_known(self, said: Sampled) -> None:
        if said.model not in ("", self._model):
            raise HTTPException(404, f"there is no model {said.model[:100]!r} here, but {self._model!r}")
        unknown = max(said.logit_bias, default=0)
        if unknown >= self._scheduler.target.vocab:
            raise UsageError(f"logit_bias: there is no token {unknown}", fix="name tokens of this model")

    async def _encode(self, prompt: str | list[int]) -> Tokens:
        if isinstance(prompt, str):
            return await _beside(lambda: self._generator.encode(prompt, chat=False), len(prompt))
        return np.array(prompt, np.int64)

    async def _respond(self, request: Request, asked: _Asked) -> Response:
        """Return an answer; its first piece, or its refusal, is there before anything of it is sent."""
        watch = self._metrics.begin(sum(map(len, asked.prompts)))
        pieces = write(
            self._scheduler,
            self._by,
            self._generator.ends,
            asked.prompts,
            asked.said,
            echo=asked.echo,
            anew=asked.anew,
            interval_s=self._limits.interval_s if asked.said.stream else math.inf,
        )
        try:
            if asked.said.stream:
                first = await _unless_gone(request, anext(pieces))
                return _Events(_events(_chained(first, pieces), asked, watch))
            return await _unless_gone(request, _whole(pieces, asked, watch))
        except ValueError as error:
            told = failure(f"the model failed: {error}", kind="server_error")
            return JSONResponse(told, 500)


async def _whole(pieces: AsyncGenerator[Piece], asked: _Asked, watch: Watch) -> Response:
    """Return an answer once all its choices are there."""
    came: dict[int, list[Piece]] = {}
    async for piece in pieces:
        watch.see(piece)
        came.setdefault(piece.choice, []).append(piece)
    watch.end()
    cost = usage(sum(map(len, asked.prompts)), watch.tokens)
    return JSONResponse(asked.shape.answer([joined(came[number]) for number in sorted(came)], cost))


async def _events(pieces: AsyncGenerator[Piece], asked: _Asked, watch: Watch) -> AsyncGenerator[bytes]:
    """Yield an answer as server-sent events."""
    options, prompted = asked.said.stream_options, sum(map(len, asked.prompts))
    for opening in asked.shape.opening(len(asked.prompts) * asked.said.n):
        yield _event(opening)
    try:
        async for piece in pieces:
            watch.see(piece)
            cost = usage(prompted, watch.tokens) if options.continuous_usage_stats else None
            yield _event(asked.shape.event([piece], cost))
    except ValueError as error:  # too late for a status
        yield _event(failure(f"the model failed: {error}", kind="server_error"))
        return
    finally:
        await pieces.aclose()
    watch.end()
    if options.include_usage:
        yield _event(asked.shape.event([], usage(prompted, watch.tokens)))
    yield b"data: [DONE]\n\n"


def _event(told: Any) -> bytes:
    return b"data: " + ENCODER.encode(told).encode("utf-8", "replace") + b"\n\n"


async def _chained(first: Piece, rest: AsyncGenerator[Piece]) -> AsyncGenerator[Piece]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()


class _Events(StreamingResponse):
    """A stream whose text ends with its reader, and that waits for a slow one only so long."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        """Send the events."""

        async def patiently(message: Any) -> None:
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)
            if message["type"] == "http.response.body":
                await asyncio.sleep(0)  # pieces that lie ready would else be written to a connection that is gone

        try:
            await super().stream_response(patiently)
        finally:
            await cast("AsyncGenerator[bytes]", self.body_iterator).aclose()


async def _unless_gone(request: Request, wanted: Coroutine[Any, Any, Result]) -> Result:
    """Wait for something as long as the client does.

    Raises:
        HTTPException: The client is gone; nobody will read it.
    """
    task, gone = asyncio.ensure_future(wanted), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise HTTPException(499, "the client is gone")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _beside(make: Callable[[], Result], length: int) -> Result:
    """Return what a function makes; of a long text in a thread, so that other answers go on."""
    return make() if length <= SHORT else await asyncio.to_thread(make)


def _refusal(error: OptikitError) -> Response:
    """Return what a client is told of a failure."""
    message = f"{error.message}: {error.fix}" if error.fix else error.message
    if isinstance(error, UsageError):
        return JSONResponse(failure(message), 400)
    if isinstance(error, LockedError):
        told = failure(message, kind="rate_limit_error", code="queue_full")
        return JSONResponse(told, 429, {"Retry-After": str(RETRY_SECONDS)})
    return JSONResponse(failure(message, kind="server_error"), 500)


def _told(_: Request, error: Exception) -> Response:
    """Return what starlette refuses: paths, methods, and what is refused by a status."""
    refused = cast("HTTPException", error)
    return JSONResponse(failure(refused.detail), refused.status_code, refused.headers)


def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(failure(f"the server failed: {type(error).__name__}", kind="server_error"), 500)
