"""Perplexity and KL against their definitions; intervals against what they promise; generation."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import tiny
from dropbydrop.evaluation import perplexity as module
from dropbydrop.evaluation.perplexity import bootstrap_interval, evaluate
from dropbydrop.runtime.generate import generate
from dropbydrop.system.errors import CalibrationError, DropError, NumericError

N, T = 3, 17


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, tiny.VOCAB, (N, T), generator=torch.Generator().manual_seed(1))


def figures_ref(model: object, reference: object, ids: Tensor) -> tuple[list, list, list]:
    """nll, reference nll and KL of each window, prediction by prediction in float64."""
    nlls, bases, kls = [], [], []
    for row in ids:
        with torch.no_grad():
            p = torch.log_softmax(model(row[None]).logits[0].double(), -1)
            q = torch.log_softmax(reference(row[None]).logits[0].double(), -1)
        nll = base = kl = 0.0
        for t in range(T - 1):
            nll -= float(p[t, row[t + 1]])
            base -= float(q[t, row[t + 1]])
            kl += sum(float(q[t, v].exp() * (q[t, v] - p[t, v])) for v in range(tiny.VOCAB))
        nlls.append(nll / (T - 1))
        bases.append(base / (T - 1))
        kls.append(kl / (T - 1))
    return nlls, bases, kls


@pytest.mark.parametrize("chunk", [1 << 24, tiny.VOCAB * 5])
def test_figures_equal_their_definitions(
    ids: Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_VALUES", chunk)
    reference, model = tiny.tiny_model("llama", 0), tiny.tiny_model("llama", 1)
    nlls, bases, kls = figures_ref(model, reference, ids)
    found = evaluate({"2": model, "same": reference}, reference, ids, progress=False)
    two, same = found["bits"]["2"], found["bits"]["same"]
    assert two["per_window"]["nll"] == pytest.approx(nlls, rel=1e-5)
    assert two["per_window"]["kl"] == pytest.approx(kls, rel=1e-5)
    assert found["reference"]["per_window"] == pytest.approx(bases, rel=1e-5)
    assert two["kl"] == pytest.approx(sum(kls) / N, rel=1e-5)
    assert two["ppl"] == pytest.approx(math.exp(sum(nlls) / N), rel=1e-5)
    assert two["excess"] == pytest.approx((sum(nlls) - sum(bases)) / N, rel=1e-4)
    assert same["kl"] == pytest.approx(0, abs=1e-7)
    assert same["excess"] == pytest.approx(0, abs=1e-6)
    low, high = two["kl_interval"]
    assert min(kls) <= low <= two["kl"] <= high <= max(kls)
    assert (found["seq_len"], found["windows"]) == (T, N)
    json.dumps(found)


def test_without_reference_and_with_plain_functions(ids: Tensor) -> None:
    def uniform(window: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(1, window.shape[1], 50, dtype=torch.bfloat16))

    found = evaluate({"u": uniform}, None, ids % 50, progress=False)
    assert found["reference"] is None
    assert found["bits"]["u"]["ppl"] == pytest.approx(50)
    assert "kl" not in found["bits"]["u"]
    as_tensor = evaluate({"u": lambda w: uniform(w).logits}, uniform, ids % 50, progress=False)
    assert as_tensor["bits"]["u"]["kl"] == pytest.approx(0, abs=1e-7)


def test_a_model_that_reuses_its_output_is_harmless(ids: Tensor) -> None:
    """The reference's logits are normalised in place; later windows must not suffer."""
    model = tiny.tiny_model("llama", 0)
    once = evaluate({}, model, ids, progress=False)["reference"]["per_window"]
    alone = [
        evaluate({}, model, ids[w : w + 1], progress=False)["reference"]["nll"] for w in range(N)
    ]
    assert once == pytest.approx(alone, rel=1e-6)


def test_refusals(ids: Tensor) -> None:
    def outputs(size: int) -> object:
        return lambda window: torch.zeros(1, window.shape[1], size)

    with pytest.raises(CalibrationError, match="400 outputs and its reference 500"):
        evaluate({"a": outputs(400)}, outputs(500), ids, progress=False)
    with pytest.raises(CalibrationError, match="1 tokens"):
        evaluate({"a": outputs(400)}, None, ids[:, :1], progress=False)


def test_bootstrap_covers_the_mean() -> None:
    """A 95 % interval from 30 draws of a known distribution holds its mean most of the time."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for trial in range(100):
        low, high = bootstrap_interval(torch.randn(30, generator=generator) + 2, trial, 500)
        hits += low < 2 < high
    assert 87 <= hits <= 99
    values = torch.arange(10.0)
    assert bootstrap_interval(values, 1) == bootstrap_interval(values, 1)
    assert bootstrap_interval(values, 1) != bootstrap_interval(values, 2)
    assert bootstrap_interval(torch.ones(1)) is None
    assert bootstrap_interval(torch.full((5,), 0.25)) == [0.25, 0.25]


# ---- generation ----------------------------------------------------------------------------


def test_generate_greedy_and_seeded() -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer()
    out = generate(model, tokenizer, "the river", max_new_tokens=5)
    ids = tokenizer("the river", return_tensors="pt").input_ids
    expected = ids
    with torch.no_grad():
        for _ in range(out.new_tokens):
            step = model(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, step], 1)
    new = expected[0, ids.shape[1] :]
    assert out.text == tokenizer.decode(new, skip_special_tokens=True)
    assert out.prompt_tokens == ids.shape[1]
    sampled = [
        generate(model, tokenizer, "the", max_new_tokens=8, temperature=1.0, seed=s).text
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_chat_uses_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer(bos=True, chat=True)
    seen: list[Tensor] = []
    original = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kw: seen.append(kw["input_ids"]) or original(**kw)
    )
    generate(model, tokenizer, "the river", max_new_tokens=2, chat=True)
    assert tokenizer.decode(seen[0][0]) == "<user>the river</s><assistant>"


def test_generate_refusals() -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer()
    with pytest.raises(DropError, match="chat template"):
        generate(model, tokenizer, "a", chat=True)
    for bad, why in (
        ({"prompt": ""}, "prompt is empty"),
        ({"max_new_tokens": 0}, "at least one token"),
        ({"temperature": -1.0}, "a temperature of 0 or"),
    ):
        with pytest.raises(DropError, match=why):
            generate(model, tokenizer, **{"prompt": "a", **bad})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_that_are_no_numbers(temperature: float) -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericError, match="NaN or infinity"):
        generate(model, tokenizer, "a", temperature=temperature)
