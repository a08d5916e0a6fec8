"""HTTP of the standard library, with what it lacks against servers that never end.

A timeout of a socket is a limit between two bytes: a server that sends a byte now and then, or one
"100 Continue" after the other, holds a client for ever, and so do most HTTP libraries. Here a
watchdog looks after each `timeout` seconds whether at least `SLOWEST` bytes of the body a second
have arrived, headers and all counting as nothing, and closes the connection if not. A file of n
bytes therefore takes at most 2 timeout + n / SLOWEST seconds an attempt.

Redirects go to http and https only, never from https to http, and never anywhere else (urllib
would follow them to ftp).
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

SLOWEST = 1024  # bytes a second
_REDIRECTS, _MOVED = 6, (301, 302, 303, 307, 308)
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # of an address: all that has a meaning in it


class SlowError(OSError):
    """A server that sends too little."""


class Watchdog(threading.Thread):
    """Shuts the sockets of one request when too little arrives; `stop` ends it."""

    def __init__(self, timeout: float) -> None:
        super().__init__(daemon=True)
        self.timeout, self.bit = timeout, False
        self.received = 0  # bytes of the body since the last look
        self._sockets: list[socket.socket] = []
        self._stopped = threading.Event()

    def watch(self, connection: socket.socket) -> None:
        """Another socket of the request (after a redirect)."""
        self._sockets.append(connection)
        if self.bit:
            self._shut()

    def run(self) -> None:
        while not self._stopped.wait(self.timeout):
            if self.received < SLOWEST * self.timeout:
                self.bit = True
                self._shut()
                return
            self.received = 0

    def _shut(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):  # closed already
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def stop(self) -> None:
        self._stopped.set()

    def check(self) -> None:
        """Raises SlowError if it had to act: what was read since then is no end of a file."""
        if self.bit:
            raise SlowError(f"less than {SLOWEST} bytes a second in {self.timeout:g} seconds")


class Response:
    """A response whose body is read under a watchdog."""

    def __init__(self, raw: Any, watchdog: Watchdog) -> None:
        self._raw, self._watchdog = raw, watchdog
        self.status, self.headers = raw.status, raw.headers

    def read1(self, most: int) -> bytes:
        """What has arrived, at most so many bytes; b"" at the end.

        Raises:
            OSError, HTTPException: the connection broke, or is too slow.
        """
        try:
            data: bytes = self._raw.read1(most)
        finally:
            self._watchdog.check()
        self._watchdog.received += len(data)
        return data

    def close(self) -> None:
        self._watchdog.stop()
        self._raw.close()

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def request(url: str, headers: dict[str, str], timeout: float) -> Response:
    """Ask for a page, and for the one that it redirects to.

    Raises:
        HTTPError, OSError, HTTPException: a refusal, no connection, no address, or a server that
            is too slow.
    """
    url = quote(url, safe=_SAFE, errors="replace")
    watchdog = Watchdog(timeout)
    opener = _opener(watchdog)
    watchdog.start()
    try:
        for _ in range(_REDIRECTS):
            try:
                raw = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
                watchdog.check()
                return Response(raw, watchdog)
            except urllib.error.HTTPError as error:
                if error.code not in _MOVED or "location" not in error.headers:
                    raise
                error.close()  # its body is not read
                url = _redirected(url, error)
            except ValueError as error:  # also half of what is wrong with a name of a host
                raise OSError(f"{url[:200]} is no address: {error}") from error
        raise OSError(f"more than {_REDIRECTS} redirects")
    except BaseException as error:
        watchdog.stop()
        if isinstance(error, Exception):
            watchdog.check()
        raise


def _redirected(url: str, error: urllib.error.HTTPError) -> str:
    # bytes of a header are read as Latin-1
    location = quote(error.headers["location"], safe=_SAFE, encoding="latin-1", errors="replace")
    try:
        target = str(urljoin(url, location))
        before, after = urlsplit(url).scheme, urlsplit(target).scheme
    except ValueError as problem:
        raise OSError(f"a redirect to {location[:200]}, no address: {problem}") from problem
    if after not in ("http", "https") or (before, after) == ("https", "http"):
        text = f"a redirect to {target[:200]}, which is not followed"
        raise urllib.error.HTTPError(url, 403, text, error.headers, None)
    return target


def _opener(watchdog: Watchdog) -> urllib.request.OpenerDirector:
    """urllib with watched connections, with proxies, without ftp, files and its own redirects."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            watchdog.watch(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            watchdog.watch(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, asked: urllib.request.Request) -> Any:
            return self.do_open(Plain, asked)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, asked: urllib.request.Request) -> Any:
            return self.do_open(Secure, asked, context=ssl.create_default_context())

    opener = urllib.request.OpenerDirector()  # build_opener would add ftp, file and data
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        PlainHandler(),
        SecureHandler(),
    ):
        opener.add_handler(handler)
    return opener
