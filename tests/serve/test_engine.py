"""Answers of the worker: exact, mixed, cancelled, moved, refused."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from running import NAME, Running, running

import dropbydrop
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.planning.sensitivity import Sensitivity
from dropbydrop.runtime import fused_decode
from dropbydrop.serve import caches, job, precisions
from dropbydrop.serve.body import Body
from dropbydrop.serve.engine import MOST_RUNNING
from dropbydrop.serve.job import CHUNK
from dropbydrop.serve.requests import read_completion
from dropbydrop.serve.shed import Costs
from dropbydrop.serve.text import TextStream
from dropbydrop.system.native_library import library

PROMPTS = [
    "the river",
    "a small model reads",
    "one hundred ships left the harbour in the morning",
    "the old mill stands",
]


def ask(server: Running, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = httpx2.post(server.address + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def ends(server: Running, **wanted: int) -> None:
    """Wait until the engine is idle, and the counters are as they should be."""
    for _ in range(400):
        status = server.engine.status()
        if status["queue"] == status["running"] == 0:
            break
        time.sleep(0.02)
    status = server.engine.status()
    assert (status["queue"], status["running"]) == (0, 0)
    for name, value in wanted.items():
        assert getattr(server.engine.counters, name) == value


@pytest.fixture(scope="module")
def expected(chat_folder: Path) -> dict[tuple[str, int], list[int]]:
    """Greedy continuations by transformers' `generate`, each level loaded by itself."""
    tokenizer, found = load_tokenizer(chat_folder), {}
    for bits in (2, 3, 4):
        model = dropbydrop.load(chat_folder, bits=bits)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            with torch.inference_mode():
                made = model.generate(
                    **ids, max_new_tokens=24, do_sample=False, cache_implementation="static",
                    disable_compile=True,
                )  # fmt: skip
            found[prompt, bits] = made[0, ids["input_ids"].shape[1] :].tolist()
    return found


def tokens_of(answer: dict[str, Any], server: Running) -> list[str]:
    return list(answer["choices"][0]["logprobs"]["tokens"])


def test_eight_clients_with_mixed_levels_get_what_generate_gives(
    server: Running, expected: dict[tuple[str, int], list[int]]
) -> None:
    """Levels differ for the same prompts, so an answer of another level would be noticed."""
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)

    def one(case: tuple[str, int]) -> None:
        prompt, bits = case
        answer = ask(
            server, model=f"{NAME}:{bits}bit", prompt=prompt, temperature=0, max_tokens=24,
            logprobs=0,
        )  # fmt: skip
        want = [t for t in expected[case] if t != 2]  # the end is no part of the text
        assert tokens_of(answer, server) == [server.service.text.name(t) for t in want]
        assert answer["dropbydrop"]["bits"] == bits
        assert answer["dropbydrop"]["switches"] == [[0, bits]]
        assert answer["usage"]["completion_tokens"] == len(want)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, [*expected, *expected]))
    ends(server)


@pytest.mark.skipif(library() is None, reason="the native library is not built")
@pytest.mark.parametrize("levels", [(3, 3, 3, 3), (2, 3, 4, 2)])
def test_requests_share_a_pass(
    server: Running,
    expected: dict[tuple[str, int], list[int]],
    levels: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each at its own precision."""
    assert server.service.engine.precisions.costs().mixed
    sizes, kinds = [], set()

    def counted(models: list[Any], ids: list[int], caches: list[Any]) -> torch.Tensor | None:
        logits = decode_together(models, ids, caches)
        sizes.append(len(ids) if logits is not None else 0)
        kinds.add(len({id(model) for model in models}))
        return logits

    decode_together = fused_decode.decode_together
    monkeypatch.setattr(fused_decode, "decode_together", counted)

    def one(prompt: str, bits: int) -> list[str]:
        answer = ask(server, prompt=prompt, bits=bits, max_tokens=24, temperature=0, logprobs=0)
        return list(answer["choices"][0]["logprobs"]["tokens"])

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(one, PROMPTS, levels))
    assert max(sizes) >= 2
    assert (max(kinds) > 1) == (len(set(levels)) > 1)
    for prompt, bits, tokens in zip(PROMPTS, levels, answers, strict=False):
        want = [t for t in expected[prompt, bits] if t != 2]
        assert tokens == [server.service.text.name(t) for t in want]


def test_long_prompts_in_chunks(server: Running, chat_folder: Path) -> None:
    """A prompt of several chunks gives the log-probabilities of one forward pass."""
    ids = torch.randint(5, 300, (1, CHUNK + 40), generator=torch.Generator().manual_seed(1))
    model = dropbydrop.load(chat_folder, bits=3)
    with torch.inference_mode():
        logs = torch.log_softmax(model(ids).logits[0].float(), -1)
    want = logs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    answer = ask(server, prompt=ids[0].tolist(), bits=3, echo=True, logprobs=1, max_tokens=0)
    found = answer["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None
    torch.testing.assert_close(
        torch.tensor(found["token_logprobs"][1:]), want, rtol=1e-4, atol=1e-4
    )
    best = [server.service.text.name(int(t)) for t in logs[:-1].argmax(-1)]
    assert [max(top, key=top.get) for top in found["top_logprobs"][1:]] == best
    assert answer["usage"]["completion_tokens"] == 0


def test_caches_grow_without_a_change(server: Running, chat_folder: Path) -> None:
    """More tokens than a cache has at first; compared with a server-less greedy loop."""
    model = dropbydrop.load(chat_folder, bits=4)
    ids = server.service.text.encode("the")
    with torch.inference_mode():
        for _ in range(120):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    answer = ask(
        server, prompt="the", temperature=0, max_tokens=120, bits=4, logprobs=0, ignore_eos=True
    )
    assert tokens_of(answer, server) == [server.service.text.name(t) for t in ids[-120:]]


def test_a_known_beginning_is_not_computed_again(server: Running) -> None:
    prompt = "one hundred and twenty three ships left the harbour in the morning" * 2
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "bits": 3}
    first = ask(server, prompt=prompt, **body)
    again = ask(server, prompt=prompt, **body)
    other = ask(server, prompt=prompt, **{**body, "bits": 2})
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == (
        again["usage"]["prompt_tokens"] - 1
    )
    assert again["timings"]["cache_n"] > 0
    assert other["timings"]["cache_n"] == 0  # another level has other keys and values


def test_seeds(server: Running) -> None:
    def texts(**more: Any) -> list[str]:
        answer = ask(server, prompt="the", max_tokens=12, temperature=1.5, n=3, **more)
        return [choice["text"] for choice in answer["choices"]]

    assert texts(seed=4) == texts(seed=4)
    assert len({*texts(seed=4), *texts(seed=99)}) > 3
    assert texts() != texts()


def test_an_average_that_cannot_be_planned(server: Running) -> None:
    """Nothing is known about which matrices matter, which the answer says."""
    answer = httpx2.post(
        server.address + "/v1/completions", json={"prompt": "the", "bits": 2.5}, timeout=30
    )
    assert answer.status_code == 400
    assert "sensitivit" in answer.json()["error"]["message"]


def test_averages(chat_folder: Path, tmp_path: Path) -> None:
    """Views of plans, made when they are asked for; the last few are kept."""
    out = shutil.copytree(chat_folder, tmp_path / NAME)
    groups = Checkpoint.open(out).quantization.input_groups
    losses = {group.name: {2: 1.0 + i, 3: 0.3, 4: 0.0} for i, group in enumerate(groups)}
    Sensitivity(Checkpoint.open(out).fingerprint, losses, "measured").save(out)
    with running(out) as server:
        body: dict[str, Any] = {"prompt": "the old mill", "max_tokens": 20, "temperature": 0}
        answer = ask(server, **body, bits=2.5, logprobs=0, ignore_eos=True)
        assert answer["dropbydrop"]["bits"] == 2.5
        sizes = [server.engine.precisions.bytes_of(bits) for bits in (2, 2.5, 3)]
        assert sizes == sorted(set(sizes))
        assert answer["dropbydrop"]["bytes_per_token"] == sizes[1]
        most = precisions._MOST_AVERAGES
        assert most > MOST_RUNNING  # or each token of some would make its view again
        for bits in range(210, 212 + most):
            asked = {**body, "max_tokens": 1, "bits": bits / 100}
            assert ask(server, **asked)["dropbydrop"]["bits"] == bits / 100
        assert len(server.engine.precisions._averages) == most
    model, ids = dropbydrop.load(out, avg_bits=2.5), server.service.text.encode("the old mill")
    with torch.inference_mode():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert tokens_of(answer, server) == [server.service.text.name(t) for t in ids[-20:]]


def test_who_leaves_frees_the_place(server: Running) -> None:
    before = server.engine.counters.cancelled
    body = {"prompt": "the", "max_tokens": 200, "stream": True, "ignore_eos": True, "n": 2}
    for _ in range(5):
        with (
            httpx2.Client(timeout=30) as client,
            client.stream("POST", server.address + "/v1/completions", json=body) as answer,
        ):
            next(answer.iter_lines())
    ends(server)
    assert server.engine.counters.cancelled > before


def test_who_leaves_the_queue_frees_it(chat_folder: Path) -> None:
    """Also behind a request that waits on."""
    with running(chat_folder) as server:
        engine, service, model = server.engine, server.service, server.engine.precisions.model
        engine.precisions.model = lambda bits: time.sleep(0.02) or model(bits)
        engine._room = lambda running, job, costs: not running
        body = {"prompt": "the", "max_tokens": 150, "ignore_eos": True}
        request, _ = read_completion(Body(body), service.served)
        first, second, third = (
            service.jobs(request, [service.encoded("the")], lambda event: None, True)
            for _ in range(3)
        )
        for jobs in (first, second, third):
            engine.submit(jobs)
        engine.cancel(third)
        while len(engine._waiting) != 1:
            time.sleep(0.01)
        assert not first[0].finished
        assert not second[0].finished
        assert engine.counters.cancelled == 1
        engine.cancel([*first, *second])


def test_saturation_answers_429(chat_folder: Path) -> None:
    with running(chat_folder, target=1e6, queue=2) as server:  # so only one runs at a time
        body = {"prompt": "the", "max_tokens": 200, "ignore_eos": True}
        with ThreadPoolExecutor(12) as pool:
            answers = list(
                pool.map(
                    lambda _: httpx2.post(
                        server.address + "/v1/completions", json=body, timeout=60
                    ),
                    range(12),
                )
            )
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        ends(server, rejected=codes.count(429))


def test_memory_for_caches_bounds_what_runs(chat_folder: Path) -> None:
    """Room for two requests of 100 tokens: others wait, and all are answered in the end."""
    with running(chat_folder) as server:
        engine, most = server.engine, []
        engine._most_tokens, plain = 220, engine._round

        def counted() -> None:
            most.append(len(engine._running))
            plain()

        engine._round = counted
        body = {"prompt": "the old mill", "max_tokens": 100, "ignore_eos": True}
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: ask(server, **body), range(6)))
            alone = ask(server, **{**body, "max_tokens": 240})  # more than there is room for
        assert [a["usage"]["completion_tokens"] for a in [*answers, alone]] == [100] * 6 + [240]
        assert max(most) == 2


@pytest.mark.parametrize("bits", [(3, 3, 3, 3), (4, 2, 3, 2)])
def test_texts_that_become_longer_than_foreseen_are_parked(
    chat_folder: Path, bits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four texts that outgrow the memory together: it is kept to, and each gets what it gets alone,
    log-probabilities of prompt and text too."""
    asked = {"max_tokens": 180, "temperature": 0, "ignore_eos": True, "logprobs": 2, "echo": True}
    with running(chat_folder) as server:
        bodies = [{**asked, "prompt": PROMPTS[i], "bits": bits[i]} for i in range(4)]
        alone = [ask(server, **body) for body in bodies]
    monkeypatch.setattr(job, "_LIKELY", 8)
    monkeypatch.setattr(caches, "_FIRST", 8)
    with running(chat_folder) as server:
        engine, held, plain = server.engine, [], server.engine._advance
        engine._most_tokens = 400

        def counted(ready: Any, batch: Any) -> bool:
            done = plain(ready, batch)
            held.append(sum(room(one) for one in engine._running))
            return bool(done)

        engine._advance = counted
        begin_together(engine, 4)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda body: ask(server, **body), bodies))
        assert engine.counters.parked > 1
        assert 200 < max(held) <= 400
        ends(server, finished=4, failed=0, requests=4)
    for one, want in zip(found, alone, strict=True):
        assert one["choices"][0]["text"] == want["choices"][0]["text"]
        scores, expected = (x["choices"][0]["logprobs"] for x in (one, want))
        assert scores["tokens"] == expected["tokens"]
        assert scores["token_logprobs"][0] is expected["token_logprobs"][0] is None
        near = pytest.approx(expected["token_logprobs"][1:], abs=0.05)
        assert scores["token_logprobs"][1:] == near
        assert one["usage"] == want["usage"]


def begin_together(engine: Any, count: int) -> None:
    """Nothing runs before so many requests are there."""
    plain, there = engine._round, threading.Event()

    def waiting() -> None:
        if len(engine._running) + len(engine._waiting) == count:
            there.set()
        if there.is_set():
            plain()
        else:
            time.sleep(0.01)

    engine._round = waiting


def room(one: Any) -> int:
    """Tokens that the cache of a job has memory for."""
    layers = [] if one._cache is None else one._cache.layers
    return max((layer.keys.shape[2] for layer in layers if layer.is_initialized), default=0)


def test_running_requests_are_moved_down_on_the_same_cache(chat_folder: Path) -> None:
    """The cost of a step is set: three are too many for 4 bits. Two come after 5 tokens."""
    with running(chat_folder, target=20.0) as server:
        engine, met = server.engine, []
        engine.precisions.costs = lambda: Costs({2: 0.005, 3: 0.015, 4: 0.024})
        engine._note_beside = lambda seconds: None
        plain = engine._round

        def paused() -> None:
            if len(engine._running) == 3:
                met.append(True)
            if met or not (engine._running and len(engine._running[0].tokens) == 5):
                return plain()
            time.sleep(0.002)

        engine._round = paused
        body = {"prompt": "the old mill", "max_tokens": 100, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            default = pool.submit(ask, server, **body)
            while engine.counters.tokens < 5:
                time.sleep(0.002)
            kept = pool.submit(ask, server, **body, bits=4)
            flex = pool.submit(ask, server, **body, bits=4, service_tier="flex")
        assert kept.result()["dropbydrop"]["switches"] == [[0, 4]]
        assert flex.result()["dropbydrop"]["switches"] == [[0, 2]]
        assert default.result()["dropbydrop"]["switches"] == [[0, 4], [5, 3]]
        ends(server, moved_down=1)


def test_a_switch_in_mid_generation_is_exact(chat_folder: Path) -> None:
    """4 bits for ten tokens and 2 after them, against two models on one cache."""
    with running(chat_folder, target=20.0) as server:
        engine = server.engine
        plain = engine._ladder.update

        def forced(loads: Any, costs: Any, now: float) -> None:
            made = [len(job.tokens) for job in engine._running]
            engine._ladder.at = 4 if made and made[0] >= 10 else 0

        engine._ladder.update = forced
        answer = ask(
            server, prompt="the old mill", max_tokens=30, temperature=0, ignore_eos=True,
            logprobs=0,
        )  # fmt: skip
        engine._ladder.update = plain
    assert answer["dropbydrop"]["switches"] == [[0, 4], [10, 2]]
    assert answer["dropbydrop"]["bits"] == 2
    high = dropbydrop.load(chat_folder, bits=4)
    low, made = dropbydrop.view(high, bits=2), []
    ids = server.service.text.encode("the old mill")
    with torch.inference_mode():
        out = high(torch.tensor([ids]), use_cache=True)
        for i in range(30):
            made.append(int(out.logits[0, -1].argmax()))
            model = high if i + 1 < 10 else low
            out = model(
                torch.tensor([made[-1:]]), past_key_values=out.past_key_values, use_cache=True
            )
    assert tokens_of(answer, server) == [server.service.text.name(t) for t in made]


def test_a_failing_job_harms_no_other(chat_folder: Path) -> None:
    with running(chat_folder) as server:
        engine, model = server.engine, server.engine.precisions.model
        engine.precisions.model = lambda bits: model(bits) if bits != 3 else 1 / 0
        with ThreadPoolExecutor(2) as pool:
            good = pool.submit(ask, server, prompt="the", max_tokens=40, bits=2)
            bad = httpx2.post(
                server.address + "/v1/completions", json={"prompt": "the", "bits": 3}, timeout=30
            )
        assert bad.status_code == 500
        assert "ZeroDivisionError" in bad.json()["error"]["message"]
        assert good.result()["choices"][0]["finish_reason"] in ("length", "stop")
        lines = httpx2.post(
            server.address + "/v1/completions",
            json={"prompt": "the", "bits": 3, "stream": True}, timeout=30,
        )  # fmt: skip
        assert lines.status_code == 500  # nothing was streamed yet, so the status can say it
        ends(server, failed=2)


@pytest.mark.parametrize("body", [{}, {"echo": True, "logprobs": 1, "max_tokens": 0}])
def test_outputs_that_are_no_numbers(chat_folder: Path, body: dict[str, Any]) -> None:
    """An overflow of float16, say: no text is better than that text."""
    with running(chat_folder) as server:
        url, asked = server.address + "/v1/completions", {"prompt": "the", **body}
        assert httpx2.post(url, json=asked).is_success
        server.engine.precisions.base.model.norm.weight.data[3] = torch.nan
        answer = httpx2.post(url, json={**asked, "prompt": "of"})
        assert answer.status_code == 500
        assert "outputs are no numbers" in answer.json()["error"]["message"]


def test_a_panic_ends_one_request(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tokenizers raises where Rust panics is no Exception."""

    class PanicException(BaseException):
        pass

    def panic(*args: Any) -> Any:
        raise PanicException

    with running(chat_folder) as server:
        url, body = server.address + "/v1/completions", {"prompt": "the", "ignore_eos": True}
        with monkeypatch.context() as patch:
            patch.setattr(TextStream, "push", panic)
            assert httpx2.post(url, json=body, timeout=30).status_code == 500
        with monkeypatch.context() as patch:
            patch.setattr(type(server.service.text), "encode", panic)
            assert httpx2.post(url, json=body, timeout=30).status_code == 500
        assert httpx2.post(url, json=body, timeout=30).is_success
        server.service.engine._round = panic
        with suppress(httpx2.HTTPError):
            assert httpx2.post(url, json=body, timeout=30).status_code == 503
        assert httpx2.get(server.address + "/health").status_code == 503


def test_an_error_within_a_stream(chat_folder: Path) -> None:
    with running(chat_folder) as server:
        engine, model, calls = server.engine, server.engine.precisions.model, []

        def failing(bits: float) -> Any:
            calls.append(bits)
            return model(bits) if len(calls) < 5 else 1 / 0

        engine.precisions.model = failing
        answer = httpx2.post(
            server.address + "/v1/completions",
            json={"prompt": "the", "stream": True, "max_tokens": 40, "ignore_eos": True},
            timeout=30,
        )
        last = [x for x in answer.text.split("\n\n") if x][-2:]
        assert json.loads(last[0].removeprefix("data: "))["error"]["type"] == "server_error"
        assert last[1] == "data: [DONE]"


def test_stopping_ends_open_streams(chat_folder: Path) -> None:
    with running(chat_folder) as server:
        body = {"prompt": "the", "max_tokens": 240, "stream": True, "ignore_eos": True, "n": 8}
        with httpx2.stream("POST", server.address + "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.engine.stop()
            rest = [line for line in lines if line]
        assert "shutting down" in rest[-2]
        refused = httpx2.post(server.address + "/v1/completions", json={"prompt": "the"})
        assert refused.status_code == 503
        assert httpx2.get(server.address + "/health").status_code == 503


def test_a_worker_that_fails_answers_who_waits(chat_folder: Path) -> None:
    """What must not happen, an error outside of any request, still leaves nobody waiting."""
    with running(chat_folder) as server:

        def broken() -> None:
            raise RuntimeError("on purpose")

        server.engine._round = broken
        url, body = server.address + "/v1/completions", {"prompt": "the", "max_tokens": 2}
        for _ in range(2):
            assert httpx2.post(url, json=body, timeout=30).status_code == 503
        assert httpx2.get(server.address + "/health", timeout=30).status_code == 503
