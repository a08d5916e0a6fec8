"""Whether a family continues a cache, and how it has to be called for that."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import family_models
from dropbydrop.data.kv_slots import cache_with_room
from dropbydrop.models.cached import continue_cache, wants_positions
from dropbydrop.system.errors import UnsupportedModelError
from tiny import tiny_model

TOLD = {"bamba": True, "granitemoehybrid": False, "gemma3_text": False, "qwen3_5_text": False}


def dynamic(model: Any, tokens: int) -> DynamicCache:
    return DynamicCache(config=model.config)


@pytest.mark.parametrize("family", TOLD)
@pytest.mark.parametrize("make", [dynamic, cache_with_room])
def test_pieces_are_the_whole(family: str, make: Any) -> None:
    model = family_models.build(family).eval()
    told = wants_positions(model, partial(make, model))
    assert told == TOLD[family]
    ids = torch.randint(3, 90, (2, 14), generator=torch.Generator().manual_seed(0))
    cache, found, at = make(model, 14), [], 0
    with torch.inference_mode():
        for n in (5, 1, 6, 1, 1):
            found.append(continue_cache(model, ids[:, at : at + n], cache, at, told))
            at += n
        want = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-3, atol=1e-3 * float(want.std()))


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "minimax"])
def test_other_caches_are_refused(family: str) -> None:
    """Two of these swallow the argument, and would write every token without a context."""
    family_models.require(family)
    config = AutoConfig.for_model(family, **family_models.SMALL)
    model = family_models.fill(AutoModelForCausalLM.from_config(config)).eval()
    with pytest.raises(UnsupportedModelError, match="cannot continue a text from a cache of ours"):
        wants_positions(model, partial(dynamic, model))


def test_plain_models_need_nothing() -> None:
    model = tiny_model("llama")
    assert not wants_positions(model, partial(dynamic, model))
