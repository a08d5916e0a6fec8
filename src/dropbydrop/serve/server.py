"""The process: uvicorn around the application, from the first line printed to a clean end.

Ctrl-C (or SIGTERM) stops the worker first, so that open streams end with an error that says why,
and then the connections. A client that is slow with its headers, or does not read, is cut off,
which uvicorn leaves open.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import build
from .run import WRITE_SECONDS
from .service import Service

HEADER_SECONDS = 15.0
_LARGEST_HEADERS = 64 << 10
MOST_CONNECTIONS = 512
_ENDING_SECONDS = 4  # which answers are given to end
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAMES = ("localhost", "127.0.0.1", "[::1]")  # of a loopback address in requests


class _Timer:
    """Does something once, a while after `start`, unless `stop` comes before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, action: Callable[[], None]) -> None:
        self._loop, self._action = loop, action
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """No effect if it runs."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, self._action)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None


class _Protocol(H11Protocol):
    """HTTP/1.1 with limits on the time from a request's first byte to the end of its headers, and
    on the time in which a client takes nothing of what waits for it.

    A connection on which nothing comes between two requests is closed by uvicorn.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # tell `pause_writing` of anything that waits
        self._late, self._stuck = (_Timer(self.loop, transport.abort) for _ in range(2))
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck.start(WRITE_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stuck.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.stop()
        self._stuck.stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The time runs while no request is worked on; further bytes do not start it again."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._late.stop()
        else:
            self._late.start(HEADER_SECONDS)


class Server(uvicorn.Server):
    """One service at one address. `answer` runs it in the calling thread."""

    def __init__(
        self,
        service: Service,
        host: str,
        port: int,
        api_key: str | None,
        ready: Callable[[str], None],
    ) -> None:
        """Prepare; nothing listens before `answer`.

        Args:
            port: 0 takes a free one.
            ready: called with the address, once requests are taken.
        """
        hosts = _NAMES if host in LOOPBACK and api_key is None else ()
        super().__init__(
            uvicorn.Config(
                build(service, api_key, hosts),
                host=host,
                port=port,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=_ENDING_SECONDS + 1,
                h11_max_incomplete_event_size=_LARGEST_HEADERS,
            )
        )
        self._service, self._ready = service, ready

    def answer(self) -> None:
        """Answer requests until the process is asked to end, or `should_exit` is set.

        Raises:
            SystemExit: the address cannot be used; uvicorn has said why.
        """
        self._service.engine.start()
        try:
            with suppress(KeyboardInterrupt):  # which uvicorn raises again after a clean end
                asyncio.run(self.serve())
        finally:
            self._service.stop()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: Any = None) -> None:
        # uvicorn waits for ever for a request whose client reads nothing, cancelled or not
        asyncio.get_running_loop().call_later(_ENDING_SECONDS, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # a lock may be held where the signal arrives, so the worker is stopped from elsewhere
        threading.Thread(target=self._service.stop, daemon=True).start()
        super().handle_exit(sig, frame)
