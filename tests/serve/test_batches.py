"""Requests of models without the native step share passes through torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from running import NAME, Running, running
from torch import Tensor

from dropbydrop.runtime import torch_batch
from dropbydrop.runtime.torch_batch import TorchBatch
from dropbydrop.serve import job as jobs
from dropbydrop.serve.caches import KeptCaches
from dropbydrop.serve.engine import Engine
from dropbydrop.serve.job import Finished, Generated, Job, advance
from dropbydrop.serve.precisions import Precisions
from dropbydrop.serve.sampling import Sampler, Sampling
from dropbydrop.serve.shed import PINNED, Costs, Load
from test_engine import PROMPTS, ask, begin_together, ends, tokens_of
from tiny import tiny_model, write_checkpoint

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 with a window of 7 tokens; untied, so that greedy texts do not repeat one."""
    made = tmp_path_factory.mktemp("gemma") / NAME
    return write_checkpoint(made, tiny_model("gemma3", tie_word_embeddings=False))


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Iterator[Running]:
    with running(folder) as made:
        yield made


class _Stream:
    """Tokens without a text."""

    stopped = False

    def push(self, token: int) -> str:
        return ""

    end = lambda self: ""  # noqa: E731


def job(seed: int, prompt: int, most: int, emit: Any = lambda event: None) -> Job:
    ids = torch.randint(5, 300, (prompt,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Job(0, ids, most, Sampler(GREEDY, ids), _Stream(), frozenset(), Load(4, PINNED), emit)


def recorded(job: Job, into: list[Tensor]) -> None:
    assert job._logits is not None
    into.append(job._logits)


# tokens of the prompt, the round to start in, new tokens, (new tokens made, bits from then on)
SCHEDULE = [
    (3, 0, 12, [(0, 4)]),
    (40, 0, 12, [(0, 3)]),
    (150, 3, 9, [(0, 4), (4, 2)]),
    (9, 5, 20, [(0, 2), (7, 4), (14, 3)]),
    (1, 5, 5, [(0, 4), (3, 3)]),
    (21, 12, 9, [(0, 3)]),
]


def bits_of(switches: list[tuple[int, int]], made: int) -> int:
    return max(switch for switch in switches if switch[0] <= made)[1]


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kernel", "share"), [pytest.param("torch", 2e-5, marks=pytest.mark.slow), (None, 2e-3)]
)
def test_jobs_get_what_they_get_alone(
    folder: Path, kernel: str | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts shorter and longer than a block, coming and going, at levels that change in mid-text;
    against each job by itself, turn by turn. Native kernels round their inputs to steps, and a last
    bit of float32 may be on the other side of one."""
    if kernel is not None:
        monkeypatch.setenv("DROPBYDROP_KERNEL", kernel)
    precisions = Precisions(folder, None)
    precisions.warm_up()
    monkeypatch.setattr(torch_batch, "BLOCK", 16)
    assert precisions.batched
    kept, expected = KeptCaches(), []
    for seed, (prompt, _, most, switches) in enumerate(SCHEDULE):
        alone, found = job(seed, prompt, most), []
        while not alone.finished:
            bits = bits_of(switches, len(alone.tokens))
            alone.set_bits(bits)
            before = alone._logits
            alone.turn(precisions.model(bits), kept)
            if not alone.finished and alone._logits is not before and not alone.prompting:
                recorded(alone, found)
        expected.append((alone.tokens, found))
    jobs = [job(seed, prompt, most) for seed, (prompt, _, most, _) in enumerate(SCHEDULE)]
    found, batches, together = [[] for _ in jobs], {}, 0
    for number in range(40):
        passes: dict[int, list[Job]] = {}
        for made, (_, start, _, switches) in zip(jobs, SCHEDULE, strict=True):
            if number < start or made.finished:
                continue
            bits = bits_of(switches, len(made.tokens))
            made.set_bits(bits)
            if made.prompting:
                made.turn(precisions.model(bits), kept)
                if not made.prompting:
                    recorded(made, found[jobs.index(made)])
            else:
                passes.setdefault(bits, []).append(made)
        for bits, group in passes.items():
            batch = batches.setdefault(bits, TorchBatch())
            assert advance([precisions.model(bits)] * len(group), group, batch)
            together = max(together, len(group))
            for made in group:
                logits = made._logits
                made.answer(kept)
                if not made.finished:
                    found[jobs.index(made)].append(logits)
    assert together > 1
    assert all(len(batch) == 0 and batch.shape == (0, 0) for batch in batches.values())
    for made, logits, (tokens, want) in zip(jobs, found, expected, strict=True):
        assert made.tokens == tokens
        assert len(set(tokens)) > 2 or len(tokens) < 6
        for row, expected_row in zip(logits, want, strict=True):
            assert (row - expected_row).norm() <= share * expected_row.norm()


@pytest.fixture(scope="module")
def expected(gemma: Running) -> dict[tuple[str, int], list[str]]:
    """Greedy texts of one request at a time."""
    found = {}
    for prompt in PROMPTS[1:3]:
        for bits in (2, 3, 4):
            answer = ask(gemma, prompt=prompt, bits=bits, max_tokens=16, temperature=0, logprobs=0,
                         ignore_eos=True)  # fmt: skip
            found[prompt, bits] = tokens_of(answer, gemma)
    return found


def greedy(server: Running, model: Any, prompt: str, count: int) -> list[str]:
    """By transformers, on a cache of its own kind."""
    ids = torch.tensor([server.service.text.encode(prompt)])
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return [server.service.text.name(t) for t in made[0, ids.shape[1] :].tolist()]


def test_eight_clients_at_mixed_levels(
    gemma: Running, expected: dict[tuple[str, int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions, sizes = gemma.engine.precisions, []
    costs = precisions.costs()
    assert precisions.batched
    assert not costs.mixed
    model = precisions.model(3)
    assert greedy(gemma, model, PROMPTS[2], 16) == expected[PROMPTS[2], 3]
    step = TorchBatch.step

    def counted(self: TorchBatch, model: Any, rows: Any, tokens: Any) -> Tensor:
        sizes.append(len(rows))
        return step(self, model, rows, tokens)

    monkeypatch.setattr(TorchBatch, "step", counted)

    def one(case: tuple[str, int]) -> None:
        answer = ask(gemma, prompt=case[0], bits=case[1], max_tokens=16, temperature=0, logprobs=0,
                     ignore_eos=True)  # fmt: skip
        assert tokens_of(answer, gemma) == expected[case]
        assert answer["dropbydrop"]["switches"] == [[0, case[1]]]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, [*expected, *expected]))
    ends(gemma)
    assert max(sizes) > 1
    assert gemma.engine._batches == {}


def test_who_leaves_frees_the_row(gemma: Running) -> None:
    """A stream is closed in mid-batch; the other goes on, alone, and as it would have."""
    engine, plain, seen = gemma.engine, gemma.engine._round, []
    before = engine.counters.cancelled
    both, left = threading.Event(), threading.Event()

    def watched() -> None:
        plain()
        batch = next(iter(engine._batches.values()), None)
        seen.append(0 if batch is None else len(batch))
        if seen[-1] == 2 and not both.is_set():
            both.set()
            left.wait(30)

    engine._round = watched
    body = {"prompt": "the old mill", "temperature": 0, "ignore_eos": True, "bits": 4}
    try:
        with ThreadPoolExecutor(1) as pool:
            url = gemma.address + "/v1/completions"
            with (
                httpx2.Client(timeout=30) as client,
                client.stream(
                    "POST", url, json={**body, "max_tokens": 200, "stream": True}
                ) as told,
            ):
                lines = told.iter_lines()  # which closes the stream when it is forgotten
                next(lines)
                stays = pool.submit(ask, gemma, **body, max_tokens=60, logprobs=0)
                assert both.wait(30)
            while not any(job.cancelled for job in engine._running):
                time.sleep(0.002)
            left.set()
            found = tokens_of(stays.result(), gemma)
    finally:
        left.set()
        del engine._round
    ends(gemma, cancelled=before + 1)
    assert 1 in seen[seen.index(2) :]
    assert engine._batches == {}
    assert found == tokens_of(ask(gemma, **body, max_tokens=60, logprobs=0), gemma)


def test_running_requests_move_between_batches(folder: Path) -> None:
    """`auto` goes from 4 bits to 2 in mid-text, beside one that keeps its level."""
    with running(folder, target=20.0) as server:
        engine = server.engine
        engine.precisions.costs = lambda: Costs({2: 0.005, 3: 0.015, 4: 0.024})

        def forced(loads: Any, costs: Any, now: float) -> None:
            made = [len(j.tokens) for j in engine._running if j.load.may != PINNED]
            engine._ladder.at = 4 if made and made[0] >= 10 else 0

        engine._ladder.update = forced
        engine._ladder.room = lambda *args: True
        body = {"temperature": 0, "max_tokens": 30, "ignore_eos": True, "logprobs": 0}
        with ThreadPoolExecutor(2) as pool:
            kept = pool.submit(ask, server, **body, prompt="a small model reads", bits=2)
            moved = ask(server, **body, prompt="the old mill")
        alone = ask(server, **body, prompt="the old mill")
        low = ask(server, **body, prompt="a small model reads", bits=2)
        ends(server, failed=0)
    assert moved["dropbydrop"]["switches"] == [[0, 4], [10, 2]]
    assert tokens_of(moved, server) == tokens_of(alone, server)
    assert tokens_of(kept.result(), server) == tokens_of(low, server)


def test_memory_bounds_a_batch_by_its_longest_text(gemma: Running) -> None:
    """Rows are as long as the longest of them, and that is what is counted."""
    engine = Engine(gemma.engine.precisions, None, 8)
    jobs = [job(i, prompt, 100) for i, prompt in enumerate((5, 500, 5))]
    assert engine._tokens(jobs) == 3 * 768 + 600
    engine._most_tokens = 3 * 768 + 600
    assert engine._room(jobs[:2], jobs[2], Costs({}))
    engine._most_tokens -= 1
    assert not engine._room(jobs[:2], jobs[2], Costs({}))


def test_rows_that_outgrow_the_memory_are_parked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches keep to the memory for caches, and each text is as it is alone."""
    monkeypatch.setattr(torch_batch, "BLOCK", 16)
    asked = {"prompt": "the old mill", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    with running(folder) as server:
        alone = [ask(server, **asked, bits=bits, logprobs=0) for bits in (2, 3, 4)]
        monkeypatch.setattr(jobs, "_LIKELY", 8)
        engine, held, plain = server.engine, [], server.engine._advance
        engine._most_tokens = 350

        def counted(ready: Any, batch: Any) -> bool:
            done = plain(ready, batch)
            held.append(sum(rows * columns for rows, columns in map(shape, list(engine._batches))))
            return bool(done)

        def shape(key: Any) -> tuple[int, int]:
            return engine._batches[key].shape

        engine._advance = counted
        begin_together(engine, 3)
        with ThreadPoolExecutor(3) as pool:
            bodies = [{**asked, "bits": bits, "logprobs": 0} for bits in (2, 3, 4)]
            found = list(pool.map(lambda body: ask(server, **body), bodies))
        assert engine.counters.parked > 0
        assert 150 < max(held) <= 350
        assert [tokens_of(x, server) for x in found] == [tokens_of(x, server) for x in alone]


def test_a_step_that_fails_ends_its_own_batch_only(folder: Path) -> None:
    """And leaves no row behind."""
    with running(folder) as server:
        engine, step = server.engine, TorchBatch.step
        low = engine.precisions.model(2)

        def failing(self: TorchBatch, model: Any, rows: Any, tokens: Any) -> Tensor:
            logits = step(self, model, rows, tokens)
            return 1 / 0 if model is low and rows[0].length > 12 else logits

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(TorchBatch, "step", failing)
            body = {"prompt": "the", "max_tokens": 40, "ignore_eos": True}
            good = pool.submit(ask, server, **body, bits=4)
            bad = httpx2.post(
                server.address + "/v1/completions", json={**body, "bits": 2}, timeout=30
            )
            assert good.result()["usage"]["completion_tokens"] == 40
        assert bad.status_code == 500
        ends(server, failed=1)
        assert engine._batches == {}


def test_a_request_that_fails_does_not_fail_its_neighbours(gemma: Running, folder: Path) -> None:
    """One pass, in which the model cannot stand one of the rows: the others get their tokens."""
    body = {"prompt": "the old mill", "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    want = tokens_of(ask(gemma, **body, bits=4, logprobs=0), gemma)
    with running(folder) as server:
        plain, seen = TorchBatch.step, []
        long = 60  # tokens of the bad prompt

        def failing(self: TorchBatch, model: Any, rows: Any, tokens: Any) -> Tensor:
            seen.append(len(rows))
            return (
                1 / 0
                if any(row.length > long for row in rows)
                else plain(self, model, rows, tokens)
            )

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
            patch.setattr(TorchBatch, "step", failing)
            good = [pool.submit(ask, server, **body, bits=4, logprobs=0) for _ in range(3)]
            bad = httpx2.post(
                server.address + "/v1/completions",
                json={**body, "prompt": [7] * (long + 1), "bits": 4},
                timeout=60,
            )
            assert [tokens_of(one.result(), server) for one in good] == [want] * 3
        assert bad.status_code == 500
        assert max(seen) > 1
        ends(server, failed=1)
        assert server.engine._batches == {}


def test_caches_that_are_no_keys_and_values_take_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the kind of their layers; everything is answered as before."""
    monkeypatch.setattr(torch_batch, "_PLAIN", ())
    with running(folder) as server:
        assert not server.engine.precisions.batched
        body = {"prompt": "the old mill", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: ask(server, **body, logprobs=0), range(3)))
        assert len({tuple(tokens_of(answer, server)) for answer in answers}) == 1
        assert tokens_of(answers[0], server) == greedy(
            server, server.engine.precisions.base, "the old mill", 20
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_a_batch_on_the_device(folder: Path) -> None:
    """Jobs at two levels on a GPU, together, against the logits of the same texts on the CPU.

    Kernels of byte planes round their inputs to 8 bits there, so tokens are forced."""
    here, there = Precisions(folder, None), Precisions(folder, None, "cuda:0")
    there.warm_up()
    assert there.batched
    assert there.base.device.type == "cuda"
    events: list[Any] = []
    engine, done = Engine(there, None, 8), threading.Event()
    assert engine._most_tokens > 0

    def emit(event: Any) -> None:
        events.append(event)
        if sum(isinstance(e, Finished) for e in events) == 3:
            done.set()

    jobs = [job(i, 5 + 30 * i, 12, emit) for i in range(3)]
    jobs[2].load = Load(2, PINNED)
    engine.start()
    engine.submit(jobs)
    assert done.wait(120)
    engine.stop()
    assert sum(isinstance(event, Generated) for event in events) == 36
    texts = [torch.tensor([[*made.prompt, *made.tokens]]) for made in jobs]
    with torch.inference_mode():
        for made, ids in zip(jobs, texts, strict=True):
            bits = made.load.asked
            logits = here.model(bits)(ids).logits[0, len(made.prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(made.tokens)[:, None])[:, 0]
            # what the device took for the likeliest token is nearly that here
            assert bool((logits.max(-1).values - chosen <= 0.3 * logits.std(-1)).all())
