"""The server: routes, keys and limits around the engine.

    app = build(Service(engine, text, served), api_key="…", hosts=("localhost",))

What a request can do to the machine is bounded: bodies by `MOST_BODY` and `BODY_SECONDS`, prompts
by the model's context, waiting requests by the queue. No request names a file. Requests from other
web sites find no door: there is no CORS, bodies must be application/json (which a foreign page may
send only after asking), and without a key on a loopback address only loopback names are answered,
so that a foreign name that points here (DNS rebinding) is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .answers import ChatForm, CompletionForm, Form, Head
from .body import ApiError, Body, parse_json
from .chats import Chat, read_chat
from .engine import Saturated, Stopped
from .grammar import MOST_WAITING
from .guard import Guard
from .metrics import CONTENT_TYPE, write_metrics
from .replies import Reply
from .requests import Request, Served, names, read_completion
from .responses import ResponseForm, read_response
from .run import ClientGone, Run, answer
from .service import Service

T = TypeVar("T")
MOST_BODY = 8 << 20  # bytes
BODY_SECONDS = 30.0
_LONG_BODY = 64 << 10  # bytes; short ones do not wait for longer ones
_MOST_HELD = 4 * MOST_BODY  # of long bodies that are worked on, or wait for that
PAGE = Path(__file__).parent / "page"


class Routes:
    """The handlers, which share one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        # bodies are read and cut into tokens here, so that the streams of others go on; long ones
        # one after another, so that short ones go on too
        self._short = ThreadPoolExecutor(2, thread_name_prefix="dropbydrop-text")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="dropbydrop-text")
        self._held = 0  # bytes of the long ones
        # a new schema can take seconds, which only others with new ones wait for
        self._schemas = ThreadPoolExecutor(MOST_WAITING + 2, thread_name_prefix="dropbydrop-schema")

    async def aside(self, http: HttpRequest, function: Callable[..., T], *args: Any) -> T:
        """The result of a function whose time depends on the body of a request.

        Raises:
            ApiError: others with long bodies wait.
        """
        loop, size = asyncio.get_running_loop(), http.state.size
        if size <= _LONG_BODY:
            return await loop.run_in_executor(self._short, function, *args)
        if self._held + size > _MOST_HELD:
            raise ApiError(429, "too many long texts wait.", headers={"retry-after": "5"})
        self._held += size
        try:
            return await loop.run_in_executor(self._long, function, *args)
        finally:
            self._held -= size

    async def body(self, http: HttpRequest) -> Body:
        raw = await read_body(http)
        http.state.size = len(raw)
        return Body(await self.aside(http, parse_json, raw))

    async def read(self, http: HttpRequest, reader: Callable[[Body, Served], T]) -> T:
        """A request, by one of the readers of bodies."""
        return await self.aside(http, reader, await self.body(http), self.service.served)

    async def chat(self, http: HttpRequest) -> Response:
        request, chat = await self.read(http, read_chat)
        return await self._chat(http, request, chat, ChatForm)

    async def responses(self, http: HttpRequest) -> Response:
        request, chat = await self.read(http, read_response)
        return await self._chat(http, request, chat, ResponseForm)

    async def _chat(
        self, http: HttpRequest, request: Request, chat: Chat, kind: type[Form]
    ) -> Response:
        service = self.service
        tokens, prompt = await self.aside(http, service.chat_tokens, chat)
        grammar = None
        if chat.must or chat.schema is not None:
            loop = asyncio.get_running_loop()
            grammar = await loop.run_in_executor(self._schemas, service.grammar, chat, prompt)
        run = Run(service.engine, http.receive)
        run.start(service.jobs(request, [tokens], run.emit, False, grammar))
        reply = partial(Reply, service.text.response_template, prompt, chat.tools, bool(chat.must))
        sizes = service.engine.precisions.bytes_of
        head = Head(request, service.fingerprint, sizes, [tokens], reply, chat.told)
        return await answer(run, kind(head, service.text))

    async def completions(self, http: HttpRequest) -> Response:
        request, prompts = await self.read(http, read_completion)
        tokens = await self.aside(http, self.service.prompt_tokens, prompts)
        service, run = self.service, Run(self.service.engine, http.receive)
        run.start(service.jobs(request, tokens, run.emit, True))
        head = Head(request, service.fingerprint, service.engine.precisions.bytes_of, tokens)
        return await answer(run, CompletionForm(head, service.text))

    async def models(self, http: HttpRequest) -> Response:
        data = [self.service.model_object(name) for name in names(self.service.served)]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name not in names(self.service.served):
            raise ApiError(404, f"no model {name[:80]!r}.", "model", "model_not_found")
        return JSONResponse(self.service.model_object(name))

    async def health(self, http: HttpRequest) -> Response:
        alive = self.service.engine.alive
        word = "ok" if alive else "the worker has ended"
        return JSONResponse({"status": word}, 200 if alive else 503)

    async def status(self, http: HttpRequest) -> Response:
        return JSONResponse(self.service.status())

    async def metrics(self, http: HttpRequest) -> Response:
        engine = self.service.engine
        text = write_metrics(engine.counters, engine.status())
        return Response(text, media_type=CONTENT_TYPE)

    async def tokenize(self, http: HttpRequest) -> Response:
        body = await self.body(http)
        content, special = body.text("content"), body.flag("add_special")
        if content is None:
            raise body.error("content", "is missing")
        body.done()
        tokens = await self.aside(http, self.service.encoded, content, special)
        return JSONResponse({"tokens": tokens})

    async def detokenize(self, http: HttpRequest) -> Response:
        body = await self.body(http)
        tokens, size = body.list("tokens"), self.service.served.vocabulary
        if tokens is None or not all(type(x) is int and 0 <= x < size for x in tokens):
            raise body.error("tokens", f"give a list of tokens, 0 to {size - 1}")
        body.done()
        return JSONResponse({"content": await self.aside(http, self.service.text.decode, tokens)})

    async def index(self, http: HttpRequest) -> Response:
        if not (PAGE / "index.html").is_file():
            return PlainTextResponse("This server has no page; its API is at /v1.\n")
        return FileResponse(PAGE / "index.html")


async def read_body(http: HttpRequest) -> bytes:
    """A body, within the limits.

    Raises:
        ApiError: too large, too slow, or not declared as JSON.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:60]!r}; send application/json.")
    size, parts = 0, []
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                size += len(part)
                if size > MOST_BODY:
                    raise ApiError(413, f"the body has more than {MOST_BODY >> 20} MiB.")
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive in {BODY_SECONDS:.0f} seconds.") from None
    return b"".join(parts)


async def _told(http: HttpRequest, error: Exception) -> Response:
    """Any exception as OpenAI's error object."""
    if isinstance(error, Saturated):
        error = ApiError(
            429,
            "all places are taken, and the queue is full; try again later.",
            code="queue_full",
            headers={"retry-after": str(error.seconds)},
        )
    elif isinstance(error, Stopped):
        error = ApiError(503, "the server is shutting down.")
    elif isinstance(error, ClientGone | ClientDisconnect):
        return Response(status_code=499)  # which nobody reads
    elif isinstance(error, HTTPException):
        what = f"{http.method} {http.url.path[:100]}: {error.detail}"
        error = ApiError(error.status_code, what, headers=dict(error.headers or {}))
    if not isinstance(error, ApiError):
        error = ApiError(500, f"internal error: {type(error).__name__}")
    return JSONResponse(error.body(), error.status, headers=error.headers)


def build(service: Service, api_key: str | None, hosts: tuple[str, ...] = ()) -> Starlette:
    """The ASGI application.

    Args:
        api_key: what clients must send as a bearer token; None asks for nothing.
        hosts: names that requests may use for this server; empty allows any.
    """
    routes = Routes(service)
    handle: dict[Any, Callable[..., Awaitable[Response]]] = dict.fromkeys(
        (ApiError, Saturated, Stopped, ClientGone, ClientDisconnect, HTTPException, Exception),
        _told,
    )
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/responses", routes.responses, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/status.json", routes.status),
            Route("/", routes.index),
            Mount("/page", StaticFiles(directory=PAGE, check_dir=False)),
        ],
        middleware=[Middleware(Guard, api_key=api_key, hosts=hosts)],
        exception_handlers=handle,
    )
