"""What a model wrote, in parts: content, reasoning, calls of tools.

How they are marked is in the tokenizer's `response_template`, which transformers parses as the text
comes. Without one everything is content. Where a model breaks its own marks (JSON that is none in a
call), what it wrote is content too: nothing is lost. The same goes for marks that take too long to
look for: patterns come with the model, and texts from whoever asks, who can make `\\s*<call>` look
at every beginning of a long run of blanks. Nobody else waits for that (`_SEARCH`, `_IN_ALL`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

_PIECE = 16  # characters for the parser at a time: fewer than the two marks of a call have
_SEARCH, _IN_ALL = 0.1, 1.0  # seconds for one search, and for all of a reply; common is 10^-5


@dataclass(frozen=True)
class Part:
    """A piece of a reply: `kind` is "content", "reasoning" or "call"."""

    kind: str
    text: str = ""  # of a call: its arguments as JSON
    name: str = ""
    key: str = field(default_factory=lambda: f"call_{secrets.token_hex(8)}")


_KINDS = {"content": "content", "reasoning_content": "reasoning", "thinking": "reasoning"}


class Reply:
    """The parts of one text, in order."""

    def __init__(
        self,
        template: dict[str, Any] | None,
        prompt: str,
        tools: list[Any] | None,
        must: bool = False,
    ) -> None:
        """Begin.

        Args:
            prompt: tells which parts the chat template has opened already.
            must: the text is a call, which a grammar saw to; anything else is a part of one that
                was cut, and left out.
        """
        self.must = must
        self._parser: Any = None
        self._left = _IN_ALL  # seconds for the parser
        self._closings: dict[str, Any] = {}  # field -> the pattern of the mark behind it
        if template is not None:
            self._parser, self._closings = _parser(template, prompt, tools)
        self._raw = ""  # all that was fed
        self._at = 0  # how much of it is in parts that are out
        self._body = ""  # of a call that is not complete
        self.calls = 0

    def feed(self, text: str) -> list[Part]:
        """The parts that more text makes certain, the same in whichever pieces it comes: what
        breaks its marks loses nothing of what was before it."""
        parts: list[Part] = []
        for start in range(0, len(text), _PIECE):
            if self._parser is None:
                rest = text[start:]
                self._raw += rest
                return parts if self.must else [*parts, Part("content", rest)]
            piece = text[start : start + _PIECE]
            self._raw += piece
            parts += self._walked(partial(self._parser.feed, piece))
        return parts

    def end(self) -> list[Part]:
        """What is left when the text has ended."""
        if self._parser is None:
            return []
        return self._walked(lambda: self._parser.finalize()[1])

    def _walked(self, events: Callable[[], list[dict[str, Any]]]) -> list[Part]:
        """The parts of new events; the rest of the text as it is where they make no sense."""
        start = time.perf_counter()
        try:
            parts, at, body = self._walk(events())
            self._left -= time.perf_counter() - start
            if self._left < 0:
                raise TimeoutError
        except (ValueError, KeyError, TypeError, TimeoutError, RecursionError):
            self._parser = None
            return [] if self.must else [Part("content", self._raw[self._at :])]
        self._at, self._body = at, body
        self.calls += sum(part.kind == "call" for part in parts)
        return [part for part in parts if part.kind == "call" or not self.must]

    def _walk(self, events: list[dict[str, Any]]) -> tuple[list[Part], int, str]:
        """Parts, how much of the text they and those before cover, and a call's text so far."""
        parts, at, body = [], self._at, self._body
        for event in events:
            kind = _KINDS.get(event["field"])
            if event["type"] == "region_open":
                body = ""
            elif event["type"] == "region_chunk" and kind is None:
                body += event["text"]
            elif event["type"] == "region_chunk":
                parts.append(Part(str(kind), event["text"]))
                at = self._past(event["text"], at)
            elif event["field"] == "tool_calls":
                value = event["value"]
                parts += map(_call, value if isinstance(value, list) else [value])
                at = self._past(body, at)
                closing = self._closings.get(event["field"])
                found = closing and closing.search(self._raw, at)
                at = found.end() if found and not self._raw[at : found.start()].strip() else at
        return parts, at, body

    def _past(self, text: str, at: int) -> int:
        found = self._raw.find(text, at)
        return at if found < 0 else found + len(text)


class _Timed:
    """A compiled pattern whose searches are given up after `_SEARCH` seconds."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pattern, name)

    def search(self, *args: Any, **options: Any) -> Any:
        return self._pattern.search(*args, timeout=_SEARCH, **options)

    def finditer(self, *args: Any, **options: Any) -> Any:
        return self._pattern.finditer(*args, timeout=_SEARCH, **options)


def _parser(
    template: dict[str, Any], prompt: str, tools: list[Any] | None
) -> tuple[Any, dict[str, Any]]:
    """transformers' parser behind a prompt, or None where the prompt takes it too long; and the
    patterns that end its fields.

    Raises:
        ValueError, TypeError, KeyError: a template that transformers cannot read.
    """
    from transformers.utils.chat_parsing import ResponseParser
    from transformers.utils.chat_parsing.response_templates import load_response_template

    def timed(pattern: Any) -> Any:
        return None if pattern is None else _Timed(pattern)

    read = load_response_template(template)
    fields = {
        name: replace(part, open_re=timed(part.open_re), close_re=timed(part.close_re))
        for name, part in read.fields.items()
    }
    closings = {name: part.close_re for name, part in fields.items()}
    read = replace(read, fields=fields, start_anchor_re=timed(read.start_anchor_re))
    try:
        return ResponseParser(read, prefix=prompt, tools=tools), closings
    except TimeoutError:
        return None, closings


def _call(value: Any) -> Part:
    """A call as the parser gives it.

    Raises:
        KeyError, TypeError: a call without a name or arguments.
        ValueError: halves of characters, which JSON can write and UTF-8 cannot; numbers that JSON
            cannot write, which Python reads.
    """
    name, arguments = value["function"]["name"], value["function"]["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    f"{name}{arguments}".encode()
    return Part("call", arguments, str(name))
