"""Clients that misbehave, against a running server: it must answer, and keep nothing of them.

    dropbydrop serve OUT --port 8000
    python benchmarks/serve/misuse.py http://127.0.0.1:8000 --clients 10000

Clients send whole requests, halves of them, or rubbish, or leave before or within the answer.
At the end the server must be idle, and its memory and its threads as before the second half of the
clients (given its process with --pid, on Linux). tests/serve/test_security.py runs a few of them.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any


def connect(address: str, timeout: float = 60.0) -> socket.socket:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


def raw(address: str, data: bytes, wait: float = 10.0) -> bytes:
    """Send bytes and read until the server closes or says nothing for `wait` seconds."""
    with connect(address, wait) as link:
        link.sendall(data)
        found = b""
        try:
            while part := link.recv(65536):
                found += part
        except TimeoutError:
            pass
        return found


def http(body: bytes, path: str = "/v1/completions", headers: str = "") -> bytes:
    lines = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    lines += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    return lines.encode() + body


def misbehave(address: str, seed: int) -> str:
    """One of the things that clients do; returns the status of the answer, if it was read."""
    draw = random.Random(seed)
    kind, found = draw.randrange(6), b""
    body: dict[str, Any] = {
        "prompt": "the old mill", "max_tokens": draw.randrange(1, 40), "stream": kind != 0,
        "bits": draw.choice([2, 3, 4]), "ignore_eos": True, "n": draw.randrange(1, 3),
    }  # fmt: skip
    data = http(json.dumps(body).encode())
    if kind <= 1:  # as it should be
        found = raw(address, data)
    elif kind == 2:  # half of a request
        with connect(address) as link:
            link.sendall(data[: draw.randrange(len(data))])
    elif kind == 3:  # gone before the answer
        with connect(address) as link:
            link.sendall(data)
    elif kind == 4:  # gone after some of it
        with connect(address) as link:
            link.sendall(data)
            link.recv(draw.randrange(1, 2000))
    else:  # rubbish
        found = raw(address, http(bytes(draw.randrange(256) for _ in range(60))))
    return found.split(b" ", 2)[1].decode() if found.startswith(b"HTTP/") else "left"


def _state(address: str, pid: int | None) -> dict[str, Any]:
    """What the server holds, once it is idle."""
    for _ in range(600):
        with urllib.request.urlopen(f"{address}/status.json", timeout=60) as answer:
            status = json.load(answer)
        if status["queue"] == status["running"] == 0:
            break
        time.sleep(0.1)
    state = {name: status[name] for name in ("queue", "running", "shed")}
    if pid is not None:
        text = Path(f"/proc/{pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines())
        state["threads"] = int(lines["Threads"])
        state["resident_kb"] = int(lines["VmRSS"].split()[0])
        state["files"] = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="address of the server")
    parser.add_argument("--clients", type=int, default=10_000, help="number of clients")
    parser.add_argument("--together", type=int, default=16, help="clients at once")
    parser.add_argument("--pid", type=int, help="process of the server, for its memory")
    given = parser.parse_args()

    def one(seed: int) -> str:
        with suppress(OSError):
            return misbehave(given.address, seed)
        return "refused"

    half = given.clients // 2
    with ThreadPoolExecutor(given.together) as pool:
        print(json.dumps({"before": _state(given.address, given.pid)}), flush=True)
        for first, last in ((0, half), (half, given.clients)):
            counts = Counter(pool.map(one, range(first, last)))
            state = _state(given.address, given.pid)
            print(json.dumps({"clients": last, "answers": counts, **state}), flush=True)


if __name__ == "__main__":
    main()
