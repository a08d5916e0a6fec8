"""What a model wrote, in parts: content, reasoning, calls of tools.

How they are marked is in the tokenizer's `response_template`, which transformers parses as the text
comes. Without one everything is content. Where a model breaks its own marks (JSON that is none in a
call), what it wrote is content too: nothing is lost.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


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
        if template is not None:
            from transformers.utils.chat_parsing import ResponseParser

            self._parser = ResponseParser(template, prefix=prompt, tools=tools)
        self._raw = ""  # all that was fed
        self._at = 0  # how much of it is in parts that are out
        self._body = ""  # of a call that is not complete
        self.calls = 0

    def feed(self, text: str) -> list[Part]:
        """The parts that more text makes certain."""
        self._raw += text
        if self._parser is None:
            return [Part("content", text)] if text and not self.must else []
        return self._walked(lambda: self._parser.feed(text))

    def end(self) -> list[Part]:
        """What is left when the text has ended."""
        if self._parser is None:
            return []
        return self._walked(lambda: self._parser.finalize()[1])

    def _walked(self, events: Callable[[], list[dict[str, Any]]]) -> list[Part]:
        """The parts of new events; the rest of the text as it is where they make no sense."""
        try:
            parts, at, body = self._walk(events())
        except (ValueError, KeyError, TypeError):
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
        return parts, at, body

    def _past(self, text: str, at: int) -> int:
        found = self._raw.find(text, at)
        return at if found < 0 else found + len(text)


def _call(value: Any) -> Part:
    """A call as the parser gives it.

    Raises:
        KeyError, TypeError: a call without a name or arguments.
    """
    name, arguments = value["function"]["name"], value["function"]["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Part("call", arguments, str(name))
