"""Weights of tokens from gradients: block by block against the whole model's own backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dropbydrop.models import token_gradients
from dropbydrop.models.block_runner import BlockRunner
from dropbydrop.models.token_gradients import TokenGradients, _score
from tiny import VOCAB, save_tiny

FAMILIES = ("llama-tied", "gemma2", "qwen3")


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bfloat16, and with a head that takes several slabs of tokens."""
    monkeypatch.setattr(token_gradients, "multiplies_bfloat16", lambda device: False)
    monkeypatch.setattr(token_gradients, "LOGIT_VALUES", 5 * VOCAB)


def block_by_block(folder: Path, ids: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Module -> squared gradients of its outputs, [n, T]."""
    runner = BlockRunner.open(folder)
    gradients = TokenGradients(runner, seed)
    states = [runner.embed(ids)]
    for i in range(runner.num_blocks):
        runner.block(i)
        states.append(gradients.forward(i, states[-1]))
    gradient = gradients.head(states.pop(), 0)
    found: dict[str, torch.Tensor] = {}
    for i in reversed(range(runner.num_blocks)):
        gradient, squares = gradients.block(i, runner.block(i), states.pop(), gradient)
        found |= squares
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_models_own_backward_pass(tmp_path: Path, family: str) -> None:
    save_tiny(tmp_path, family)
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
    found = block_by_block(tmp_path, ids, seed=5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    outputs: dict[str, torch.Tensor] = {}

    def hook(name: str) -> object:
        def keep(module: nn.Module, args: object, out: torch.Tensor) -> None:
            out.retain_grad()
            outputs[name] = out

        return model.get_submodule(name).register_forward_hook(keep)

    for name in found:
        hook(name)
    log_p = torch.log_softmax(model(ids).logits, -1)
    labels = torch.stack([drawn(log_p[w].exp(), 5 * 1_000_003 + w) for w in range(len(ids))])
    log_p.gather(-1, labels[..., None]).sum().backward()
    linears = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n
    ]
    assert sorted(found) == sorted(linears)
    for name, squares in found.items():
        expected = outputs[name].grad.square().sum(-1)
        torch.testing.assert_close(squares, expected, rtol=1e-3, atol=1e-9)


def drawn(p: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels of one window, p [T, vocab], by walking along the probabilities."""
    draws = torch.rand(len(p), 1, generator=torch.Generator().manual_seed(seed))[:, 0].tolist()
    labels = []
    for row, draw in zip(p.detach(), draws, strict=True):
        ends = row.cumsum(0)
        labels.append(next(k for k, end in enumerate(ends.tolist()) if draw * ends[-1] < end))
    return torch.tensor(labels)


def test_labels_are_drawn_from_the_model() -> None:
    """The score has mean zero under its own labels, and its labels the model's frequencies."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(20_000, 4).clone()
    p = torch.softmax(logits[0], -1)
    score = _score(logits, torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0)))
    assert score.sum(1).abs().max() < 1e-5
    frequencies = (score + p > 0.5).float().mean(0)
    assert (frequencies - p).abs().max() < 0.012
    assert (
        float(_score(logits[:1], torch.tensor([[0.9999999]]))[0, 3]) > 0
    )  # the last, never past it
