"""Sequences at several precisions in one pass over the planes: the bits of each one alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import dropbydrop
import tiny
from dropbydrop.checkpoint import Checkpoint
from dropbydrop.kernels.cpu.step import DecodeStep
from dropbydrop.planning.plan import Plan
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.load import load_views

pytestmark = pytest.mark.skipif(
    fused_decode.how_config({"model_type": "llama"}).startswith("through"),
    reason="the native library is not built",
)
LENGTHS = [5, 12, 1, 9, 3, 7]


def prompted(models: list[Any], static: bool) -> list[Any]:
    """A cache for each model, with a prompt of another length."""
    caches = []
    for model, length in zip(models, LENGTHS, strict=False):
        cache: Any = DynamicCache(config=model.config)
        if static:
            cache = StaticCache(config=model.config, max_cache_len=length + 8)
        ids = torch.arange(1, length + 1)[None]
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        caches.append(cache)
    return caches


def alone(models: list[Any], static: bool) -> list[list[torch.Tensor]]:
    """Three next logits of each sequence, each in passes of its own."""
    found: list[list[torch.Tensor]] = []
    for model, length, cache in zip(models, LENGTHS, prompted(models, static), strict=False):
        found.append([])
        for step in range(3):
            ids = torch.tensor([[length + step]])
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            found[-1].append(out.logits[0, -1])
    return found


def together(models: list[Any], static: bool) -> list[list[torch.Tensor]]:
    caches = prompted(models, static)
    found: list[list[torch.Tensor]] = [[] for _ in models]
    for step in range(3):
        ids = [length + step for length in LENGTHS[: len(models)]]
        logits = fused_decode.decode_together(models, ids, caches)
        assert logits is not None
        for rows, row in zip(found, logits, strict=True):
            rows.append(row)
    for cache, length in zip(caches, LENGTHS, strict=False):
        assert cache.get_seq_length() == length + 3
    return found


@pytest.fixture(scope="module", params=[8, (3, 4, 5)], ids=["8-bit-head", "head-in-planes"])
def views(request: Any, tmp_path_factory: pytest.TempPathFactory, code: str) -> dict[float, Any]:
    """By bits; with a head in planes, each level has one of its own."""
    out = tmp_path_factory.mktemp("views") / code
    tiny.write_checkpoint(out, code=code, embedding_bits=request.param)
    found: dict[float, Any] = {
        int(bits): model for bits, (_, model) in load_views(Checkpoint.open(out)).items()
    }
    checkpoint = Checkpoint.open(out)
    names = [group.name for group in checkpoint.quantization.input_groups]
    uneven = {name: 2 + i % 3 for i, name in enumerate(names)}
    found[2.5] = dropbydrop.view(found[4], plan=Plan(checkpoint.fingerprint, uneven))
    return found


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bits", [(2, 4, 3, 2, 4, 3), (3, 2), (2, 2.5, 4, 2.5, 3)])
def test_the_same_bits_as_alone(
    views: dict[float, Any], bits: tuple[float, ...], static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [views[p] for p in bits]
    with torch.inference_mode():
        want = alone(models, static)
        calls, plain = [], DecodeStep.__call__
        monkeypatch.setattr(
            DecodeStep,
            "__call__",
            lambda self, x, places: (calls.append(len(places)), plain(self, x, places))[1],
        )
        got = together(models, static)
    assert calls[-3:] == [len(bits)] * 3  # one pass for all
    for rows, right in zip(got, want, strict=True):
        for row, other in zip(rows, right, strict=True):
            assert torch.equal(row, other)
    assert not torch.equal(want[0][0], want[1][0])


def test_other_codes_do_not_share_a_pass(views: dict[float, Any], tmp_path: Path) -> None:
    other = dropbydrop.load(tiny.write_checkpoint(tmp_path / "other"), bits=3)
    models = [views[2], other]
    with torch.inference_mode():
        caches = prompted(models, True)
        before = caches[0].layers[0].keys.clone()
        assert fused_decode.decode_together(models, [1, 2], caches) is None
    assert torch.equal(caches[0].layers[0].keys, before)
    assert [cache.get_seq_length() for cache in caches] == LENGTHS[:2]
