"""Calls that must be made (`tool_choice`): the form in which a model writes them, as a grammar.

The form is taken from the response template, which says by which marks calls are told from text:
an opening mark, JSON with a name and arguments, a closing mark. A template says how to read, not
how to write, so a call is put together and read back behind the very prompt; a form is used only if
that gives the call and nothing else. Calls that are no JSON (XML of some coders), and prompts that
have opened another part (reasoning), are refused by name.

The answer then begins with the opening mark and ends with the closing one: one call, of one of the
functions, whose arguments are of its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .body import ApiError
from .replies import Reply
from .text import Text

_KEYS = ("arguments", "parameters")  # what templates call the arguments
_LISTS = (("", ""), ("[", "]"))  # a call by itself, or a list of calls
# as models write JSON; white space is fixed, for one that is unsure would write it until it is cut
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Form:
    """What stands before a call's JSON and after it, and the key of its arguments."""

    before: str
    after: str
    key: str


def form_of(template: Any, prompt: str, tools: list[dict[str, Any]]) -> Form:
    """The form of a call behind a prompt.

    Raises:
        ApiError: there is none of those that can be forced.
    """
    field = (template or {}).get("fields", {}).get("tool_calls")
    if field is None or field.get("content") != "json":
        raise _refused("this model's calls are no JSON, so that none can be asked for")
    name = tools[0]["function"]["name"]
    for form in _forms(field):
        call = json.dumps({"name": name, form.key: {"a": 1}})
        reply = Reply(template, prompt, tools)
        parts = reply.feed(f"{form.before}{call}{form.after}") + reply.end()
        found = [part for part in parts if part.kind == "call" or part.text.strip()]
        if [(part.kind, part.name) for part in found] != [("call", name)]:
            continue
        with suppress(ValueError):
            if json.loads(found[0].text) == {"a": 1}:
                return form
    raise _refused(
        "a call would not be found where the chat template begins the answer, within reasoning for "
        "example"
    )


def _forms(field: dict[str, Any]) -> Iterator[Form]:
    for key in _KEYS:
        for opened, closed in _LISTS:
            before, after = _mark(field, "open"), _mark(field, "close")
            yield Form(before + opened, closed + after, key)


def _mark(field: dict[str, Any], side: str) -> str:
    """A text that a mark of a template matches; of a pattern without its spaces and groups."""
    given = field.get(side)
    if given is not None:
        return str(given if isinstance(given, str) else given[0])
    plain = re.sub(r"\\s[*+?]?|\(\?:|[()^$]|\\[nZz]", "", field.get(f"{side}_pattern", ""))
    return re.sub(r"\\(.)", r"\1", plain)


def rules(
    form: Form, tools: Sequence[dict[str, Any]], text: Text, special: Callable[[int], bool]
) -> str:
    """A grammar of one call, in the language of llguidance.

    Args:
        special: whether a token is none of the texts that llguidance knows. That is its own view:
            of added tokens, those that are marked so and those that are spelled `<...>`.
    """
    names = [f"call_{i}" for i in range(len(tools))]
    before, after = _literal(form.before, text, special), _literal("}" + form.after, text, special)
    lines = [f"start: {before} ({' | '.join(names)}) {after}"]
    for name, tool in zip(names, tools, strict=True):
        function = tool["function"]
        head = f'{{"name": {json.dumps(function["name"])}, "{form.key}": '
        schema = {**function["parameters"], "type": "object", "x-guidance": _SPACES}
        lines.append(f"{name}: {json.dumps(head)} {name}_arguments")
        lines.append(f"{name}_arguments: %json {json.dumps(schema)}")
    return "\n".join(lines)


def _literal(given: str, text: Text, special: Callable[[int], bool]) -> str:
    """A text in a grammar; special tokens, which are no text there, by their numbers."""
    parts: list[str] = []
    plain: list[int] = []

    def flush() -> None:
        if plain:
            parts.append(_quoted(text.backend.decode(plain, skip_special_tokens=False)))
            plain.clear()

    tokens = text.encode(given, special=False)
    if not any(map(special, tokens)):
        return _quoted(given)
    for token in tokens:
        if special(token):
            flush()
            parts.append(f"<[{token}]>")
        else:
            plain.append(token)
    flush()
    return " ".join(parts)


def _quoted(given: str) -> str:
    return json.dumps(given, ensure_ascii=False)


def _refused(why: str) -> ApiError:
    return ApiError(400, f"tool_choice: {why}; ask with auto.", "tool_choice", "unsupported_value")
