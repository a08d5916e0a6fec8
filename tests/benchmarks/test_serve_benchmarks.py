"""The load generator's arithmetic, and its reference against answers of the server's own worker."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("httpx2", reason="httpx2 is not installed; openai brings it")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "serve"))
import load
import together
from load_client import Answer
from replay import Judge

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.runtime.load import load_views
from dropbydrop.serve.conversation import Conversation
from dropbydrop.serve.engine import Engine
from dropbydrop.serve.precisions import Precisions
from dropbydrop.serve.sampling import Sampling
from dropbydrop.serve.text import Text
from tiny import tiny_model, write_checkpoint


def test_arrivals_grow_from_the_low_rate_to_the_high_one() -> None:
    found = load.times_of_arrival(1000.0, 1.0, 9.0)
    assert found == sorted(found)
    assert len(found) == pytest.approx(5000, rel=0.05)
    assert sum(at < 100 for at in found) == pytest.approx(140, rel=0.3)  # 1.4 a second
    assert sum(at > 900 for at in found) == pytest.approx(860, rel=0.15)


def test_counts() -> None:
    def answer(sent: float, first: float, ended: float, switches: list[list[float]]) -> Answer:
        return Answer("?", sent, first, ended, "", 11, switches)

    answers = [
        answer(0.0, 0.5, 1.0, [[0, 4]]),  # 20 a second: within the target
        answer(1.0, 3.5, 4.0, [[0, 4]]),  # the first token is late
        answer(2.0, 2.5, 4.5, [[0, 4], [5, 2]]),  # 5 a second
        Answer("?", 9.0, failure="turned away"),
        Answer("?", 9.5, failure="ReadError"),
    ]
    setup = {"first": 2.0, "target": 10.0, "seconds": 10.0}
    found = load.figures(answers, {"corrupted": 1}, setup, {})
    counts = found["counts"]
    assert (counts["sent"], counts["answered"], counts["within_target"]) == (5, 3, 1)
    assert (counts["turned_away"], counts["lost"], counts["corrupted"]) == (1, 1, 1)
    assert counts["share_of_tokens"] == {"2": round(6 / 33, 4), "4": round(27 / 33, 4)}
    assert found["bins"][0] == {"rate": 1.0, "within_target": 1.0, "level": 4.0}


def test_damaged_answers_are_found_and_lower_levels_priced(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out", chat=True)
    text = Text(load_tokenizer(out))

    def answer(switches: list[list[float]]) -> Answer:
        talk = Conversation(Precisions(out, None), text, Sampling(temperature=0.0))
        talk._ends = set()  # as ignore_eos
        said = "".join(talk.answer("the river", switches[0][1], 6))
        return Answer("the river", 0.0, 0.1, 1.0, said, 6, switches)

    good, low = answer([[0, 4]]), answer([[0, 2]])
    bad = replace(good, text=good.text[:-1] + "?")
    lost = Answer("the river", 0.0, failure="cut off")
    judge = Judge(str(out), load_views(Checkpoint.open(out))["4"][1])
    found = judge.judge([good, bad, good, lost])
    assert found["corrupted"] == len(found["gaps"]) == 1
    assert found["gaps"][0] == pytest.approx(judge.replay(good).gaps[-1], abs=1e-5)
    assert found["tokens"] == 18
    assert found["kl"] == pytest.approx(0, abs=1e-6)  # the highest level is the original here
    found = judge.judge([low])
    assert found["corrupted"] == 0
    assert found["kl"] > 100 * abs(found["kl_highest"])


def test_requests_together_and_one_by_one(tmp_path: Path) -> None:
    precisions = Precisions(write_checkpoint(tmp_path / "out", tiny_model("gemma3")), [2])
    precisions.warm_up()
    engine = Engine(precisions, None, 8)
    engine.start()
    args = argparse.Namespace(requests=3, prompt=2, tokens=4, rounds=2)
    found = together.measure(engine, args)
    engine.stop()
    assert found["batched"]
    assert len(found["2"]["ratios"]["clock"]) == 2
    assert found["2"]["tokens_per_second"]["together"]["clock"] > 0
    assert engine.counters.finished == 3 * 2 * 3
    assert engine.counters.tokens == 4 * engine.counters.finished
