"""The state of a server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ABOUT = {
    "requests": "Requests that were accepted",
    "finished": "Continuations that came to their end",
    "cancelled": "Continuations whose client left",
    "failed": "Continuations that ended with an error",
    "rejected": "Requests that were refused because the queue was full",
    "moved_down": "Changes to a lower precision within a continuation",
    "moved_up": "Changes to a higher precision within a continuation",
    "parked": "Continuations that gave their cache away for a while",
    "prompt_tokens": "Tokens of prompts",
    "tokens": "Generated tokens",
}


@dataclass
class Counters:
    """Sums since the start."""

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    rejected: int = 0
    moved_down: int = 0
    moved_up: int = 0
    parked: int = 0
    prompt_tokens: int = 0
    tokens: int = 0


def write_metrics(counters: Counters, status: Mapping[str, Any]) -> str:
    """Counters, gauges and the cost of each level."""
    return "".join(f"{line}\n" for line in _lines(counters, status))


def _lines(counters: Counters, status: Mapping[str, Any]) -> Iterator[str]:
    for name, value in asdict(counters).items():
        yield f"# HELP dropbydrop_{name}_total {_ABOUT[name]}"
        yield f"# TYPE dropbydrop_{name}_total counter"
        yield f"dropbydrop_{name}_total {value}"
    for name, about in (
        ("queue", "Continuations that wait"),
        ("running", "Continuations that run"),
        ("level", "Level that an auto request would get now"),
        ("tokens_per_second", "Generated tokens a second, of the last seconds"),
    ):
        yield f"# HELP dropbydrop_{name} {about}"
        yield f"# TYPE dropbydrop_{name} gauge"
        yield f"dropbydrop_{name} {status[name]}"
    for name, about in (
        ("seconds_per_token", "Measured seconds of a step"),
        ("bytes_per_token", "Bytes that a token reads"),
    ):
        yield f"# HELP dropbydrop_{name} {about}"
        yield f"# TYPE dropbydrop_{name} gauge"
        for level in status["levels"]:
            if level[name] is not None:
                yield f'dropbydrop_{name}{{bits="{level["bits"]}"}} {level[name]}'
