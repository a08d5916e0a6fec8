"""The protocol: a strict client, requests as clients send them, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import openai
import pytest
from running import NAME, Running, running

from dropbydrop.serve.answers import _Offsets
from dropbydrop.serve.text import Text

CHAT = [{"role": "user", "content": "the old mill"}]


def client(server: Running, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=server.address + "/v1", api_key="none", max_retries=0, timeout=60,
        _strict_response_validation=True, **more,
    )  # fmt: skip


def post(server: Running, path: str, body: Any, **more: Any) -> httpx2.Response:
    return httpx2.post(server.address + path, json=body, timeout=60, **more)


def lines(text: str) -> list[Any]:
    """The events of a stream; [DONE] must be the last."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


# ---- a strict client ------------------------------------------------------------------------


def test_models(server: Running) -> None:
    found = {model.id: model for model in client(server).models.list()}
    assert list(found) == [NAME, *(f"{NAME}:{p}bit" for p in (2, 3, 4)), f"{NAME}:auto"]
    sizes = [found[f"{NAME}:{p}bit"].dropbydrop["bytes_per_token"] for p in (2, 3, 4)]
    assert sizes == sorted(set(sizes))
    assert found[NAME].dropbydrop == found[f"{NAME}:4bit"].dropbydrop
    assert client(server).models.retrieve(f"{NAME}:2bit").id == f"{NAME}:2bit"
    with pytest.raises(openai.NotFoundError):
        client(server).models.retrieve("other")


def test_chat_whole_and_streamed_are_one_text(server: Running) -> None:
    asked: dict[str, Any] = {
        "model": f"{NAME}:3bit", "messages": CHAT, "max_completion_tokens": 12, "seed": 3,
        "logprobs": True, "top_logprobs": 2, "n": 2,
    }  # fmt: skip
    whole = client(server).chat.completions.create(**asked)
    assert whole.model == f"{NAME}:3bit"
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    texts, reasons, scores = ["", ""], ["", ""], [[], []]
    chunks = list(
        client(server).chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        scores[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert [choice.message.content for choice in whole.choices] == texts
    assert [choice.finish_reason for choice in whole.choices] == reasons
    assert [choice.logprobs.content for choice in whole.choices] == scores
    assert all(len(score.top_logprobs) == 2 for score in scores[0])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert {chunk.dropbydrop["bits"] for chunk in chunks} == {3}


def test_completions_with_the_strict_client(server: Running) -> None:
    asked: dict[str, Any] = {
        "model": NAME, "prompt": ["the sea", "the old"], "n": 2, "max_tokens": 9, "seed": 1,
    }  # fmt: skip
    whole = client(server).completions.create(**asked, logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    # a chunk of OpenAI's own has no finish_reason before the end, which its strict client refuses
    lenient = openai.OpenAI(base_url=server.address + "/v1", api_key="none")
    for chunk in lenient.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    logprobs = whole.choices[0].logprobs
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0


def test_offsets_in_texts_whose_characters_are_several_tokens(server: Running) -> None:
    """Those of a stream are those of the whole, and lie in the text."""
    body = {"prompt": "é日本 the", "echo": True, "logprobs": 0, "max_tokens": 9, "temperature": 0}
    url = server.address + "/v1/completions"
    (whole,) = httpx2.post(url, json=body).json()["choices"]
    lines = httpx2.post(url, json={**body, "stream": True}).text.split("\n")
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    scored = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    for name in ("tokens", "text_offset"):
        assert [x for one in scored for x in one[name]] == whole["logprobs"][name]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    offsets, names = whole["logprobs"]["text_offset"], whole["logprobs"]["tokens"]
    assert offsets == sorted(offsets)
    assert offsets[-1] <= len(whole["text"])
    begun = offsets[names.index(" the")]
    assert whole["text"][begun : begun + 4] == " the"


def test_offsets_behind_characters_that_nothing_ends() -> None:
    """A broken character is one U+FFFD, and what follows it begins after that."""
    pieces = [b"a", b"\xe2\x82", b"b", b"\xe2", b"\x82", b"\xac", b"c", b"\xf0\x9f"]
    pieces += ["\u20ac".encode(), b"z"]
    known = SimpleNamespace(special=set(), bytes_of=pieces.__getitem__)
    offsets = _Offsets(cast(Text, known))
    text = b"".join(pieces).decode("utf-8", "replace")
    found = [offsets.next(token) for token in range(len(pieces))]
    assert [text[i] for i in found] == list("a\ufffdb\u20ac\u20ac\u20acc\ufffd\u20acz")


def test_the_asynchronous_client(server: Running) -> None:
    """Chat, completions and responses, whole and streamed, validated strictly."""

    async def run() -> list[tuple[str, str]]:
        asynchronous = openai.AsyncOpenAI(
            base_url=server.address + "/v1", api_key="none", _strict_response_validation=True
        )
        asked: dict[str, Any] = {"model": NAME, "messages": CHAT, "max_tokens": 8, "temperature": 0}
        chats = asynchronous.chat.completions
        chat = (await chats.create(**asked)).choices[0].message.content or ""
        stream = await chats.create(**asked, stream=True)
        chunks = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        asked = {"model": NAME, "prompt": "the old mill", "max_tokens": 8, "temperature": 0}
        text = (await asynchronous.completions.create(**asked)).choices[0].text
        # a chunk of a text has no finish_reason before the end, which the strict client refuses
        lenient = openai.AsyncOpenAI(base_url=server.address + "/v1", api_key="none")
        texts = await lenient.completions.create(**asked, stream=True)
        pieces = "".join([chunk.choices[0].text async for chunk in texts])
        asked = {"model": NAME, "input": CHAT, "max_output_tokens": 8, "temperature": 0}
        answer = (await asynchronous.responses.create(**asked)).output_text
        events = await asynchronous.responses.create(**asked, stream=True)
        deltas = [e.delta async for e in events if e.type == "response.output_text.delta"]
        await lenient.close()
        await asynchronous.close()
        return [(chat, chunks), (text, pieces), (answer, "".join(deltas))]

    for whole, streamed in asyncio.run(run()):
        assert whole == streamed != ""


def test_errors_reach_the_client_as_such(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature: 3 is not between 0 and 2"):
        client(server).chat.completions.create(model=NAME, messages=CHAT, temperature=3)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-x'"):
        client(server).chat.completions.create(model="gpt-x", messages=CHAT)


# ---- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "bits", "asked"),
    [
        ({}, 4, None),
        ({"model": f"{NAME}:2bit"}, 2, 2),
        ({"model": f"{NAME}:auto"}, 4, "auto"),
        ({"bits": 3}, 3, 3),
        ({"bits": 3.0}, 3, 3),
        ({"bits": "auto", "service_tier": "priority"}, 4, "auto"),
        ({"model": f"{NAME}:2bit", "bits": 2, "service_tier": "flex"}, 2, 2),
    ],
)
def test_ways_to_ask_for_a_precision(
    server: Running, fields: dict[str, Any], bits: int, asked: Any
) -> None:
    answer = post(server, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, **fields})
    found = answer.json()["dropbydrop"]
    assert (found["bits"], found["asked"]) == (bits, asked)
    assert found["switches"] == [[0, bits]]
    assert found["bytes_per_token"] == server.engine.precisions.bytes_of(bits)
    assert answer.headers["x-dropbydrop-bits"] == str(bits)


@pytest.mark.parametrize(
    "fields",
    [{"bits": 5}, {"bits": "two"}, {"bits": True}, {"model": f"{NAME}:2bit", "bits": 3}],
    ids=str,
)
def test_precisions_that_there_are_not(server: Running, fields: dict[str, Any]) -> None:
    answer = post(server, "/v1/completions", {"prompt": "the", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "bits"


# ---- requests as clients send them -----------------------------------------------------------

OPEN_WEBUI = {  # 0.12, with its usage switch on
    "stream": True,
    "model": f"{NAME}:auto",
    "messages": [
        {"role": "system", "content": "the river"},
        {"role": "user", "content": [{"type": "text", "text": "the sea"}]},
        {"role": "assistant", "content": "a ship"},
        {"role": "user", "content": "the mill"},
    ],
    "stream_options": {"include_usage": True},
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 8,
    "stop": ["zzz"],
    "seed": 7,
    "frequency_penalty": 0.1,
    "bits": "auto",
}
LANGCHAIN = {  # langchain-openai 1.7: null for what is not set
    "model": NAME,
    "messages": [{"role": "user", "content": "the sea", "name": "ann"}],
    "max_completion_tokens": 8,
    "stream": False,
    "n": 1,
    "temperature": 0.2,
    "stop": None,
    "logit_bias": {"7": -100},
    "user": "u1",
    "parallel_tool_calls": True,
    "presence_penalty": 0.5,
}
LM_EVAL = {  # local-completions, log-likelihoods
    "model": NAME,
    "prompt": [[17, 20, 25, 30], [18, 40, 41]],
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": 1,
    "seed": 1234,
    "echo": True,
}


def test_open_webui(server: Running) -> None:
    answer = post(server, "/v1/chat/completions", OPEN_WEBUI)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = lines(answer.text)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    last = events[-2]
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    assert last["timings"]["predicted_n"] == last["timings"]["predicted_n"] > 0
    assert {"prompt_n", "prompt_ms", "prompt_per_second", "predicted_ms", "cache_n"} <= (
        last["timings"].keys()
    )
    assert events[-1]["usage"]["completion_tokens"] == last["timings"]["predicted_n"]


def test_langchain(server: Running) -> None:
    answer = post(server, "/v1/chat/completions", LANGCHAIN)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_lm_eval(server: Running) -> None:
    """As its `local-completions` reads an answer."""
    answer = post(server, "/v1/completions", LM_EVAL).json()
    for choice, prompt in zip(answer["choices"], LM_EVAL["prompt"], strict=True):  # type: ignore[call-overload]
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(prompt) + 1
        for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert token in top  # the chosen one too, where it is not the likeliest
            assert max(top, key=top.get) in logprobs["tokens"] + list(top)
        assert choice["text"].startswith(server.service.text.decode(prompt))


def test_stop_texts(server: Running) -> None:
    body = {"prompt": "the", "temperature": 0, "max_tokens": 30, "ignore_eos": True, "bits": 4}
    full = post(server, "/v1/completions", body).json()["choices"][0]["text"]
    stop = full[5:8]
    cut = post(server, "/v1/completions", {**body, "stop": stop}).json()["choices"][0]
    assert cut["text"] == full[: full.index(stop)]
    assert cut["finish_reason"] == "stop"
    events = lines(post(server, "/v1/completions", {**body, "stop": [stop], "stream": True}).text)
    assert "".join(event["choices"][0]["text"] for event in events) == cut["text"]


def test_tokens_and_back(server: Running) -> None:
    ids = post(server, "/tokenize", {"content": "the old mill"}).json()["tokens"]
    assert post(server, "/detokenize", {"tokens": ids}).json() == {"content": "the old mill"}
    assert post(server, "/detokenize", {"tokens": [-1]}).status_code == 400
    assert post(server, "/tokenize", {"text": "a"}).status_code == 400


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"frobnicate": 1}, "frobnicate"),
        ("chat/completions", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("chat/completions", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("chat/completions", {"response_format": {"type": "xml"}}, "response_format.type"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": [{"role": "boss"}]}, "messages[0].role"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"n": 0}, "n"),
        ("chat/completions", {"n": True}, "n"),
        ("chat/completions", {"temperature": "hot"}, "temperature"),
        ("chat/completions", {"stop": [""]}, "stop"),
        ("chat/completions", {"logit_bias": {"100000": 1}}, "logit_bias"),
        ("chat/completions", {"max_tokens": 10_000}, "max_tokens"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [1, 99_999]}, "prompt"),
        ("completions", {"prompt": ["a", 3]}, "prompt"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"best_of": 3}, "best_of"),
        ("completions", {"prompt": "the " * 400}, "prompt"),
        ("completions", {"max_tokens": 256}, "max_tokens"),
    ],
    ids=lambda x: json.dumps(x)[:60] if isinstance(x, dict) else "",
)
def test_refused_by_name(server: Running, path: str, fields: dict[str, Any], param: str) -> None:
    base: dict[str, Any] = {"messages": CHAT} if "chat" in path else {"prompt": "the"}
    answer = post(server, f"/v1/{path}", {**base, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"]


def test_a_template_that_refuses(chat_folder: Path) -> None:
    with running(chat_folder) as server:
        server.service.text.tokenizer.chat_template = "{{ raise_exception('no roles') }}"
        answer = post(server, "/v1/chat/completions", {"messages": CHAT})
        assert answer.status_code == 400
        assert "no roles" in answer.json()["error"]["message"]
        server.service.text.template = None
        answer = post(server, "/v1/chat/completions", {"messages": CHAT})
        assert "no chat template" in answer.json()["error"]["message"]


# ---- what tells about the server -------------------------------------------------------------


def test_status_and_metrics(server: Running) -> None:
    post(server, "/v1/completions", {"prompt": "the", "max_tokens": 3, "ignore_eos": True})
    status = httpx2.get(server.address + "/status.json").json()
    assert status["model"] == NAME
    assert [level["id"] for level in status["levels"]] == [f"{NAME}:{p}bit" for p in (2, 3, 4)]
    assert all(level["seconds_per_token"] > 0 for level in status["levels"])
    assert status["level"] == 4
    text = httpx2.get(server.address + "/metrics").text
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(samples["dropbydrop_tokens_total"]) >= 3
    assert float(samples['dropbydrop_bytes_per_token{bits="2"}']) > 0
    assert httpx2.get(server.address + "/health").json() == {"status": "ok"}
