"""A `dropbydrop serve` process for measurements, and one streamed request to it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

PROMPTS = [
    "Why is the sky blue?",
    "Name three rivers and the seas they reach.",
    "Write a short note to a friend about the weather.",
    "What does a mill do with grain?",
    "Explain what a prime number is.",
    "How do ships find their way at night?",
]


@contextmanager
def server(out: str, *options: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a server on a free port, until the block ends."""
    order = [sys.executable, "-m", "dropbydrop", "serve", out, "--port", "0", "--json", *options]
    process = subprocess.Popen(order, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit("the server did not start: " + " ".join(order))
        yield json.loads(line)["address"], process.pid
    finally:
        process.terminate()
        process.wait(30)


@dataclass
class Answer:
    """What came of a request. Times are seconds since the load began."""

    prompt: str
    sent: float
    first: float | None = None
    ended: float | None = None
    text: str = ""
    tokens: int = 0
    switches: list[list[float]] = field(default_factory=list)
    failure: str | None = None  # "turned away" or what broke

    @property
    def rate(self) -> float:
        """Tokens a second after the first one."""
        if self.first is None or self.ended is None or self.tokens < 2:
            return 0.0
        return (self.tokens - 1) / max(self.ended - self.first, 1e-9)


async def ask(client: httpx.AsyncClient, prompt: str, start: float, **body: Any) -> Answer:
    """One streamed answer of a fixed number of tokens, greedy."""
    found = Answer(prompt, time.perf_counter() - start)
    whole = {
        "messages": [{"role": "user", "content": prompt}], "temperature": 0, "ignore_eos": True,
        "stream": True, **body,
    }  # fmt: skip
    try:
        async with client.stream("POST", "/v1/chat/completions", json=whole) as response:
            if response.status_code == 429:
                found.failure = "turned away"
                return found
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    found.failure = chunk["error"]["message"]
                    return found
                take(found, chunk, time.perf_counter() - start)
        if found.ended is None:
            found.failure = "cut off"
    except httpx.HTTPError as error:
        found.failure = type(error).__name__
    return found


def take(found: Answer, chunk: dict[str, Any], now: float) -> None:
    if not chunk["choices"]:
        return
    delta = chunk["choices"][0]["delta"]
    found.text += delta.get("content") or ""
    if "role" not in delta and found.first is None:
        found.first = now
    if chunk["choices"][0]["finish_reason"] is not None:
        found.ended = now
        found.tokens = chunk["timings"]["predicted_n"]
        found.switches = chunk["dropbydrop"]["switches"]
