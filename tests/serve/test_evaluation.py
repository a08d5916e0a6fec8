"""lm-evaluation-harness through the server gives the numbers that it gives in this process.

The harness' own client (`local-completions`) makes the requests and reads the answers, with prompts
as tokens, `echo` and `logprobs`. The reference is one forward pass of the view itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dropbydrop.runtime.load import load

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
completions = pytest.importorskip("lm_eval.models.openai_completions")

ITEMS = [  # a context, and the continuations whose likelihoods decide an item
    ("the river runs past the", [" old mill", " sea", " morning"]),
    ("a small model reads a small", [" text about the sea", " harbour"]),
    ("one hundred and twenty three ships left the", [" harbour in the morning", " mill"]),
]


@pytest.mark.parametrize("bits", [2, 4])
def test_likelihoods(server: Any, chat_folder: Any, bits: int) -> None:
    harness = completions.LocalCompletionsAPI(
        model=f"{server.service.served.name}:{bits}bit",
        base_url=f"{server.address}/v1/completions",
        tokenizer=str(chat_folder),
        tokenizer_backend="huggingface",
        max_length=256,
        batch_size=2,
    )
    model, tokenizer, requests, wanted = load(chat_folder, bits), harness.tokenizer, [], []
    for context, continuations in ITEMS:
        for continuation in continuations:
            head = tokenizer.encode(context, add_special_tokens=False)
            whole = tokenizer.encode(context + continuation, add_special_tokens=False)
            requests.append(((context, continuation), head, whole[len(head) :]))
            wanted.append(likelihood(model, head, whole[len(head) :]))
    found = harness._loglikelihood_tokens(requests)
    for (value, greedy), (sum_, likeliest) in zip(found, wanted, strict=True):
        assert value == pytest.approx(sum_, abs=1e-4)
        assert greedy == likeliest


@torch.inference_mode()
def likelihood(model: Any, head: list[int], tail: list[int]) -> tuple[float, bool]:
    """Log-probability of `tail` after `head`, and whether it is what greedy decoding gives."""
    logits = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].float()
    chosen = torch.tensor(tail)
    each = logits.log_softmax(-1).gather(1, chosen[:, None])
    return float(each.sum()), bool((logits.argmax(-1) == chosen).all())
