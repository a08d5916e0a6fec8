"""The sampler against transformers' processors, and what a seed promises."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dropbydrop.serve import sampling as module
from dropbydrop.serve.sampling import Sampler, Sampling, candidates, scores_of
from dropbydrop.serve.service import _own_sampling
from dropbydrop.system.errors import DropError, NumericError

VOCABULARY = 3000


def logits(seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def naive(scores: torch.Tensor, asked: Sampling) -> torch.Tensor:
    """Probabilities by transformers' processors."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(asked.temperature)])
    if asked.top_k:
        steps.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        steps.append(TopPLogitsWarper(asked.top_p))
    if asked.min_p:
        steps.append(MinPLogitsWarper(asked.min_p))
    return torch.softmax(steps(torch.zeros(1, 1, dtype=torch.long), scores[None])[0], -1)


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(temperature=0.7),
        Sampling(top_p=0.9),
        Sampling(top_p=0.9999, temperature=2.0),  # more tokens than the sorted head
        Sampling(top_k=7),
        Sampling(top_k=700, top_p=0.95),
        Sampling(min_p=0.05),
        Sampling(temperature=1.3, top_k=50, top_p=0.8, min_p=0.1),
        Sampling(top_p=0.0001),
    ],
    ids=str,
)
def test_candidates_equal_those_of_transformers(asked: Sampling) -> None:
    for seed in range(5):
        ids, weights = candidates(logits(seed), asked)
        found = torch.zeros(VOCABULARY)
        found[torch.arange(VOCABULARY) if ids is None else ids] = weights / weights.sum()
        torch.testing.assert_close(found, naive(logits(seed), asked), rtol=1e-4, atol=1e-7)


def test_the_case_of_a_long_nucleus_is_reached() -> None:
    weights = naive(logits(), Sampling(top_p=0.9999, temperature=2.0))
    assert int((weights > 0).sum()) > module._HEAD


def test_draws_follow_the_probabilities() -> None:
    asked, scores = Sampling(seed=1, top_k=4), logits(3)
    sampler, counts = Sampler(asked, []), torch.zeros(VOCABULARY)
    for _ in range(4000):
        counts[sampler(scores)] += 1
    expected = naive(scores, asked)
    assert torch.all((counts / 4000 - expected).abs() < 0.04)


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-12])
@pytest.mark.parametrize("more", [{}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float, more: Any) -> None:
    scores = logits() * 30
    asked = Sampling(temperature=temperature, seed=1, **more)
    allowed = torch.ones(scores.numel(), dtype=torch.bool)
    allowed[scores.argmax()] = False
    assert Sampler(asked, [])(scores) == scores.argmax()
    best = scores.masked_fill(~allowed, -torch.inf).argmax()
    assert Sampler(asked, [])(scores, allowed) == best


def test_penalties() -> None:
    asked = Sampling(
        temperature=0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25
    )
    prompt, scores = [3, 5, 5], logits(2)
    sampler = Sampler(asked, prompt)
    for expected in (11, 11, 12):  # forced, so that counts are known
        assert sampler(torch.zeros(VOCABULARY).index_fill(0, torch.tensor([expected]), 99.0)) == (
            expected
        )
    seen = torch.tensor([[*prompt, 11, 12]])
    want = RepetitionPenaltyLogitsProcessor(1.3)(seen, scores[None].clone())[0]
    want[11] -= 0.5 + 0.25 * 2
    want[12] -= 0.5 + 0.25
    torch.testing.assert_close(sampler._adjusted(scores), want)


def test_bias_forces_and_forbids() -> None:
    scores = logits()
    best = int(scores.argmax())
    assert Sampler(Sampling(temperature=0), [])(scores) == best
    assert Sampler(Sampling(temperature=0, logit_bias={17: 100.0}), [])(scores) == 17
    assert Sampler(Sampling(temperature=0, logit_bias={best: -100.0}), [])(scores) != best


def test_a_seed_repeats_and_is_nobody_elses() -> None:
    def run(seed: int | None, choice: int = 0) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), [], choice)
        return [sampler(logits(i) / 4) for i in range(12)]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert run(5) == run(5)
    assert len({tuple(run(5)), tuple(run(5, 1)), tuple(run(6)), tuple(run(None))}) == 4
    assert torch.equal(torch.get_rng_state(), before)  # the process's generator is left alone


def test_scores_are_those_of_the_model() -> None:
    scores = logits()
    logprob, top = scores_of(scores, 9, 3)
    want = torch.log_softmax(scores, -1)
    assert logprob == pytest.approx(float(want[9]))
    assert [token for token, _ in top] == torch.topk(want, 3).indices.tolist()
    scores[9:] = -torch.inf  # JSON has no such number
    logprob, top = scores_of(scores, 9, 10)
    assert logprob == top[-1][1] == -9999


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 0.9)),
        ({"temperature": 0.6, "repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"do_sample": True, "top_k": 20.0, "temperature": None}, Sampling(top_k=20)),
        ({"do_sample": True, "top_k": -1}, Sampling()),
    ],
)
def test_what_the_makers_recommend(said: dict[str, Any], right: Sampling) -> None:
    assert _own_sampling(SimpleNamespace(**said)) == right


@pytest.mark.parametrize(
    "said",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": True},
        {"do_sample": True, "temperature": float("nan")},
        {"do_sample": True, "top_p": "0.9"},
        {"do_sample": True, "top_k": 2.5},
        {"do_sample": True, "min_p": 10**400},
    ],
)
def test_recommendations_out_of_range_are_refused(said: dict[str, Any]) -> None:
    """At the start, not in every answer, with a message that blames the request."""
    with pytest.raises(DropError, match=r"generation_config\.json says"):
        _own_sampling(SimpleNamespace(**said))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_leave_no_token(temperature: float) -> None:
    """A model may rule tokens out, and a grammar the others."""
    sampler, allowed = Sampler(Sampling(temperature=temperature), []), torch.zeros(9).bool()
    allowed[3:5] = True
    some = torch.zeros(9).index_fill(0, torch.tensor([3]), -torch.inf)
    assert sampler(some, allowed) == 4
    for wrong in (
        torch.full((9,), -torch.inf),
        torch.full((9,), torch.nan),
        some.index_fill(0, torch.tensor([4]), -torch.inf),
    ):
        with pytest.raises(NumericError):
            sampler(wrong, allowed)
