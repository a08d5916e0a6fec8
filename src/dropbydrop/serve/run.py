"""From a request to its events: tokens, jobs, and the bridge from the worker's thread to asyncio.

A client that leaves ends its jobs: whoever waits for events also watches for the disconnect, which
arrives as the event None.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .answers import Choice, Form
from .body import ApiError
from .engine import Engine
from .job import Event, Failed, Finished, Job, Prompted

WRITE_SECONDS = 60.0  # a reader that takes nothing for so long is given up


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Run:
    """The jobs of one request, and their events. A context manager: leaving it cancels the jobs."""

    def __init__(self, engine: Engine, receive: Receive) -> None:
        self._engine, self._receive = engine, receive
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._jobs: Sequence[Job] = ()
        self._left = 0
        self._watch: asyncio.Task[None] | None = None

    def emit(self, event: Event) -> None:
        """For the worker's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def start(self, jobs: Sequence[Job]) -> None:
        """Submit.

        Raises:
            Saturated, Stopped: as `Engine.submit`.
        """
        self._engine.submit(jobs)
        self._jobs, self._left = jobs, len(jobs)
        self._watch = asyncio.ensure_future(self._until_gone())

    def close(self) -> None:
        """End jobs that are not finished. May be called twice."""
        if self._watch is not None:
            self._watch.cancel()
        self._engine.cancel(self._jobs)

    async def next(self) -> list[Event]:
        """At least one event, and all that are there; empty after the last one.

        Raises:
            ClientGone: the connection was closed.
        """
        if not self._left:
            return []
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        events = [event for event in found if event is not None]
        if len(events) < len(found):
            raise ClientGone
        self._left -= sum(isinstance(event, Finished | Failed) for event in events)
        return events

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


async def answer(run: Run, form: Form) -> Response:
    """The response to a request whose jobs have been started."""
    try:
        events = await run.next()
        if isinstance(events[0], Failed):
            raise ApiError(events[0].status, events[0].message)
        if form.head.request.stream:
            assert isinstance(events[0], Prompted)
            headers = _headers(events[0].bits)
            return EventStream(_lines(run, form, events), run, headers, form.done)
        choices = [Choice() for _ in range(len(form.head.prompts) * form.head.request.n)]
        while events:
            for event in events:
                if isinstance(event, Failed):
                    raise ApiError(event.status, event.message)
                choices[event.index].add(event)
            events = await run.next()
        whole = await asyncio.to_thread(form.whole, choices)  # with scores of all tokens, perhaps
        run.close()
        return JSONResponse(whole, headers=_headers(whole["dropbydrop"]["bits"]))
    except BaseException:
        run.close()
        raise


def _headers(bits: float) -> dict[str, str]:
    return {"x-dropbydrop-bits": f"{bits:g}"}


async def _lines(run: Run, form: Form, events: list[Event]) -> AsyncIterator[list[Any]]:
    """Chunks of a stream, several where several events were there."""
    ends: list[Finished] = []
    while events:
        made: list[Any] = []
        for event in events:
            try:
                if isinstance(event, Failed):
                    raise ApiError(event.status, event.message)
                made += form.chunks(event)
            except ApiError as error:
                yield [*made, *form.failed(error)]
                return
            ends += [event] if isinstance(event, Finished) else []
        if made:
            yield made
        events = await run.next()
    if form.head.request.usage:
        yield [form.usage_chunk(sorted(ends, key=lambda end: end.index))]


class EventStream(Response):
    """Server-sent events: a line `data: …` for every chunk, and [DONE]."""

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[list[Any]], run: Run, headers: dict[str, str], done: bool = True
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", **headers})
        del self.headers["content-length"]
        self._chunks, self._run, self._done = chunks, run, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunks in self._chunks:
                text = "".join(map(event_line, chunks))
                await self._write(send, text.encode(), True)
            await self._write(send, b"data: [DONE]\n\n" if self._done else b"", False)
        except (ClientGone, OSError, TimeoutError):
            pass  # the connection is closed by the server, as nothing ends the response
        finally:
            self._run.close()

    async def _write(self, send: Send, body: bytes, more: bool) -> None:
        async with asyncio.timeout(WRITE_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": more})


def event_line(chunk: Any) -> str:
    """A chunk as an event; those of /v1/responses have a name."""
    data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {chunk['type']}\n" if isinstance(chunk.get("type"), str) else ""
    return f"{name}data: {data}\n\n"
