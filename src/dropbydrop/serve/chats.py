"""Chats in requests: messages, tools and the form of the answer, as chat templates take them.

Content is text: parts of other kinds are refused, as the models here read text only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .body import ApiError, Body
from .requests import MOST_TOP, Request, Served, read_request


@dataclass(frozen=True)
class Chat:
    """The part of a chat that a template reads, and what its answer must be.

    Attributes:
        schema: the JSON schema of the answer, if it has one.
        must: the tools one of which must be called; None leaves it to the model.
        told: fields of the request that come back in the answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    schema: dict[str, Any] | None = None
    must: list[dict[str, Any]] | None = None
    told: dict[str, Any] = field(default_factory=dict)


def read_chat(body: Body, served: Served) -> tuple[Request, Chat]:
    """A body of /v1/chat/completions."""
    request = read_request(body, served)
    scored = body.flag("logprobs")
    top = body.integer("top_logprobs", 0, 0, MOST_TOP)
    if top and not scored:
        raise body.error("top_logprobs", "only a request with logprobs can have them")
    old = body.integer("max_tokens", None, 1, served.context)
    most = body.integer("max_completion_tokens", old, 1, served.context)
    messages = read_messages(body.list("messages"), "messages")
    schema = read_format(body.object("response_format"), "response_format")
    tools, must = read_tools(body, served, flat=False)
    if schema is not None and tools:
        raise body.error("response_format", "cannot be had together with tools")
    body.only("modalities", ["text"])
    body.only("function_call", "none")
    body.only("functions", [])
    body.done()
    request = replace(request, top=top if scored else None, most=most)
    return request, Chat(messages, tools, schema, must)


Tools = list[dict[str, Any]] | None
_MOST_CHOSEN = 128  # functions that a call may be forced from; llguidance holds them all at once


def read_tools(body: Body, served: Served, flat: bool) -> tuple[Tools, Tools]:
    """Tools as chat templates take them, and those one of which must be called; or None.

    Args:
        flat: as /v1/responses has them, the function's fields in the tool itself.

    Raises:
        ApiError: tools for a model whose calls could not be told from text; a call that must be
            made of a function that is none of them, whose arguments are no object, or that a stop
            text would cut.
    """
    given = body.list("tools") or []
    chosen = _tool_choice(body, flat)
    body.only("parallel_tool_calls", True)
    tools = [_tool(tool, f"tools[{i}].", flat) for i, tool in enumerate(given)]
    must = [t for t in tools if chosen == "required" or chosen == ("", t["function"]["name"])]
    if not must and chosen not in ("auto", "none"):
        raise body.error("tool_choice", "there is no tool, or none is that function")
    if not tools or chosen == "none":
        return None, None
    if must and body.take("stop"):
        raise body.error(
            "stop", "would cut a call that must be made; leave it away, or tool_choice"
        )
    if len(must) > _MOST_CHOSEN:
        raise body.error("tools", f"a call can be required of at most {_MOST_CHOSEN} functions")
    for tool in must:
        if tool["function"]["parameters"].get("type", "object") != "object":
            name = f"tools[{tools.index(tool)}].{'' if flat else 'function.'}parameters"
            raise body.error(name, 'a call that must be made has arguments of type "object"')
    if not served.tools:
        raise body.error(
            "tools",
            "this model has no response template, by which calls are told from text",
            "unsupported_value",
        )
    return tools, must or None


def _tool_choice(body: Body, flat: bool) -> str | tuple[str, str]:
    """A word, or ("", name) of one function."""
    if not isinstance(body.take("tool_choice"), dict):
        return body.choice("tool_choice", "auto", ("auto", "none", "required"))
    named = Body(body.object("tool_choice") or {}, "tool_choice.")
    named.choice("type", "", ("function",))
    function = named if flat else Body(named.object("function") or {}, "tool_choice.function.")
    name = function.text("name", "")
    function.done()
    named.done()
    return "", name


def _tool(given: Any, where: str, flat: bool) -> dict[str, Any]:
    tool = Body(given if isinstance(given, dict) else {}, where)
    tool.choice("type", "", ("function",))
    function = tool if flat else Body(tool.object("function") or {}, f"{where}function.")
    name = function.text("name", "")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise function.error("name", "give 1 to 64 letters, digits, - or _")
    made = {
        "name": name,
        "description": function.text("description", ""),
        "parameters": function.object("parameters") or {"type": "object", "properties": {}},
    }
    if not _sound(made["parameters"]):
        raise function.error("parameters", "anyOf, oneOf and allOf are lists")
    function.only("strict", False)
    function.done()
    tool.done()
    return {"type": "function", "function": made}


def _sound(schema: Any) -> bool:
    """Whether the choices in a schema are lists; transformers' parser of calls fails on others."""
    if not isinstance(schema, dict):
        return True
    choices = [schema[key] for key in ("anyOf", "oneOf", "allOf") if key in schema]
    inner, items = schema.get("properties"), schema.get("items")
    return all(isinstance(choice, list) and all(map(_sound, choice)) for choice in choices) and all(
        map(_sound, [*(inner.values() if isinstance(inner, dict) else ()), items])
    )


def read_format(given: dict[str, Any] | None, where: str) -> dict[str, Any] | None:
    """The JSON schema that an answer must have, or None for any text."""
    body = Body(given or {}, f"{where}.")
    kind = body.choice("type", "text", ("text", "json_object", "json_schema"))
    schema: dict[str, Any] | None = None if kind == "text" else {"type": "object"}
    if kind == "json_schema":
        nested = body.object("json_schema")
        inner = body if nested is None else Body(nested, f"{where}.json_schema.")
        inner.text("name")
        inner.text("description")
        inner.flag("strict")
        schema = inner.object("schema")
        if schema is None:
            raise inner.error("schema", "is missing")
        inner.done()
    body.done()
    return schema


_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(given: Sequence[Any] | None, where: str) -> list[dict[str, Any]]:
    """Messages as templates take them: `content` is one text."""
    if not given:
        raise ApiError(400, f"{where}: give at least one message.", where)
    return [_message(message, f"{where}[{i}].") for i, message in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ApiError(400, f"{where[:-1]}: a message is an object.", where[:-1])
    body = Body(given, where)
    role = body.choice("role", "", _ROLES)
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    content = body.take("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}content[{i}].") for i, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        raise body.error("content", "give a text, or a list of parts of type text")
    if content is None and role != "assistant":
        raise body.error("content", "is missing")
    message["content"] = content or ""
    if name := body.text("name"):
        message["name"] = name
    if role == "tool":
        message["tool_call_id"] = body.text("tool_call_id", "")
    if role == "assistant":
        body.only("refusal")
        body.only("function_call")
        body.only("audio")
        body.tags("annotations")
        if calls := body.list("tool_calls"):
            message["tool_calls"] = [
                _called(call, f"{where}tool_calls[{i}].") for i, call in enumerate(calls)
            ]
        if reasoning := body.text("reasoning_content"):
            message["reasoning_content"] = reasoning
    body.done()
    return message


def _called(given: Any, where: str) -> dict[str, Any]:
    """A call that the model has made, with its arguments as templates take them: an object."""
    body = Body(given if isinstance(given, dict) else {}, where)
    body.choice("type", "function", ("function",))
    key, inner = body.text("id", ""), Body(body.object("function") or {}, f"{where}function.")
    body.tags("index")
    body.done()
    name, text = inner.text("name", ""), inner.text("arguments", "{}")
    inner.done()
    return function_call(key, name, text)


def function_call(key: str, name: str, arguments: str) -> dict[str, Any]:
    """A call in a message for a template; arguments that are no JSON stay a text."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = arguments
    return {"id": key, "type": "function", "function": {"name": name, "arguments": value}}


def _part(given: Any, where: str) -> str:
    """The text of a part of a message."""
    body = Body(given if isinstance(given, dict) else {}, where)
    kind = body.text("type", "")
    if kind not in ("text", "input_text", "output_text"):
        raise body.error("type", f"{kind!r:.40} is not supported: this model reads text")
    text = body.text("text", "")
    body.tags("annotations", "logprobs", "cache_control")
    body.done()
    return str(text)
