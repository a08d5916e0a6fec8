"""A batch through torch against each sequence alone, family by family."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GPTNeoConfig, GPTNeoForCausalLM
from transformers.cache_utils import DynamicLayer

import family_models
from dropbydrop.runtime import torch_batch
from dropbydrop.runtime.torch_batch import Row, TorchBatch, fitting, refusal, turns
from tiny import EXPERTS, FAMILIES, VOCAB, tiny_model

STATES = ["qwen3_5-moe", "granitemoehybrid", "lfm2-moe"]  # which are no keys and values
SERVED = [name for name in (*FAMILIES, *EXPERTS) if name not in STATES]
WRAPPED = ["gemma3n_text", "gemma4_e", "gpt_neox", "smollm3", "qwen2_5_vl", "gemma4"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Text:
    """A sequence with tokens drawn in advance: alone, and in a batch."""

    def __init__(self, model: Any, seed: int, prompt: int, most: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        high = min(VOCAB, model.config.get_text_config().vocab_size) - 6
        self.ids = torch.randint(3, high, (prompt + most,), generator=generator).tolist()
        self.prompt, self.at, self.row = prompt, prompt, None
        self.found: list[Tensor] = []

    def start(self, model: Any) -> None:
        cache = DynamicCache(config=model.config)
        forward(model, cache, self.ids[: self.prompt])
        self.row = Row(cache, self.prompt)

    def alone(self, model: Any) -> list[Tensor]:
        cache = DynamicCache(config=model.config)
        forward(model, cache, self.ids[: self.prompt])
        return [forward(model, cache, [token]) for token in self.ids[self.prompt :]]


def forward(model: Any, cache: Any, ids: list[int]) -> Tensor:
    given = torch.tensor([ids])
    return model(input_ids=given, past_key_values=cache, use_cache=True).logits[0, -1].float()


def advance(batch: TorchBatch, model: Any, texts: list[Text]) -> None:
    rows: Any = [text.row for text in texts]
    logits = batch.step(model, rows, [text.ids[text.at] for text in texts])
    for text, row in zip(texts, logits, strict=True):
        text.at += 1
        text.found.append(row)


def compare(model: Any, texts: list[Text], share: float = 2e-5) -> None:
    for text in texts:
        want = text.alone(model)
        assert len(text.found) == len(want)
        for found, expected in zip(text.found, want, strict=True):
            assert (found - expected).norm() <= share * expected.norm()


def together(model: Any, sizes: list[tuple[int, int, int]], batch: TorchBatch) -> list[Text]:
    """Texts of (round to start in, tokens of the prompt, tokens after it), each left at its end."""
    texts = [Text(model, i, prompt, most) for i, (_, prompt, most) in enumerate(sizes)]
    for number in range(max(start + most for start, _, most in sizes)):
        present = [
            text
            for text, (start, _, most) in zip(texts, sizes, strict=True)
            if start <= number < start + most
        ]
        for text, (start, _, _) in zip(texts, sizes, strict=True):
            if start == number:
                text.start(model)
        if present:
            advance(batch, model, present)
        for text in present:
            if text.at == len(text.ids):
                text.row.leave()
    return texts


COMING_AND_GOING = [(0, 4, 9), (1, 13, 3), (1, 2, 24), (6, 21, 5), (7, 1, 12), (15, 30, 6)]


def model_of(family: str) -> Any:
    return tiny_model(family) if family in (*FAMILIES, *EXPERTS) else family_models.build(family)


@pytest.mark.parametrize("family", [*SERVED, *WRAPPED])
def test_each_gets_what_it_gets_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts longer than the windows join and leave; columns run out every few tokens."""
    monkeypatch.setattr(torch_batch, "BLOCK", 8)
    model, batch = model_of(family), TorchBatch()
    why = refusal(model)
    if why is not None and not torch_batch._EMPTY:  # the first 5.x have other caches for some
        pytest.skip(f"takes turns with transformers {transformers.__version__}: {why}")
    assert why is None
    share = 5e-5 if family == "granitemoe" else 2e-5  # whose logits are multiplied; 2.3e-5 was seen
    compare(model, together(model, COMING_AND_GOING, batch), share)
    assert batch.shape == (0, 0)


def test_rows_and_columns_are_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing happens at sizes, not at every token; what a long text took is given back."""
    model, batch, shapes = tiny_model("gemma3"), TorchBatch(), []
    monkeypatch.setattr(torch_batch, "BLOCK", 16)
    plain = TorchBatch._pack
    monkeypatch.setattr(
        TorchBatch, "_pack", lambda self, *args: (shapes.append(args[-2:]), plain(self, *args))[1]
    )
    compare(model, together(model, [(0, 5, 30), (3, 100, 4), (5, 3, 8), (20, 2, 2)], batch))
    assert shapes == [
        (1, 16), (2, 112), (3, 112), (2, 32), (1, 32), (2, 48), (1, 48)
    ]  # fmt: skip


def test_sizes_that_fit() -> None:
    assert fitting([1]) == (1, 128)
    assert fitting([1, 128, 2, 3, 4]) == (6, 256)
    assert fitting([193] * 9) == (12, 384)


def test_a_text_moves_between_batches_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its precision changes: on the same keys and values, in any order of the batches."""
    monkeypatch.setattr(torch_batch, "BLOCK", 8)
    first, other = tiny_model("gemma3"), tiny_model("gemma3", seed=1)
    for order in (0, 1):
        stays, moves, joins = (Text(first, i, 5 + 4 * i, 20) for i in range(3))
        a, b = TorchBatch(), TorchBatch()
        for text, model in ((stays, first), (moves, first), (joins, other)):
            text.start(model)
        for number in range(20):
            here = [stays] if 6 <= number < 13 else [stays, moves]
            there = [moves, joins] if 6 <= number < 13 else [joins]
            steps = [(a, first, here), (b, other, there)]
            for batch, model, texts in steps[:: 1 - 2 * order]:
                advance(batch, model, texts)
        compare(first, [stays])
        compare(other, [joins])
        cache = DynamicCache(config=first.config)
        forward(first, cache, moves.ids[:9])
        for number, found in enumerate(moves.found):
            model = other if 6 <= number < 13 else first
            expected = forward(model, cache, [moves.ids[9 + number]])
            assert (found - expected).norm() <= 2e-5 * expected.norm()


def test_who_leaves_in_between_harms_nobody() -> None:
    model, batch = tiny_model("phi3"), TorchBatch()
    texts = [Text(model, i, 4 + i, 12) for i in range(5)]
    for text in texts:
        text.start(model)
    for number in range(12):
        if number == 5:
            texts[1].row.leave()
            texts[1].row.leave()  # a second time is harmless
            assert len(batch) == 4
            gone = texts.pop(1)
        advance(batch, model, texts)
    assert len(gone.found) == 5
    assert batch.shape[0] == 4
    compare(model, texts)


def test_memory_is_given_back() -> None:
    model, batch = tiny_model("gemma3"), TorchBatch()
    texts = [Text(model, i, 4, 2) for i in range(3)]
    for text in texts:
        text.start(model)
    advance(batch, model, texts)
    keys = [weakref.ref(layer.keys) for layer in batch._cache.layers]
    assert batch.shape == (3, 128)
    for text in texts:
        text.row.leave()
    gc.collect()
    assert all(ref() is None for ref in keys)
    assert (len(batch), batch.shape) == (0, (0, 0))


@pytest.mark.parametrize("family", STATES)
def test_states_are_refused(family: str) -> None:
    assert "LinearAttention" in str(refusal(tiny_model(family)))


def test_masks_by_the_number_of_the_column_are_refused() -> None:
    """GPT-Neo takes the last column for that of the query; two short texts do not show it."""
    config = GPTNeoConfig(
        vocab_size=384, hidden_size=48, num_layers=2, attention_types=[[["global", "local"], 1]],
        num_heads=4, intermediate_size=80, window_size=64, max_position_embeddings=256,
    )  # fmt: skip
    assert "masks of its own" in str(refusal(GPTNeoForCausalLM(config).eval()))


def test_frequencies_that_depend_on_the_batch_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert "rotary" in str(refusal(tiny_model("llama", rope_parameters=rope)))
    assert turns(tiny_model("gemma3")) == ()


def test_frequencies_of_long_texts() -> None:
    """Phi-3's change in mid-text: two batches, one for each side of the turn, and a text that goes
    from one to the other."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.3 * i for i in range(8)],
        "original_max_position_embeddings": 16,
        "factor": 16.0,
    }
    model = tiny_model(
        "phi3", rope_parameters=rope, hidden_size=64, original_max_position_embeddings=16
    )
    assert refusal(model) is None
    assert turns(model) == (16,)
    texts = [Text(model, 0, 4, 10), Text(model, 1, 12, 10), Text(model, 2, 30, 10)]
    for text in texts:
        text.start(model)
    batches = TorchBatch(), TorchBatch()
    for _ in range(10):
        sides = [[t for t in texts if (t.at + 1 > 16) == long] for long in (False, True)]
        for batch, present in zip(batches, sides, strict=True):
            advance(batch, model, present)
    compare(model, texts)
    mixed = [Text(model, 0, 4, 3), Text(model, 2, 30, 3)]  # what would be wrong
    batch = TorchBatch()
    for text in mixed:
        text.start(model)
    advance(batch, model, mixed)
    want = texts[0].found[0]
    assert (mixed[0].found[0] - want).norm() > 1e-2 * want.norm()


def test_a_batch_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken on trust: a model that ignores the mask, and one that fails."""
    model = tiny_model("llama")
    plain = model.forward

    def forgetful(attention_mask: Any = None, **kwargs: Any) -> Any:
        return plain(**kwargs)

    monkeypatch.setattr(model, "forward", forgetful)
    assert "off" in str(refusal(model))

    def broken(attention_mask: Any = None, **kwargs: Any) -> Any:
        return plain(**kwargs) if attention_mask is None else 1 / 0

    monkeypatch.setattr(model, "forward", broken)
    assert "ZeroDivisionError" in str(refusal(model))


def test_layers_of_unknown_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is a kind of a plain one too: it may keep more."""

    class Indexed(DynamicLayer):
        pass

    model = tiny_model("llama")
    made = DynamicCache(config=model.config)
    made.layers[1] = Indexed()
    monkeypatch.setattr(torch_batch, "DynamicCache", lambda config: made)
    assert "Indexed" in str(refusal(model))
