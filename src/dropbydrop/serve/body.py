"""The JSON body of a request, read field by field. What nobody has read is refused by name.

So a parameter that this server does not have is never ignored: `Body.done` finds it. A value of
null is the same as no value. All errors of a request are `ApiError`s, which become OpenAI's error
object.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from collections.abc import Sequence
from typing import Any

# an escape that may be half of a character, which no tokenizer takes
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEP = 100  # lists and objects within each other; Python gives up near 1,000, in other places
_MOST_VALUES = 1 << 19  # 64 prompts of 8,000 tokens; while Python parses, nobody else works


class ApiError(Exception):
    """What a client gets instead of an answer.

    Attributes:
        status: of HTTP.
        param: the parameter at fault.
        code: a word for programs.
        headers: of HTTP, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object in a body.

    Raises:
        ApiError: not JSON in UTF-8, nested too deeply, too many values, or no object.
    """
    if _count_values(raw) > _MOST_VALUES:
        raise ApiError(413, f"the body has more than {_MOST_VALUES:,} values.")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        _check_depth(value)
        if _HALF.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}; send an object.")
    return value


def _count_values(raw: bytes) -> int:
    """About the number of values of a JSON text, found in no time: what is opened, and commas."""
    bare = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (quotes := bare.count(b'"')) > 4 * _MOST_VALUES:  # a name and a text for each
        return quotes
    outside = b"".join(bare.split(b'"')[::2])
    return sum(map(outside.count, (b",", b"[", b"{")))


def _check_depth(value: Any) -> None:
    """Raises ValueError for lists and objects within each other beyond `_DEEP`."""
    inner = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEP):
        held = [v.values() if isinstance(v, dict) else v for v in inner]
        inner = [v for values in held for v in values if isinstance(v, dict | list)]
        if not inner:
            return
    raise ValueError(f"lists and objects within each other, deeper than {_DEEP}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class Body:
    """An object whose fields are read once each."""

    def __init__(self, fields: dict[str, Any], where: str = "") -> None:
        self._fields, self._where = fields, where
        self._left = {name for name, value in fields.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """Any value."""
        self._left.discard(name)
        value = self._fields.get(name)
        return default if value is None else value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number in low..high."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"{_show(value)} is no number")
        if not low <= value <= high or not math.isfinite(value):
            raise self.error(name, f"{_show(value)} is not between {low:g} and {high:g}")
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
        """A whole number in low..high, or the default."""
        value = self.take(name, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"{_show(value)} is no whole number")
        if not low <= value <= high:
            raise self.error(name, f"{_show(value)} is not between {low} and {high}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"{_show(value)} is neither true nor false")
        return value

    def text(self, name: str, default: str | None = None) -> Any:
        value = self.take(name, default)
        if value is not default and not isinstance(value, str):
            raise self.error(name, f"{_show(value)} is no text")
        return value

    def choice(self, name: str, default: str, options: Sequence[str]) -> str:
        value = self.text(name, default)
        if value not in options:
            raise self.error(name, f"{_show(value)} is none of {', '.join(options)}")
        return str(value)

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, f"{_show(value)} is no object")
        return value

    def labels(self, name: str) -> dict[str, str]:
        """At most 16 short texts by name, as OpenAI takes them."""
        value = self.object(name) or {}
        if len(value) > 16 or not all(
            isinstance(v, str) and len(k) <= 64 and len(v) <= 512 for k, v in value.items()
        ):
            raise self.error(name, "give at most 16 texts, of 512 characters with names of 64")
        return value

    def list(self, name: str) -> list[Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.error(name, f"{_show(value)} is no list")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """A parameter of OpenAI's that has one supported meaning: any other value is refused."""
        value = self.take(name)
        if value is not None and not any(value is a or value == a for a in allowed):
            raise self.error(name, f"{_show(value)} is not supported", "unsupported_value")

    def tags(self, *names: str) -> None:
        """Labels of a request that change no answer, in OpenAI's service neither."""
        for name in names:
            self.take(name)

    def error(self, name: str, what: str, code: str | None = None) -> ApiError:
        place = f"{self._where}{name}"
        return ApiError(400, f"{place}: {what}.", place, code)

    def done(self) -> None:
        """Refuse what was not read.

        Raises:
            ApiError: naming the fields.
        """
        if self._left:
            least = [f"{self._where}{name}"[:80] for name in heapq.nsmallest(8, self._left)]
            raise ApiError(
                400,
                f"unknown or unsupported: {', '.join(least)}. Nothing is ignored here; leave it "
                "away.",
                least[0],
                "unknown_parameter",
            )


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
