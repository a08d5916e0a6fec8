"""SmolLM2 at every level: the same greedy tokens as transformers, and logprobs within 1e-2.

DROPBYDROP_SMOLLM2 names the checkpoint; `make test-vllm` quantizes one. Without it nothing runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import dropbydrop
from engines import NEAR, ask, engine

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
        answers = ask(llm, prompts, new=16)
    model = dropbydrop.load(folder, bits=bits, dtype="float32").dequantize()
    for answer in answers:
        found = model.generate(
            torch.tensor([answer.prompt]),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0, len(answer.prompt) :].tolist()
        logprobs = torch.stack(found.logits)[:, 0].log_softmax(-1)
        mine = logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert answer.tokens == tokens
        worst = float((mine - torch.tensor(answer.logprobs)).abs().max())
        print(f"{bits} bits: logprobs off by at most {worst:.5f}")
        assert worst < NEAR
