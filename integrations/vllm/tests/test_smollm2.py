"""SmolLM2 at every level: the greedy tokens of transformers up to ties, logprobs within 1e-2.

DROPBYDROP_SMOLLM2 names the checkpoint; `make test-vllm` quantizes one. Without it nothing runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dropbydrop
from engines import NEAR, TIE, ask, engine

NEW = 16  # tokens
TEXTS = (
    "The sea is",
    "Once upon a time there was a small",
    "Water boils at a temperature of",
    "The capital of France is",
    "def fibonacci(n):",
    "In the beginning of the twentieth century",
    "A recipe for bread needs",
    "The moon moves around the earth because",
)

FOLDER = os.environ.get("DROPBYDROP_SMOLLM2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="DROPBYDROP_SMOLLM2 names no checkpoint"),
]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tokens_and_logprobs(bits: int) -> None:
    folder = Path(str(FOLDER))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    with engine(folder, bits, block_size=32) as llm:
        answers = ask(llm, prompts, new=NEW)
    model = dropbydrop.load(folder, bits=bits, dtype="float32").dequantize()
    same = 0
    for answer in answers:
        found = model.generate(
            torch.tensor([answer.prompt]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0, len(answer.prompt) :].tolist()
        logprobs = torch.stack(found.logits)[:, 0].log_softmax(-1)
        # equal as far as the two tokens that differ first are no tie
        equal = next((i for i, t in enumerate(tokens) if t != answer.tokens[i]), NEW)
        mine = logprobs.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        if equal < NEW:
            margin = float(logprobs[equal].max() - mine[equal])
            print(f"{bits} bits: token {equal + 1} is a tie within {margin:.5f}")
            assert margin < TIE
        worst = float((mine - torch.tensor(answer.logprobs)).abs()[: equal + 1].max())
        print(f"{bits} bits: {equal} of {NEW} tokens, logprobs off by at most {worst:.5f}")
        assert worst < NEAR
        same += equal == NEW
    assert same >= len(TEXTS) - 1  # and they are rare
