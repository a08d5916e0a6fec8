"""The process: uvicorn around the application, from the first line printed to a clean end.

Ctrl-C (or SIGTERM) stops the worker first, so that open streams end with an error that says why,
and then the connections. A client that is slow with its headers is cut off, which uvicorn leaves
open.
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
from .service import Service

HEADER_SECONDS = 15.0
_LARGEST_HEADERS = 64 << 10
MOST_CONNECTIONS = 512
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAMES = ("localhost", "127.0.0.1", "[::1]")  # of a loopback address in requests


class _Protocol(H11Protocol):
    """HTTP/1.1 with a limit on the time from a request's first byte to the end of its headers.

    A connection on which nothing comes between two requests is closed by uvicorn.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The time runs while no request is worked on; further bytes do not start it again."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


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
                timeout_graceful_shutdown=5,
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # a lock may be held where the signal arrives, so the worker is stopped from elsewhere
        threading.Thread(target=self._service.stop, daemon=True).start()
        super().handle_exit(sig, frame)
