"""Reasoning, calls of tools, JSON of a schema, /v1/responses. The model's words are scripted."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from running import NAME, Running, chat_checkpoint, running
from tokenizers import AddedToken

from dropbydrop.serve import grammar
from dropbydrop.serve.replies import Part, Reply
from dropbydrop.serve.sampling import Sampler

# marks as the templates of Qwen3 have them
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}
CALL = '<tool_call>{"name": "depth", "arguments": {"sea": "north", "m": 2}}</tool_call>'
WORDS = f"<think>the sea</think>hello {CALL}"
TOOL = {
    "name": "depth",
    "description": "depth of a sea",
    "parameters": {"type": "object", "properties": {"sea": {"type": "string"}}},
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.arguments.sea }}]{% endfor %}{% endfor %}"
    "{% if tools %}{{ tools[0].function.name }}{% endif %}<assistant>"
)

Say = Callable[[str], None]


@pytest.fixture(scope="module")
def able(chat_folder: Path) -> Iterator[Running]:
    """A server whose model marks reasoning and calls."""
    with running(chat_folder) as made:
        text = made.service.text
        text.response_template, text.tokenizer.chat_template = TEMPLATE, CHAT_TEMPLATE
        made.service.served = replace(made.service.served, tools=True)
        yield made


@pytest.fixture
def say(able: Running, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Has the model write a text, whatever it is asked."""

    def scripted(words: str) -> None:
        tokens = [*able.service.text.encode(words, special=False), 2]

        def choose(self: Sampler, logits: torch.Tensor, allowed: Any = None) -> int:
            said = self.__dict__.setdefault("said", iter(tokens))
            return next(said)

        monkeypatch.setattr(Sampler, "__call__", choose)

    return scripted


def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=server.address + "/v1", api_key="none", max_retries=0,
        _strict_response_validation=True,
    )  # fmt: skip


def parts(words: str, size: int, template: Any = TEMPLATE) -> list[tuple[str, str, str]]:
    """(kind, name, text) of a text that comes in pieces, neighbours of a kind joined."""
    reply, found = Reply(template, "", None), []
    pieces = [words[i : i + size] for i in range(0, len(words), size)]
    for part in [*(p for piece in pieces for p in reply.feed(piece)), *reply.end()]:
        if found and part.kind != "call" and found[-1][0] == part.kind:
            found[-1] = (part.kind, "", found[-1][2] + part.text)
        else:
            found.append((part.kind, part.name, part.text))
    return found


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_parts_do_not_depend_on_the_pieces(size: int) -> None:
    arguments = '{"sea": "north", "m": 2}'
    assert parts(WORDS + CALL, size) == [
        ("reasoning", "", "the sea"),
        ("content", "", "hello"),
        ("call", "depth", arguments),
        ("call", "depth", arguments),
    ]
    assert parts(WORDS, size, None) == [("content", "", WORDS)]


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "broken",
    [
        '{"name": ',
        "7",
        '{"name": "x"}',
        '{"name": "x", "arguments": {"a": ' + "[" * 1100 + "]" * 1100 + "}}",
        r'{"name": "x", "arguments": {"a": "\ud83d"}}',
        r'{"name": "\ud83d", "arguments": {}}',
        '{"name": "x", "arguments": {"a": NaN}}',
        '{"name": "x", "arguments": {"a": 1e999}}',
    ],
    ids=range(8),
)
def test_what_is_no_call_is_content(size: int, broken: str) -> None:
    found = parts(f"hello <tool_call>{broken}</tool_call> and on", size)
    assert {kind for kind, _, _ in found} == {"content"}
    assert broken in "".join(text for _, _, text in found)
    assert "and on" in found[-1][2]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_broken_call_loses_nothing_before_it(size: int) -> None:
    """However the text comes: a whole answer is that of its stream."""
    found = parts(f"<think>the sea</think>hello {CALL}<tool_call>7</tool_call> and on", size)
    assert [kind for kind, _, _ in found] == ["reasoning", "content", "call", "content"]
    assert found[-1][2].strip() == "<tool_call>7</tool_call> and on"


def test_blanks_do_not_stop_the_world() -> None:
    """`\\s*<tool_call>` looks at every beginning of a run of blanks: minutes for 200,000."""
    words = "hello" + " " * 200_000 + "x"
    start = time.perf_counter()
    assert parts(words, 50_000) == [("content", "", words)]
    assert parts(words + CALL, len(words))[0] == ("content", "", words + CALL)
    assert [part.text for part in Reply(TEMPLATE, words, None).feed("x")] == ["x"]
    assert time.perf_counter() - start < 20


def test_chats_with_tools(able: Running, say: Say) -> None:
    say(WORDS)
    tools: Any = [{"type": "function", "function": TOOL}]
    asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "how deep"}]}
    whole = client(able).chat.completions.create(**asked, tools=tools)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "the sea"
    assert choice.message.content.strip() == "hello"
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == {"sea": "north", "m": 2}
    texts: dict[str, str] = {"content": "", "reasoning_content": ""}
    calls = []
    for chunk in client(able).chat.completions.create(**asked, tools=tools, stream=True):
        delta = chunk.choices[0].delta
        for name in texts:
            texts[name] += getattr(delta, name, None) or ""
        calls += delta.tool_calls or []
    assert texts["reasoning_content"] == "the sea"
    assert texts["content"].strip() == "hello"
    assert [(c.index, c.function.name) for c in calls] == [(0, "depth")]
    assert chunk.choices[0].finish_reason == "tool_calls"
    # and the next turn, with what the tool gave
    turn = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "90"}
    prompt = able.service.chat_tokens
    seen = []
    able.service.chat_tokens = lambda chat: seen.append(prompt(chat)[1]) or prompt(chat)
    say("ninety")
    messages = [*asked["messages"], turn, result]
    client(able).chat.completions.create(model=NAME, messages=messages, tools=tools)
    able.service.chat_tokens = prompt
    assert seen == ["<user>how deep<assistant>[north]<tool>90depth<assistant>"]


def test_responses(able: Running, say: Say) -> None:
    say(WORDS)
    asked: dict[str, Any] = {
        "model": f"{NAME}:2bit",
        "instructions": "be short",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "how deep"}]},
            {"type": "function_call", "call_id": "c1", "name": "depth", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "90"},
        ],
        "tools": [{"type": "function", "strict": False, **TOOL}],
        "metadata": {"a": "b"},
    }
    whole = client(able).responses.create(**asked)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output_text.strip() == "hello"
    assert whole.status == "completed"
    assert (whole.instructions, whole.metadata) == ("be short", {"a": "b"})
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    assert whole.dropbydrop["bits"] == 2
    events = list(client(able).responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last = events[-1].response
    assert [item.type for item in last.output] == [item.type for item in whole.output]
    opened = [event.item.id for event in events if event.type == "response.output_item.added"]
    closed = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert opened == closed == [item.id for item in last.output]


def test_responses_that_are_cut(able: Running, say: Say) -> None:
    say("the river runs past the old mill")
    cut = client(able).responses.create(model=NAME, input="hi", max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete"


def odd_tool(schema: Any) -> Any:
    parameters = {"type": "object", "properties": {"anyOf": {"type": "string"}, "a": schema}}
    return {"type": "function", "name": "x", "parameters": parameters}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [odd_tool({"anyOf": 5})]}, "tools[0].parameters"),
        (
            {"tools": [odd_tool({"items": {"properties": {"b": {"oneOf": True}}}})]},
            "tools[0].parameters",
        ),
        ({"metadata": {"a": [1]}}, "metadata"),
        ({"metadata": {str(i): "a" for i in range(17)}}, "metadata"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"n": 2}, "n"),
    ],
    ids=str,
)
def test_responses_refuse_by_name(able: Running, fields: dict[str, Any], param: str) -> None:
    answer = httpx2.post(able.address + "/v1/responses", json={"input": "hi", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


SCHEMA = {
    "type": "object",
    "properties": {"sea": {"enum": ["north", "south"]}, "deep": {"type": "boolean"}},
    "required": ["sea", "deep"],
    "additionalProperties": False,
}


ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


def test_json_of_a_schema(server: Running) -> None:
    """A random model writes valid JSON, at every temperature, in chats and responses."""
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "sea", "schema": SCHEMA}}
    for seed in range(4):
        answer = client(server).chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "the sea"}], seed=seed,
            response_format=form, max_tokens=200,
        )  # fmt: skip
        found = json.loads(answer.choices[0].message.content)
        assert found["sea"] in ("north", "south")
        assert isinstance(found["deep"], bool)
        assert answer.choices[0].finish_reason == "stop"
    form = {"type": "json_schema", "name": "s", "schema": SCHEMA}
    answer = client(server).responses.create(model=NAME, input="the sea", text={"format": form})
    assert set(json.loads(answer.output_text)) == {"sea", "deep"}


def test_schemas_that_cannot_be(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(schema: Any) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"messages": [{"role": "user", "content": "a"}], "response_format": form}
        answer = httpx2.post(server.address + "/v1/chat/completions", json=body, timeout=30)
        assert answer.status_code == 400
        return str(answer.json()["error"]["message"])

    pytest.importorskip("llguidance")
    assert "cannot be used" in refused({"type": "nonsense"})
    assert "response_format: llguidance cannot follow" in refused(ENDLESS)
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    assert "lacks the package llguidance" in refused(SCHEMA)


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {**TOOL, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "tide", "parameters": {
        "type": "object", "properties": {"at": {"$ref": "#/$defs/hour"}}, "required": ["at"],
        "$defs": {"hour": {"enum": [6, 18]}}, "additionalProperties": False}}},
]  # fmt: skip
TIDE = {"type": "function", "function": {"name": "tide"}}


def forced(server: Running, **fields: Any) -> httpx2.Response:
    asked = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "max_tokens": 200}
    url = server.address + "/v1/chat/completions"
    return httpx2.post(url, json={**asked, "tool_choice": "required", **fields}, timeout=60)


@pytest.mark.parametrize("choice", ["required", TIDE], ids=["required", "named"])
def test_calls_that_must_be_made(able: Running, choice: Any) -> None:
    """A random model calls, at every temperature: whole, as a stream, and in responses."""
    pytest.importorskip("llguidance")
    names = set()
    for seed in range(6):
        (chosen,) = forced(able, tool_choice=choice, seed=seed, temperature=2).json()["choices"]
        assert chosen["finish_reason"] == "tool_calls"
        assert chosen["message"]["content"] is None
        (call,) = chosen["message"]["tool_calls"]
        names.add(call["function"]["name"])
        found = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "tide":
            assert found["at"] in (6, 18)
        else:
            assert found["sea"] in ("north", "south")
    assert names == ({"tide"} if choice == TIDE else {"tide", "depth"})
    made: Any = client(able).chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "a"}], tools=TOOLS, tool_choice=choice,
        stream=True,
    )  # fmt: skip
    calls = [call for chunk in made for call in chunk.choices[0].delta.tool_calls or []]
    assert len(calls) == 1
    flat: Any = choice if choice == "required" else {"type": "function", "name": "tide"}
    tools: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    answer = client(able).responses.create(model=NAME, input="a", tools=tools, tool_choice=flat)
    assert [item.type for item in answer.output] == ["function_call"]
    assert answer.model_dump()["tool_choice"] == flat


# tokens of a tokenizer; of them, only the last pair is special to transformers
MARKS = ("<tool_call>", "</tool_call>", "[CALL]", "[/CALL]", "<c>", "</c>")


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose marks of calls are tokens that were added to the tokenizer."""
    pytest.importorskip("llguidance")
    added = [AddedToken(mark, special=mark in MARKS[-2:], normalized=False) for mark in MARKS]
    with running(chat_checkpoint(tmp_path_factory.mktemp("marked"), added)) as made:
        text = made.service.text
        text.tokenizer.chat_template = CHAT_TEMPLATE
        made.service.served = replace(made.service.served, tools=True)
        yield made


def marked_by(opened: str, closed: str) -> dict[str, Any]:
    """The template with other marks of calls."""
    marks = {"open": opened, "close": closed, "content": "json"}
    fields = {**TEMPLATE["fields"], "tool_calls": {**TEMPLATE["fields"]["tool_calls"], **marks}}
    fields["tool_calls"].pop("open_pattern")
    return {**TEMPLATE, "fields": fields}


# </s> ends the text, so that nobody sees it
@pytest.mark.parametrize("marks", [MARKS[:2], MARKS[2:4], MARKS[4:], ("<user>", "</s>")], ids=str)
def test_calls_between_added_tokens(marked: Running, marks: tuple[str, str]) -> None:
    """Calls are told from text, and whatever is no text to the grammar is drawn as one token."""
    marked.service.text.response_template = marked_by(*marks)
    for seed in range(3):
        answer = forced(marked, seed=seed, temperature=2, logprobs=True)
        (chosen,) = answer.json()["choices"]
        assert chosen["finish_reason"] == "tool_calls"
        assert chosen["message"]["content"] is None
        assert len(chosen["message"]["tool_calls"]) == 1
        tokens = [entry["token"] for entry in chosen["logprobs"]["content"]]
        if marks != MARKS[2:4]:  # which may be spelled by other tokens
            assert tokens[0] == marks[0]
            assert (tokens[-1] == marks[1]) == (marks[1] != "</s>")


def test_lists_of_calls(marked: Running) -> None:
    """A list, its arguments under another key, a pattern."""
    arguments = {"name": "{content.name}", "arguments": "{content.parameters}"}
    fields = {
        "tool_calls": {
            "open": ["<c>["],
            "close_pattern": r"\]\s*</c>",
            "content": "json",
            "transform": {"type": "function", "function": arguments},
        },
        "content": {"content": "text"},
    }
    marked.service.text.response_template = {**TEMPLATE, "fields": fields}
    (chosen,) = forced(marked, tool_choice=TIDE, logprobs=True).json()["choices"]
    (call,) = chosen["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["at"] in (6, 18)
    tokens = [entry["token"] for entry in chosen["logprobs"]["content"]]
    assert (tokens[0], tokens[-1]) == ("<c>", "</c>")


def test_calls_that_cannot_be_asked_for(able: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(what: str, param: str = "tool_choice", **fields: Any) -> None:
        answer = forced(able, **fields)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert what in error["message"]
        assert error["param"] == param

    refused("none is that function", tools=[])
    other = {"type": "function", "function": {"name": "wind"}}
    refused("none is that function", tool_choice=other)
    refused("is none of function", "tool_choice.type", tool_choice={"type": "allowed_tools"})
    refused("is none of auto, none, required", tool_choice="any")
    text = able.service.text
    with monkeypatch.context() as patch:  # a template that begins answers with reasoning
        patch.setattr(text.tokenizer, "chat_template", CHAT_TEMPLATE + "<think>")
        refused("within reasoning")
    with monkeypatch.context() as patch:
        calls = {**TEMPLATE["fields"]["tool_calls"], "content": "xml-inline"}
        fields = {**TEMPLATE["fields"], "tool_calls": calls}
        patch.setattr(text, "response_template", {**TEMPLATE, "fields": fields})
        refused("no JSON")
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "llguidance", None)
        refused("lacks the package llguidance")
    pytest.importorskip("llguidance")
    wrong = {"name": "x", "parameters": {"type": "object", "properties": {"a": {"type": "odd"}}}}
    refused("cannot be used", tools=[{"type": "function", "function": wrong}])
    for kind in ("string", "array", ["object", "null"], None):
        refused('of type "object"', "tools[1].function.parameters", tools=[TOOLS[0], typed(kind)])
        assert forced(able, tool_choice="auto", tools=[typed(kind)], max_tokens=1).is_success
    many = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]
    refused("at most 128", "tools", tools=many)
    assert forced(able, tools=many[:128], max_tokens=2).is_success
    refused("would cut", "stop", stop=["}"])


def typed(kind: Any) -> dict[str, Any]:
    """A tool whose arguments are of another type."""
    return {"type": "function", "function": {"name": "x", "parameters": {"type": kind}}}


def test_calls_that_llguidance_gives_up(
    able: Running, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """That is the client's, in few words, and the log does not tell the schema."""
    pytest.importorskip("llguidance")
    tool = {"type": "function", "function": {"name": "x", "parameters": ENDLESS}}
    answer = forced(able, tools=[tool])
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("tool_choice: llguidance cannot follow")
    assert len(message) < 500
    assert "required" not in capfd.readouterr().err + caplog.text
    with pytest.raises(RuntimeError, match="satisfy the grammar"):  # a fault of the server
        able.service.grammars.of_schema(SCHEMA).accept(50)


def endless(number: int) -> dict[str, Any]:
    """A schema that llguidance reads for ever; for 10^5 it takes a second."""
    return {"title": f"schema {number}", "type": "integer", "multipleOf": 99999989}


def shaped(server: Running, schema: dict[str, Any]) -> httpx2.Response:
    """An answer that must be of a schema."""
    kind = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    url = server.address + "/v1/chat/completions"
    return httpx2.post(url, json={**asked, "response_format": kind}, timeout=60)


def test_schemas_that_never_end(able: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for them but who comes with a new one; they are tried once."""
    pytest.importorskip("llguidance")
    assert shaped(able, SCHEMA).is_success
    monkeypatch.setattr(grammar, "_SECONDS", 2)
    monkeypatch.setattr(grammar, "_PATIENCE", 20)  # of a busy machine
    tool = {"name": "x", "parameters": {"type": "object", "properties": {"a": endless(0)}}}
    plain = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    with ThreadPoolExecutor(3) as pool:
        hostile = [
            pool.submit(forced, able, tools=[{"type": "function", "function": tool}]),
            pool.submit(shaped, able, endless(0)),
        ]
        assert httpx2.post(able.address + "/v1/chat/completions", json=plain).is_success
        assert shaped(able, SCHEMA).is_success
        assert not all(one.done() for one in hostile)
    answers = [one.result() for one in hostile]
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("tried again"))
    for answer in (*answers, shaped(able, endless(0))):
        assert answer.status_code == 400
        assert "has not read it after 2 seconds" in answer.json()["error"]["message"]


def test_too_many_new_schemas(able: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setattr(grammar, "MOST_WAITING", 2)
    monkeypatch.setattr(grammar, "_SECONDS", 2)
    monkeypatch.setattr(grammar, "_PATIENCE", 20)  # of a busy machine
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: shaped(able, endless(10 + i)), range(4)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [400, 400, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "5"


def test_a_server_that_ends_waits_for_no_schema(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    with ThreadPoolExecutor(3) as pool:
        with running(chat_checkpoint(tmp_path)) as server:
            waiting = [pool.submit(shaped, server, endless(20 + i)) for i in range(3)]
            while server.service.grammars._trial is None:
                time.sleep(0.01)
            start = time.perf_counter()
            server.service.stop()
            assert [one.result().status_code for one in waiting] == [503] * 3
        assert time.perf_counter() - start < 4


def test_a_schema_is_tried_once(able: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    tried, run = [], subprocess.Popen

    def count(*args: Any, **options: Any) -> Any:
        tried.append(args)
        return run(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", count)
    schema = {"type": "object", "properties": {"once": {"type": "integer"}}, "required": ["once"]}
    first, second = (able.service.grammars.of_schema(schema) for _ in range(2))
    assert len(tried) == 1
    size = able.service.served.vocabulary
    begin = first.allowed(size)
    first.accept(int(begin.nonzero()[0]))
    assert torch.equal(second.allowed(size), begin)  # a state of its own


MARKED = "x</tool_call>y"


@pytest.mark.parametrize(
    "schema",
    [{"const": MARKED}, {"enum": ["a", MARKED]}, {"pattern": MARKED, "type": "string"},
     {"$defs": {"b": {"const": [{"c": MARKED}]}}}, {"properties": {MARKED: {}}}],
    ids=str,
)  # fmt: skip
def test_schemas_with_the_closing_mark(able: Running, schema: Any) -> None:
    """A call of them could not be told from text. What is only described may hold it."""
    pytest.importorskip("llguidance")
    told = {"enum": [1], "description": MARKED, "title": MARKED}
    properties = {"a": schema, "b": told}
    parameters = {"type": "object", "properties": properties, "required": ["b"]}
    tool = {"type": "function", "function": {"name": "x", "parameters": parameters}}
    answer = forced(able, tools=[TOOLS[0], tool])
    assert answer.status_code == 400
    assert "holds the mark" in answer.json()["error"]["message"]
    properties["a"] = {"const": "x</tool_call y"}
    assert forced(able, tools=[TOOLS[0], tool], max_tokens=1).is_success


def lost(able: Running, say: Say) -> dict[str, Any]:
    """A request for a call; the model writes the closing mark into a text."""
    say('<tool_call>{"name": "x", "arguments": {"a": "y</tool_call>z"}}</tool_call>')
    properties = {"a": {"type": "string"}}
    parameters = {"properties": properties, "required": ["a"], "additionalProperties": False}
    return {"type": "function", "function": {"name": "x", "parameters": parameters}}


def test_calls_that_cannot_be_read(able: Running, say: Say) -> None:
    """An error by name, whole and as a stream, and no marks as content."""
    pytest.importorskip("llguidance")
    answer = forced(able, tools=[lost(able, say)])
    assert answer.status_code == 500
    assert "the mark that ends a call" in answer.json()["error"]["message"]
    answer = forced(able, tools=[lost(able, say)], stream=True)
    assert answer.is_success
    assert "the mark that ends a call" in answer.text
    assert "</tool_call>" not in answer.text
    flat = {"type": "function", **lost(able, say)["function"]}
    asked = {"input": "a", "tools": [flat], "tool_choice": "required"}
    url = able.address + "/v1/responses"
    assert httpx2.post(url, json=asked, timeout=60).status_code == 500
    lost(able, say)
    answer = httpx2.post(url, json={**asked, "stream": True}, timeout=60)
    assert "event: response.failed" in answer.text
    assert "</tool_call>" not in answer.text


def test_calls_that_are_cut(able: Running) -> None:
    """A cut is told, and what there is of the call is no content."""
    pytest.importorskip("llguidance")
    for most in (1, 4, 12):
        (chosen,) = forced(able, max_tokens=most).json()["choices"]
        assert chosen["finish_reason"] == "length"
        assert not chosen["message"]["content"]
        answer = forced(able, max_tokens=most, stream=True)
        assert '"finish_reason":"length"' in answer.text
        assert "tool_call" not in answer.text
    flat: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    made = client(able).responses.create(
        model=NAME, input="a", tools=flat, tool_choice="required", max_output_tokens=4
    )
    assert made.status == "incomplete"
    assert made.output == []


def test_a_part_has_a_key_of_its_own() -> None:
    assert Part("call").key != Part("call").key
