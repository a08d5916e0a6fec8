"""A server that speaks the protocol of `dropbydrop serve` and answers from a script.

The page's double: it knows no model, an answer is a list of tokens, given for each level. What the
page sent is kept in `requests`. So the tests of the page need neither a checkpoint nor the server's
dependencies, and can play what a real server rarely does: die in mid-answer, turn away, ask for a
key, write HTML.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dropbydrop

PAGE = Path(dropbydrop.__file__).parent / "serve" / "page"
CSP = "default-src 'self'; img-src 'self' data:; style-src 'self'"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
LEVELS = [
    {
        "bits": b,
        "id": f"toy:{b}bit",
        "seconds_per_token": 0.01 * b,
        "bytes_per_token": b * 20_000_000,
    }
    for b in (2, 3, 4)
]


@dataclass
class Script:
    """What the server does with the next requests."""

    answers: dict[Any, list[str]] = field(default_factory=dict)  # bits, or None for any
    levels: list[int] = field(default_factory=lambda: [3])  # of an "auto" answer, in turn
    hold_after: int | None = None  # tokens after which it waits until `go` is set
    go: threading.Event = field(default_factory=threading.Event)
    die_after: int | None = None  # tokens before the connection breaks
    refuse: tuple[int, str] | None = None  # status and message of every chat request
    key: str | None = None
    status: dict[str, Any] = field(default_factory=dict)  # over the defaults of /status.json
    requests: list[dict[str, Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)  # a client did not wait


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    script: Script

    def log_message(self, *args: object) -> None:
        pass

    def _send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", CSP)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, status: int, value: Any, **headers: str) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), **headers)

    def _allowed(self) -> bool:
        key = self.script.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self._json(401, {"error": {"message": "no valid key", "type": "invalid_request_error"}})
        return False

    def do_GET(self) -> None:
        if self.path == "/status.json":
            if self._allowed():
                self._json(200, {**status(), **self.script.status})
            return
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        file = PAGE / name
        if file.is_file():
            self._send(200, TYPES[file.suffix], file.read_bytes())
        else:
            self._json(404, {"error": {"message": f"no {self.path}"}})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length))
        if not self._allowed():
            return
        self.script.requests.append(body)
        if self.script.refuse is not None:
            code, message = self.script.refuse
            self._json(code, {"error": {"message": message}}, Retry_After="7")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for event in self._events(body):
                self.wfile.write(f"data: {event}\n\n".encode())
                self.wfile.flush()
        except OSError:
            self.script.gone.set()
        self.close_connection = True

    def _events(self, body: dict[str, Any]) -> Iterator[str]:
        script, asked = self.script, body["bits"]
        tokens = script.answers.get(asked, script.answers.get(None, ["Hello", " there", "."]))
        chosen = script.levels if asked == "auto" else [asked]
        switches: list[list[float]] = []
        for index, token in enumerate(tokens):
            if index == script.die_after:
                return
            if index == script.hold_after:
                script.go.wait(60)
            bits = chosen[min(index * len(chosen) // len(tokens), len(chosen) - 1)]
            if not switches or switches[-1][1] != bits:
                switches.append([index, bits])
            yield chunk({"content": token}, None, {"bits": bits})
        last = {
            "bits": switches[-1][1], "asked": asked, "switches": switches,
            "bytes_per_token": 20_000_000 * switches[-1][1],
        }  # fmt: skip
        timings = {
            "prompt_n": 9, "prompt_ms": 5.0, "prompt_per_second": 1800.0, "cache_n": 0,
            "predicted_n": len(tokens), "predicted_ms": 80.0 * len(tokens),
            "predicted_per_second": 12.5,
        }  # fmt: skip
        yield chunk({}, "stop", last, timings=timings)
        yield "[DONE]"


def chunk(delta: dict[str, Any], finish: str | None, ours: dict[str, Any], **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "toy"}
    return json.dumps({**head, "choices": [choice], "dropbydrop": ours, **more})


def status() -> dict[str, Any]:
    return {
        "model": "toy", "queue": 0, "running": 0, "capacity": 8, "level": 3, "target_tps": 20.0,
        "levels": LEVELS, "tokens_per_second": 0.0, "shed": {"moved_down": 0, "rejected": 0},
        "uptime": 61.0,
    }  # fmt: skip


@contextmanager
def fake_server(script: Script) -> Iterator[str]:
    """Address of a running server."""
    handler = type("Scripted", (Handler,), {"script": script})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
