"""Calls that must be made (`tool_choice`): the form in which a model writes them, as a grammar.

The form is taken from the response template, which says by which marks calls are told from text:
an opening mark, JSON with a name and arguments, a closing mark. A template says how to read, not
how to write, so a call is put together and read back behind the very prompt; a form is used only if
that gives the call and nothing else. Calls that are no JSON (XML of some coders), and prompts that
have opened another part (reasoning), are refused by name.

The answer then begins with the opening mark and ends with the closing one: one call, of one of the
functions, whose arguments are of its schema. Templates end a call at the closing mark even within a
text of its arguments. Schemas that ask for such a text are refused. Free texts cannot be kept from
it by llguidance: a model that writes one gets an error (`answers.check_call`).
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
        ApiError: there is none of those that can be forced; a schema holds the closing mark.
    """
    field = (template or {}).get("fields", {}).get("tool_calls")
    if field is None or field.get("content") != "json":
        raise _refused("this model's calls are no JSON, so that none can be asked for")
    name = tools[0]["function"]["name"]

    def found(form: Form, arguments: dict[str, Any]) -> bool:
        """Whether a call is read as it is written."""
        call = json.dumps({"name": name, form.key: arguments}, ensure_ascii=False)
        reply = Reply(template, prompt, tools)
        parts = reply.feed(f"{form.before}{call}{form.after}") + reply.end()
        told = [part for part in parts if part.kind == "call" or part.text.strip()]
        if [(part.kind, part.name) for part in told] != [("call", name)]:
            return False
        with suppress(ValueError):
            return bool(json.loads(told[0].text) == arguments)
        return False

    form = next((form for form in _forms(field) if found(form, {"a": 1})), None)
    if form is None:
        raise _refused(
            "a call would not be found where the chat template begins the answer, within reasoning "
            "for example"
        )
    texts = [text for tool in tools for text in _texts(tool["function"]["parameters"])]
    if not found(form, {str(i): text for i, text in enumerate(texts)}):
        raise _refused("a name, value or pattern of a schema holds the mark that ends a call")
    return form


def _texts(schema: Any, value: bool = False) -> Iterator[str]:
    """Names, values and patterns of a schema, which its JSON may hold; `value`: it is one."""
    if isinstance(schema, str) and value:
        yield schema
    elif isinstance(schema, list):
        for item in schema:
            yield from _texts(item, value)
    elif isinstance(schema, dict):
        for name, item in schema.items():
            yield name
            yield from _texts(item, value or name in ("const", "enum", "pattern"))


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
