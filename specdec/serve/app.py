"""The routes: /v1/completions, /v1/chat/completions, /v1/reason, /v1/models, /health, /metrics.

A handler reads a request, submits a job to the scheduler, or a search, and waits for its events; it touches the engine only to encode text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.types import Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ImportError(f"specdec.serve.app needs {error.name}; fix: pip install 'specdec[serve]'") from error

import specdec
from specdec.engine import Engine
from specdec.search.reason import ReasonResult
from specdec.sequence import SamplingParams
from specdec.serve.answers import ChatWriter, CompletionWriter, ReasonWriter, TextWriter, Writer, event
from specdec.serve.gate import Gate
from specdec.serve.mailbox import Mailbox
from specdec.serve.metrics import Metrics
from specdec.serve.protocol import ApiError, ChatRequest, CompletionRequest, ErrorAnswer, ReasonRequest, error_body
from specdec.serve.scheduler import Closed, Ended, Failed, Job, Overloaded, Piece, Scheduler
from specdec.serve.searches import Searches, Step
from specdec.serve.warm_state import WarmState

__all__ = ["Limits", "make_app"]

logger = logging.getLogger("specdec")
POLL = 0.25  # seconds between two looks at whether the client is still there
KEEP_ALIVE = 15.0  # seconds after which a stream says that it goes on
GRACE = 2.0  # seconds that whoever works on a late request has to say so itself
Happening = Piece | Ended | Step | ReasonResult | Failed
FAILURES = {
    "error": (500, "the model failed on this request"),
    "timeout": (504, "the request took longer than the server allows"),
    "cancelled": (499, "the request was cancelled"),
    "closed": (503, "the server is shutting down"),
}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for.

    Attributes:
        body: bytes.
        new_tokens: max_tokens of a sample.
        prompt_tokens: of a prompt; None: the model's context is the only limit.
        samples: prompts times n.
        waiting: samples that may wait for a row before further requests get 429.
        searches: that run at once; each counts as so many samples as it is wide.
        search_budget: tokens of a search.
        seconds: from the arrival of a request to its last token.
        stall: seconds for which a client may leave a stream unread before it is dropped.
    """

    body: int = 1 << 20
    new_tokens: int = 4096
    prompt_tokens: int | None = None
    samples: int = 64
    waiting: int = 256
    searches: int = 2
    search_budget: int = 20_000
    seconds: float = 600.0
    stall: float = 30.0

    def __post_init__(self) -> None:
        for name in ("body", "new_tokens", "samples", "searches", "seconds", "stall"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")


def make_app(
    engine: Engine,
    name: str = "",
    limits: Limits | None = None,
    api_key: str | None = None,
    *,
    warm_state: str | Path | None = None,
    share_every: float = 60.0,
) -> FastAPI:
    """The server, as an ASGI application; its lifespan starts and stops the thread that owns the engine.

    Args:
        engine: with a tokenizer; nobody else may step it.
        name: of the model in requests; "": the model's own.
        limits: of requests.
        api_key: None: everybody may ask.
        warm_state: file that the servers of a machine share, see WarmState.
        share_every: seconds between two looks at it.

    Raises:
        ValueError: no tokenizer, bad limits, an empty key, or a warm state of another method or vocabulary.
        OSError: the warm state cannot be read or written.
    """
    limits = limits or Limits()
    scheduler = Scheduler(engine, limits.waiting)
    server = _Server(engine, name or engine.target.name, limits, scheduler, Metrics(scheduler))
    warm = contextlib.nullcontext if warm_state is None else WarmState(scheduler, warm_state, share_every).shared

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with warm():
            scheduler.start()
            try:
                yield
            finally:
                await run_in_threadpool(scheduler.close)
                await run_in_threadpool(server.searches.close)

    app = FastAPI(title="specdec", version=specdec.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, api_key=api_key, most=limits.body, metrics=server.metrics)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _internal_error)
    app.state.scheduler = scheduler
    _add_routes(app, server)
    _name_the_model(app, server.name)
    return app


def _name_the_model(app: FastAPI, name: str) -> None:
    """The description says which model there is: whoever makes requests from it, a client or a fuzzer, gets past the name."""
    schemas = app.openapi()["components"]["schemas"]  # which app keeps
    for body in (CompletionRequest, ChatRequest, ReasonRequest):
        schemas[body.__name__]["properties"]["model"]["enum"] = [name]


def _add_routes(app: FastAPI, server: _Server) -> None:
    streams = {200: {"content": {"text/event-stream": {}}}, **ERRORS}

    @app.post("/v1/completions", responses=streams)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await server.answer(body, request, CompletionWriter)

    @app.post("/v1/chat/completions", responses=streams)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await server.answer(body, request, ChatWriter)

    @app.post("/v1/reason", responses=streams)
    async def reason(body: ReasonRequest, request: Request) -> Response:
        return await server.reason(body, request)

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> dict[str, Any]:
        card = {"id": server.name, "object": "model", "created": server.started, "owned_by": "specdec"}
        return {"object": "list", "data": [card]}

    @app.get("/health", responses=ERRORS)
    async def health() -> dict[str, str]:
        if not server.scheduler.alive:
            raise ApiError(503, "the engine's thread has ended")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **ERRORS})
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class _Server:
    """What the routes share."""

    def __init__(self, engine: Engine, name: str, limits: Limits, scheduler: Scheduler, metrics: Metrics) -> None:
        self.engine, self.name, self.limits, self.scheduler, self.metrics = engine, name, limits, scheduler, metrics
        self.searches = Searches(scheduler, limits.searches)
        self.started = int(time.time())

    async def answer(
        self, body: CompletionRequest | ChatRequest, request: Request, writer_class: Callable[..., TextWriter]
    ) -> Response:
        """Submit a request for texts."""
        self._check_model(body.model)
        prompts, params = await run_in_threadpool(self._read, body)
        mailbox = Mailbox()
        job = Job(prompts, params, _client(request), mailbox.put, self.limits.seconds, bool(body.stream))
        with _submitting():
            self.scheduler.submit(job)
        writer = writer_class(self.name, body, self.engine.tokenizer)
        return await self._respond(request, mailbox, writer, bool(body.stream), lambda: self.scheduler.cancel(job))

    async def reason(self, body: ReasonRequest, request: Request) -> Response:
        """Submit a search."""
        self._check_model(body.model)
        self._check_search(body)
        mailbox = Mailbox()
        try:
            with _submitting():
                search = await run_in_threadpool(self._submit_search, body, _client(request), mailbox.put)
        except (ValueError, ImportError) as error:
            raise ApiError(400, str(error)) from error
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses this problem: {error}", "problem") from error
        return await self._respond(
            request, mailbox, ReasonWriter(self.name, body), body.stream, lambda: self.searches.cancel(search)
        )

    async def _respond(
        self, request: Request, mailbox: Mailbox, writer: Writer, stream: bool, cancel: Callable[[], None]
    ) -> Response:
        """The answer, whole or a stream."""
        happenings = self._happenings(request, mailbox, cancel)
        if stream:
            return _Stream(self._stream(happenings, writer), cancel, self.limits.stall)
        return await self._whole(happenings, writer)

    def _check_model(self, model: str) -> None:
        if model != self.name:
            raise ApiError(404, f"the model {model!r} does not exist; GET /v1/models lists what does", "model", "model_not_found")

    def _check_search(self, body: ReasonRequest) -> None:
        for name, most in (("budget", self.limits.search_budget), ("width", self._most_samples)):
            if (value := getattr(body, name)) > most:
                raise ApiError(400, f"{name} must be at most {most} here, got {value}", name)

    @property
    def _most_samples(self) -> int:
        return min(self.limits.samples, self.engine.max_rows + self.limits.waiting)

    def _submit_search(self, body: ReasonRequest, client: str, notify: Callable[[Happening], None]) -> Any:
        self._room(self.searches.encode(body.problem))
        return self.searches.submit(body, client, self.limits.seconds, notify)

    def _read(self, body: CompletionRequest | ChatRequest) -> tuple[list[list[int]], SamplingParams]:
        """Token ids and parameters of a request, within the limits."""
        try:
            prompts = [self.engine.encode(prompt) for prompt in self._within(body)]
            most = min(self._room(ids) for ids in prompts)
            wanted = body.wanted_tokens
            if wanted is not None and wanted > most:
                longest = max(len(ids) for ids in prompts)
                raise ApiError(
                    400, f"max_tokens must be at most {most} here (the prompt has {longest} tokens), got {wanted}",
                    "max_tokens", "context_length_exceeded",
                )  # fmt: skip
            params = body.sampling_params(min(most, self.limits.new_tokens) if wanted is None else wanted)
            for ids in prompts:
                self.engine._check_prompt(ids, params)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses these messages: {error}", "messages") from error
        return prompts, params

    def _within(self, body: CompletionRequest | ChatRequest) -> list[Any]:
        prompts = body.prompts
        samples, most = len(prompts) * (body.n or 1), self._most_samples
        if samples > most:
            raise ApiError(400, f"n times the prompts must be at most {most}, got {samples}", "n")
        if isinstance(body, ChatRequest) and not getattr(self.engine.tokenizer, "chat_template", None):
            raise ApiError(400, "this model has no chat template; use /v1/completions", "messages")
        return prompts

    def _room(self, ids: list[int]) -> int:
        """Tokens that may follow a prompt."""
        context, longest = self.engine.target.max_positions, self.limits.prompt_tokens
        bounds = [bound for bound in (longest, None if context is None else context - 1) if bound is not None]
        if bounds and len(ids) > min(bounds):
            raise ApiError(
                400, f"a prompt may have at most {min(bounds)} tokens, got {len(ids)}", "prompt", "context_length_exceeded"
            )
        return self.limits.new_tokens if context is None else min(self.limits.new_tokens, context - len(ids))

    async def _happenings(
        self, request: Request, mailbox: Mailbox, cancel: Callable[[], None]
    ) -> AsyncGenerator[Happening | None, None]:
        """What happens until the request has ended or the client has gone, and None where nothing has for a while; however it is,
        its rows are free afterwards."""
        started = looked = told = time.monotonic()
        last: Ended | ReasonResult | Failed = Failed("cancelled")
        try:
            while True:
                happened: Happening | None = await mailbox.get(POLL)
                now = time.monotonic()
                if now - looked >= POLL:  # by the clock, however fast events come
                    looked = now
                    if await request.is_disconnected():
                        return
                if happened is None and now - started > self.limits.seconds + GRACE:
                    happened = Failed("timeout")
                if happened is None and now - told < KEEP_ALIVE:
                    continue
                told = now
                if happened is None or isinstance(happened, (Piece, Step)):
                    yield happened
                    continue
                last = happened
                yield happened
                return
        finally:
            self.metrics.ended(last, time.monotonic() - started)
            cancel()

    async def _whole(self, happenings: AsyncGenerator[Happening | None, None], writer: Writer) -> Response:
        last: Happening = Failed("cancelled")
        async with contextlib.aclosing(happenings):
            async for happened in happenings:
                last = happened or last
        if isinstance(last, Failed):
            raise ApiError(*FAILURES[last.reason])
        return JSONResponse(writer.whole(last))

    async def _stream(self, happenings: AsyncGenerator[Happening | None, None], writer: Writer) -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(happenings):
            async for happened in happenings:
                if happened is None:
                    yield ": no news\n\n"  # a comment: proxies and clients cut connections that are silent
                    continue
                if isinstance(happened, Failed):
                    yield event(error_body(*FAILURES[happened.reason]))
                    return
                goes_on = isinstance(happened, (Piece, Step))
                for chunk in writer.chunks(happened) if goes_on else writer.last_chunks(happened):
                    yield event(chunk)
                if not goes_on:
                    yield "data: [DONE]\n\n"


def _client(request: Request) -> str:
    return request.client.host if request.client else ""


@contextlib.contextmanager
def _submitting() -> Iterator[None]:
    """A queue that is full or closed, as an answer."""
    try:
        yield
    except Overloaded as error:
        raise ApiError(429, str(error), code="overloaded", retry_after=error.retry_after) from error
    except Closed as error:
        raise ApiError(503, str(error)) from error


class _Stream(StreamingResponse):
    """Server-sent events.

    Args:
        content: the events.
        close: called however they end, also if the client goes away before the first.
        stall: seconds that a client may take to make room for an event.
    """

    def __init__(self, content: AsyncGenerator[str, None], close: Callable[[], None], stall: float) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._content, self._close, self._stall = content, close, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stall):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:  # returning before the end of the body has the connection closed
            logger.warning("specdec: a client has not read its stream for %g s and is dropped", self._stall)
        finally:
            self._close()
            await self._content.aclose()


# ---- errors ----------------------------------------------------------------------------------------------------------------


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    body = error_body(error.status_code, str(error.detail), getattr(error, "param", None), getattr(error, "code", None))
    return JSONResponse(body, error.status_code, error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    """The first thing that is wrong, by the name of its field; never the input itself."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "body"
    if first["type"] == "json_invalid":
        where, message = "body", "the body is not valid JSON"
    elif first["type"] == "extra_forbidden":
        message = f"{where} is not a field that this server supports; fix: leave it out"
    else:
        message = f"{where}: {first['msg']}"
    return JSONResponse(error_body(400, message, where), 400)


async def _internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(500, "internal error"), 500)
