"""A file server that misbehaves on request, for everything that fetches checkpoints."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path
from typing import Any


class Server:
    """A plain file server that can be told to misbehave; `log` has (file, first byte) asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log: list[tuple[str, int]] = []
        self.cut: dict[str, int] = {}  # file -> bytes after which the connection ends, once
        self.claim: dict[str, int] = {}  # file -> size that is announced
        self.body: dict[str, bytes] = {}  # file -> other bytes than those of the folder
        self.ranges = True
        self.announce = True
        self.gate: dict[str, threading.Event] = {}  # file -> wait before sending its second half
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.answer(self)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: Any) -> None:
        name, start = request.path.rpartition("/")[2], 0
        if self.ranges and (asked := request.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        self.log.append((name, start))
        path = self.folder / name
        if not path.is_file() and name not in self.body:
            return request.send_error(404)
        data = self.body.get(name) or path.read_bytes()
        size = self.claim.get(name, len(data))
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if self.announce:
            request.send_header("Content-Length", str(size - start))
        request.end_headers()
        end = self.cut.pop(name, len(data))
        if name in self.gate:
            request.wfile.write(data[start : end // 2])
            request.wfile.flush()
            assert self.gate[name].wait(20)
            start = max(start, end // 2)
        request.wfile.write(data[start:end])
        return None

    def asked(self, name: str) -> list[int]:
        return [start for file, start in self.log if file == name]


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
