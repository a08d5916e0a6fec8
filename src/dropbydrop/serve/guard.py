"""What every request passes: its host, its key, and the headers of every answer."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .body import ApiError

_POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self'"
_OPEN = ("/", "/health")  # without a key: the page asks for it, probes have none


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: Sequence[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)
        # bytes of the environment that are no UTF-8 are what they were
        self._key = None if api_key is None else api_key.encode(errors="surrogateescape")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = _POLICY
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        error = self._refused(scope)
        if error is None:
            return await self._app(scope, receive, guarded)
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
        await JSONResponse(error.body(), error.status, headers)(scope, receive, guarded)

    def _refused(self, scope: Scope) -> ApiError | None:
        headers, path = Headers(scope=scope), str(scope["path"])
        if self._hosts and _name(headers.get("host", "")) not in self._hosts:
            return ApiError(
                403,
                "this server answers only to names of this machine; give --api-key to open it.",
            )
        if self._key is None or path in _OPEN or path.startswith("/page/"):
            return None
        given = headers.get("authorization", "")
        scheme, _, token = given.partition(" ")
        # compared in constant time, so that answers do not tell how much of a key is right
        same = hmac.compare_digest(token.strip(" \t").encode("latin-1"), self._key)
        if scheme.lower() == "bearer" and same:
            return None
        return ApiError(
            401, "no valid API key; send it as a bearer token.", None, "invalid_api_key"
        )


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host
