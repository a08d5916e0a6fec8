"""/v1/responses: another form of the same chats, with items instead of messages and typed events.

A reply is a list of items (message, reasoning, function_call). As it comes, each item is announced,
grows, and is closed; every event has a number, and the last one carries the whole response. Nothing
is stored: a request that needs an earlier response, or wants to be stored, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from .answers import Choice, Form, Head, check_call, timings
from .body import ApiError, Body
from .chats import Chat, function_call, read_format, read_messages, read_tools
from .job import Event, Finished, Generated, Prompted
from .replies import Part
from .requests import Request, Served, read_request
from .text import Text


def read_response(body: Body, served: Served) -> tuple[Request, Chat]:
    """A body of /v1/responses."""
    request = read_request(body, served)
    if request.n != 1 or request.usage:
        raise body.error("n" if request.n != 1 else "stream_options", "is not supported here")
    most = body.integer("max_output_tokens", None, 1, served.context)
    given = body.take("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items:
        raise body.error("input", "give a text, or a list of items")
    messages = [_message(item, f"input[{i}]") for i, item in enumerate(items)]
    if instructions := body.text("instructions"):
        messages.insert(0, {"role": "system", "content": instructions})
    form = Body(body.object("text") or {}, "text.")
    schema = read_format(form.object("format"), "text.format")
    form.done()
    choice = body.take("tool_choice", "auto")
    tools, must = read_tools(body, served, flat=True)
    if schema is not None and tools:
        raise body.error("text", "a format cannot be had together with tools")
    body.only("truncation", "disabled")
    body.only("include", [])
    body.only("background", False)
    body.only("reasoning", {})
    body.only("top_logprobs", 0)
    body.done()
    told = {
        "instructions": instructions,
        "metadata": body.labels("metadata"),
        "tool_choice": choice,
        "tools": [
            {"type": "function", "strict": False, **tool["function"]} for tool in tools or []
        ],
    }
    return replace(request, most=most), Chat(messages, tools, schema, must, told)


def _message(given: Any, where: str) -> dict[str, Any]:
    """An item as a message for the chat template."""
    body = Body(given if isinstance(given, dict) else {}, f"{where}.")
    kinds = ("message", "function_call", "function_call_output")
    kind = body.choice("type", "message", kinds)
    body.tags("id", "status")
    if kind == "message":
        fields = {name: body.take(name) for name in ("role", "content")}
        body.done()
        return read_messages([fields], where)[0]
    key = body.text("call_id", "")
    if kind == "function_call_output":
        message = {"role": "tool", "content": body.text("output", ""), "tool_call_id": key}
    else:
        call = function_call(key, body.text("name", ""), body.text("arguments", "{}"))
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
    body.done()
    return message


class ResponseForm(Form):
    """A response object, whole or as events."""

    done = False

    def __init__(self, head: Head, text: Text) -> None:
        super().__init__(head, text)
        self._number = 0
        self._items: list[dict[str, Any]] = []
        self._reply = head.reply()
        self._kind = ""  # of the item that grows

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        return [{**found, "sequence_number": self._next()} for found in self._events(event)]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        response = self._response("failed", None)
        response["error"] = {"code": "server_error", "message": error.message}
        return [{"type": "response.failed", "response": response, "sequence_number": self._next()}]

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        (choice,) = choices
        assert choice.end is not None
        for part in [*self._reply.feed(choice.text), *self._reply.end()]:
            list(self._grow(part))
        list(self._close())
        return self._ended(choice.end)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _events(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Prompted):
            for name in ("created", "in_progress"):
                yield {"type": f"response.{name}", "response": self._response("in_progress", None)}
        elif isinstance(event, Generated | Finished):
            parts = self._reply.feed(event.text)
            parts += self._reply.end() if isinstance(event, Finished) else []
            for part in parts:
                for found in self._grow(part):
                    yield {**found, "dropbydrop": {"bits": event.bits}}
        if isinstance(event, Finished):
            yield from self._close()
            response = self._ended(event)
            yield {"type": f"response.{response['status']}", "response": response}

    def _grow(self, part: Part) -> Iterator[dict[str, Any]]:
        """The events of a part; begins a new item where the kind changes."""
        if part.kind != self._kind or part.kind == "call":
            yield from self._close()
            yield from self._open(part)
        item, place = self._items[-1], self._place()
        if part.kind == "call":
            item["arguments"] += part.text
            name = "response.function_call_arguments.delta"
        else:
            item["content"][0]["text"] += part.text
            place["content_index"] = 0
            name = f"response.{item['content'][0]['type']}.delta"
            if part.kind == "content":
                place["logprobs"] = []
        yield {"type": name, "delta": part.text, **place}

    def _open(self, part: Part) -> Iterator[dict[str, Any]]:
        self._kind = part.kind
        item: dict[str, Any] = {"status": "in_progress"}
        key = f"{self.head.key}_{len(self._items)}"
        if part.kind == "call":
            call = {"call_id": part.key, "name": part.name, "arguments": ""}
            item |= {"type": "function_call", "id": f"fc_{key}", **call}
        elif part.kind == "reasoning":
            item |= {"type": "reasoning", "id": f"rs_{key}", "summary": [], "content": []}
        else:
            item |= {"type": "message", "id": f"msg_{key}", "role": "assistant", "content": []}
        self._items.append(item)
        added = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": len(self._items) - 1,
               "item": added}  # fmt: skip
        if part.kind != "call":
            empty: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            if part.kind == "content":
                empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"] = [empty]
            yield {"type": "response.content_part.added", "content_index": 0, "part": dict(empty),
                   **self._place()}  # fmt: skip

    def _close(self) -> Iterator[dict[str, Any]]:
        """The events that end the item that grows, if there is one."""
        if not self._kind:
            return
        item, place = self._items[-1], self._place()
        item["status"] = "completed"
        if self._kind == "call":
            yield {"type": "response.function_call_arguments.done", "name": item["name"],
                   "arguments": item["arguments"], **place}  # fmt: skip
        else:
            part = item["content"][0]
            done = {"type": f"response.{part['type']}.done", "text": part["text"]}
            scores: dict[str, Any] = {"logprobs": []} if self._kind == "content" else {}
            yield {**done, "content_index": 0, **scores, **place}
            yield {"type": "response.content_part.done", "content_index": 0, "part": dict(part),
                   **place}  # fmt: skip
        self._kind = ""
        yield {"type": "response.output_item.done", "output_index": place["output_index"],
               "item": item}  # fmt: skip

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _ended(self, end: Finished) -> dict[str, Any]:
        check_call(end, self._reply)
        cut = end.reason == "length"
        if cut and self._items:
            self._items[-1]["status"] = "incomplete"
        response = self._response("incomplete" if cut else "completed", end)
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return response

    def _reasoned(self) -> int:
        """Tokens of the reasoning, as it would be cut by itself."""
        items = [item for item in self._items if item["type"] == "reasoning"]
        texts = [part["text"] for item in items for part in item["content"]]
        return sum(len(self.text.encode(text, special=False)) for text in texts)

    def _response(self, status: str, end: Finished | None) -> dict[str, Any]:
        asked = self.head.request
        response: dict[str, Any] = {
            "id": f"resp_{self.head.key}",
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": asked.model,
            "output": list(self._items),
            "parallel_tool_calls": True,
            "temperature": asked.sampling.temperature,
            "top_p": asked.sampling.top_p,
            "max_output_tokens": asked.most,
            "service_tier": asked.tier,
            "store": False,
            "usage": None,
            **self.head.told,
        }
        if end is not None:
            usage = self.head.usage([end])
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._reasoned()},
                "total_tokens": usage["total_tokens"],
            }
            response |= {"dropbydrop": self.head.precision(end), "timings": timings([end])}
        return response
