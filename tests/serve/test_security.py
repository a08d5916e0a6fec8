"""Keys, hosts, limits, and clients that misbehave: clear answers, and nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from running import Running, running
from transformers import StaticCache

from dropbydrop.models.chat_template import in_chat_template
from dropbydrop.serve import app as routes
from dropbydrop.serve import server as process
from dropbydrop.serve import service as services
from dropbydrop.serve.body import ApiError, _count_values, parse_json
from dropbydrop.serve.conversation import Conversation
from dropbydrop.serve.sampling import Sampling
from dropbydrop.serve.service import Service
from dropbydrop.system.errors import DropError
from serve.misuse import connect, http, misbehave, raw
from tiny import VOCAB, tiny_model, write_checkpoint

KEY = "s3cret-ключ à"  # its last byte is a space in Latin-1


@pytest.fixture(scope="module")
def closed(chat_folder: Path) -> Iterator[Running]:
    """A server with a key."""
    with running(chat_folder, api_key=KEY) as made:
        yield made


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()


def test_the_key(closed: Running) -> None:
    url = closed.address + "/v1/models"
    bearer = f"Bearer {KEY}".encode()
    assert httpx2.get(url, headers={"authorization": bearer}).status_code == 200
    basic = b"Basic " + KEY.encode()
    for wrong in (None, b"", b"Bearer", b"Bearer x", bearer[:-1], bearer + b"x", basic):
        headers = {} if wrong is None else {"authorization": wrong}
        answer = httpx2.get(url, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/status.json", "/metrics", "/v1/completions", "/tokenize", "/nowhere"):
        assert httpx2.get(closed.address + path).status_code == 401
    assert httpx2.get(closed.address + "/health").status_code == 200
    assert httpx2.get(closed.address + "/").status_code == 200


def test_a_key_that_is_no_text(chat_folder: Path) -> None:
    """Bytes of an environment variable, as Python gives them."""
    with running(chat_folder, api_key=os.fsdecode(b"k\xff")) as server:
        url = server.address + "/v1/models"
        for given, code in ((b"Bearer k\xff", 200), (b"Bearer k", 401)):
            assert httpx2.get(url, headers={"authorization": given}).status_code == code


def test_names_of_other_machines_are_refused(server: Running, closed: Running) -> None:
    evil = {"host": "evil.example:8000"}
    assert httpx2.get(server.address + "/v1/models", headers=evil).status_code == 403
    assert httpx2.get(server.address + "/v1/models").status_code == 200
    # with a key, the key decides
    assert httpx2.get(closed.address + "/v1/models", headers=evil).status_code == 401


def test_other_web_sites_are_kept_out(server: Running) -> None:
    answer = httpx2.post(server.address + "/v1/completions", content=b'{"prompt": "a"}')
    assert answer.status_code == 415
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    preflight = httpx2.options(server.address + "/v1/completions", headers=asked)
    assert preflight.status_code == 405
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    assert "default-src 'self'" in preflight.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd"]
)
def test_no_file_but_those_of_the_page(server: Running, path: str) -> None:
    found = raw(server.address, get(path))
    assert b" 404 " in found.splitlines()[0]
    assert b"Starlette" not in found


def test_texts_beyond_any_context_are_not_cut_into_tokens(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = server.service.text
    most = 4 * max(map(len, text.backend.get_vocab())) * server.service.served.context
    monkeypatch.setattr(type(text), "encode", lambda *args, **options: pytest.fail("encoded"))
    long = "a " * (most // 2 + 1)
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("/tokenize", {"content": long}),
    ):
        answer = httpx2.post(server.address + path, json=body, timeout=60)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "bits": ' + b"9" * 400 + b"}",
        b'{"prompt": "a", "bits": -' + b"9" * 400 + b"}",
        b'{"prompt": "a", "bits": 1e999}',
        b'{"prompt": "a", "logit_bias": {"' + b"9" * 5000 + b'": 1}}',
        b'{"prompt": "a", "bits": ' + b"[" * 960 + b"]" * 960 + b"}",  # Python reads this
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 101 + b"1" + b"}" * 102,
        b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",  # unknown
    ],
    ids=range(17),
)
def test_bad_bodies(server: Running, body: bytes) -> None:
    found = raw(server.address, http(body))
    head, _, rest = found.partition(b"\r\n\r\n")
    assert b" 400 " in head.splitlines()[0], found[:300]
    assert json.loads(rest)["error"]["message"]


def test_a_lone_surrogate_is_answered(server: Running) -> None:
    """JSON can name half of a character, which UTF-8 cannot."""
    found = raw(server.address, http(b'{"prompt": "\\ud800", "max_tokens": 2}'))
    assert found.splitlines()[0].split()[1] in (b"200", b"400")
    found = raw(server.address, http(b'{"\\ud800": 1, "prompt": "a"}'))
    assert b" 400 " in found.splitlines()[0]


def test_half_a_character_in_the_arguments_of_a_call(server: Running) -> None:
    """They are JSON in a text of JSON, so the body itself has none."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": "b"},
    ]
    answer = httpx2.post(
        server.address + "/v1/chat/completions", json={"messages": messages, "max_tokens": 1}
    )
    assert answer.status_code in (200, 400)


def test_a_template_that_writes_half_a_character() -> None:
    class Tokenizer:
        def apply_chat_template(self, *args: object, **settings: object) -> str:
            return "a\ud800"

    with pytest.raises(DropError, match="chat template fails"):
        in_chat_template(Tokenizer(), [{"role": "user", "content": "a"}])


def test_tokens_that_the_model_does_not_embed(chat_folder: Path, tmp_path: Path) -> None:
    """A tokenizer with more tokens than the embedding has rows: 400, and no index error."""
    known = json.loads((chat_folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = {"id": VOCAB + 9, "content": "<new>", "special": True, **flags}
    known["added_tokens"].append(new)
    known["model"]["vocab"]["<new>"] = new["id"]
    files = {path.name: path.read_bytes() for path in chat_folder.glob("*token*")}
    files |= {path.name: path.read_bytes() for path in chat_folder.glob("*.jinja")}
    files["tokenizer.json"] = json.dumps(known).encode()
    out = write_checkpoint(
        tmp_path / "out", tiny_model("llama"), extra_files=files, tokenizer=False
    )
    service = Service(out, None, None, 4)
    assert service.prompt_tokens(["ab"])
    with pytest.raises(ApiError, match="embeds"):
        service.prompt_tokens(["a<new>b"])
    talk = Conversation(service.engine.precisions, service.text, Sampling(temperature=0))
    with pytest.raises(DropError, match="embeds"):
        next(talk.answer("a<new>b", 2, 4))


def test_large_prompts_and_bodies(server: Running) -> None:
    started = time.monotonic()
    answer = httpx2.post(
        server.address + "/v1/completions", json={"prompt": "the sea " * 131_072}, timeout=60
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - started < 30
    found = raw(server.address, http(b" " * (routes.MOST_BODY + 1)))
    assert b" 413 " in found.splitlines()[0]


def test_short_texts_do_not_wait_for_long_ones(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, free, begun = server.service.encoded, threading.Event(), threading.Event()

    def slow(text: str, special: bool = True) -> list[int]:
        if len(text) > 1000:
            begun.set()
            assert free.wait(60)
        return plain(text[:20], special)

    def ask(text: str) -> int:
        body = {"prompt": text, "max_tokens": 1}
        return httpx2.post(server.address + "/v1/completions", json=body, timeout=60).status_code

    monkeypatch.setattr(server.service, "encoded", slow)
    monkeypatch.setattr(routes, "_MOST_HELD", 250_000)
    with ThreadPoolExecutor(2) as pool:
        long = [pool.submit(ask, "a" * 100_000) for _ in range(2)]
        assert begun.wait(60)
        assert [ask("a b c") for _ in range(5)] == [200] * 5
        assert ask("a" * 200_000) == 429
        free.set()
        assert [one.result() for one in long] == [200, 200]
    assert ask("a" * 200_000) == 200


MANY = {
    "lists": b"[],",
    "deep": b"[" * 90 + b"]" * 90 + b",",
    "texts": b'"a",',
    "tokens": b"1,",
}


@pytest.mark.parametrize("kind", MANY)
def test_many_values_are_not_read(server: Running, kind: str) -> None:
    """Python would read them for seconds, in which nobody else is answered."""
    many = MANY[kind] * (7_500_000 // len(MANY[kind]))
    found = raw(server.address, http(b'{"prompt": [' + many + b"1]}"))
    assert b" 413 " in found.splitlines()[0]
    assert b"524,288 values" in found


def test_scores_of_one_answer_are_bounded(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_MOST_SCORES", 100)
    body = {"prompt": "a b c d e f", "echo": True, "max_tokens": 1, "logprobs": 5, "n": 2}
    url = server.address + "/v1/completions"
    answer = httpx2.post(url, json={**body, "n": 4})
    assert answer.status_code == 400
    assert "at most 100" in answer.json()["error"]["message"]
    assert httpx2.post(url, json={**body, "n": 1, "logprobs": 1}).is_success


def test_values_are_counted_outside_of_texts() -> None:
    text = json.dumps({"a,[": [1, 2, {'b"\\': 'x,\\",', "c": "\\"}, []], "d": "{" * 9})
    assert _count_values(text.encode()) == 4 + 5  # opened, and commas
    assert parse_json(json.dumps({"a": ',[{\\"' * 900_000}).encode())["a"][:2] == ",["


def test_large_headers_are_cut_off(server: Running) -> None:
    found = raw(server.address, http(b"{}", headers=f"x: {'y' * 100_000}\r\n"))
    assert not found or b" 400 " in found.splitlines()[0]


def test_slow_senders_are_cut_off(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(process, "HEADER_SECONDS", 0.2)
    late = raw(server.address, http(b"x" * 100)[:-50])  # half of a body
    assert b" 408 " in late.splitlines()[0]
    started = time.monotonic()
    assert raw(server.address, b"POST /v1/comp") == b""
    with connect(server.address) as link:  # the second request of a connection
        link.sendall(get("/health"))
        assert b" 200 " in link.recv(1 << 16)
        with suppress(ConnectionError):
            for byte in b"POST":
                link.sendall(bytes([byte]))
                time.sleep(0.02)
            assert link.recv(1 << 16) == b""
    assert time.monotonic() - started < 5


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open sockets")
def test_who_reads_nothing_is_cut_off(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at the end of the server, which waits for nobody for long."""
    monkeypatch.setattr(process, "WRITE_SECONDS", 0.5)
    monkeypatch.setattr(process, "_ENDING_SECONDS", 1)
    asked = b"GET /page/vendor/marked.js HTTP/1.1\r\nhost: localhost\r\n\r\n" * 200

    def stuck(address: str) -> socket.socket:
        link = connect(address)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        link.sendall(asked)
        return link

    with running(chat_folder) as server:
        idle = sockets()
        with stuck(server.address):
            while sockets() < idle + 2:
                time.sleep(0.01)
            while sockets() > idle + 1:  # the server's end of it is gone
                time.sleep(0.05)
        monkeypatch.setattr(process, "WRITE_SECONDS", 600)
        last = stuck(server.address)
        time.sleep(0.5)
        started = time.monotonic()
    assert time.monotonic() - started < 60
    last.close()


def sockets() -> int:
    """Of this process, in which the server runs."""
    folder, found = Path("/proc/self/fd"), 0
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):
            found += os.readlink(folder / name).startswith("socket")
    return found


def test_many_idle_connections(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are taken: others are told so at once, and the idle ones are closed soon."""
    monkeypatch.setattr(process, "HEADER_SECONDS", 2.0)
    links = [connect(server.address) for _ in range(process.MOST_CONNECTIONS + 20)]
    try:
        assert b" 503 " in raw(server.address, get("/health")).splitlines()[0]
        for _ in range(100):
            time.sleep(0.1)
            if b" 200 " in raw(server.address, get("/health")).splitlines()[0]:
                break
        assert httpx2.get(server.address + "/health").status_code == 200
    finally:
        for link in links:
            link.close()


def test_a_slow_reader_holds_nothing(server: Running) -> None:
    """It reads nothing; its answer is computed, and its cache is free, all the same."""
    body = json.dumps({"prompt": "the", "max_tokens": 200, "ignore_eos": True, "stream": True})
    with connect(server.address) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        finished = server.engine.counters.finished
        link.sendall(http(body.encode()))
        for _ in range(500):
            if server.engine.counters.finished > finished:
                break
            time.sleep(0.02)
    assert server.engine.counters.finished == finished + 1


def caches() -> int:
    """Caches in this process, those of other servers too."""
    gc.collect()
    return sum(type(thing) is StaticCache for thing in gc.get_objects())


def test_nothing_leaks(chat_folder: Path) -> None:
    """150 clients, most of which misbehave, leave no job, no cache and no thread."""
    with running(chat_folder) as server:
        raw(server.address, http(b'{"prompt": "the", "max_tokens": 2}'))
        threads, before = threading.active_count(), caches()
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda seed: misbehave(server.address, seed), range(150)))
            for _ in range(500):
                status = server.engine.status()
                if status["queue"] == status["running"] == 0:
                    break
                time.sleep(0.02)
        assert (status["queue"], status["running"]) == (0, 0)
        counters = server.engine.counters
        assert counters.failed == 0
        assert counters.cancelled > 10
        assert threading.active_count() <= threads + 2  # the pool for text
        assert caches() - before < len(server.engine._kept._kept) <= 32
        answer = httpx2.post(server.address + "/v1/completions", json={"prompt": "the", "bits": 2})
        assert answer.status_code == 200
