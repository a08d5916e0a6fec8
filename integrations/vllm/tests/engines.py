"""Toy checkpoints, engines on them, and what transformers says to the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import dropbydrop
import tiny

# head_dim: vLLM's attention on CPUs has no smaller one; d = 96 = 32 x 3, 160 = 32 x 5
TOY: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "dtype": "float32",
}
NEW = 12  # tokens that every request asks for
NEAR = 1e-2  # of logprobs
# Two tokens are a tie within this difference of their logits: the look-up tables of few rows round
# to 8 bits, which moves logprobs of SmolLM2 by up to .0033.
TIE = 5e-3
PROMPTS = [[1, 5, 9, 30, 200 + i, 17 + 11 * i] for i in range(8)]


def toy(
    folder: Path, family: str = "llama-tied", code: str = "bytes", embedding_bits: Any = 8
) -> Path:
    """A checkpoint of a random model of a family, with random codes and the levels 2, 3, 4."""
    changes = dict(TOY)
    if "query_pre_attn_scalar" in tiny.FAMILIES[family][1]:
        changes["query_pre_attn_scalar"] = changes["head_dim"]
    # Gemma multiplies its embedding by sqrt(d): with wide weights nothing else would matter
    gain = 0.64 if family.startswith("gemma") else 1.5
    model = tiny.tiny_model(family, gain=gain, **changes)
    return tiny.write_checkpoint(folder, model, code=code, embedding_bits=embedding_bits)


@contextmanager
def engine(folder: Path, bits: int | None = None, **settings: Any) -> Iterator[LLM]:
    """An engine of vLLM in this process; eager unless told otherwise."""
    options = {} if bits is None else {"additional_config": {"dropbydrop": {"bits": bits}}}
    defaults = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "seed": 0}
    defaults["max_num_batched_tokens"] = 512  # vLLM warms up with so many
    llm = None
    try:
        llm = LLM(str(folder), **{**defaults, "enforce_eager": True, **options, **settings})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Answer:
    """What an engine answered to a prompt: tokens, their logprobs, prompt tokens from its cache."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    cached: int


def ask(
    llm: LLM,
    prompts: Sequence[list[int]] = PROMPTS,
    new: int | Sequence[int] = NEW,
    bits: Sequence[object] | None = None,
) -> list[Answer]:
    """Greedy answers to prompts that are sent together; `new` and `bits` may differ for each."""
    lengths = [new] * len(prompts) if isinstance(new, int) else new
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=length,
            logprobs=1,
            ignore_eos=True,
            extra_args=None if level is None else {"bits": level},
        )
        for length, level in zip(lengths, bits or [None] * len(prompts), strict=True)
    ]
    inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    answers = []
    for prompt, result in zip(prompts, llm.generate(inputs, sampling, use_tqdm=False), strict=True):
        (one,) = result.outputs
        tokens = list(one.token_ids)
        logprobs = [
            seen[token].logprob for seen, token in zip(one.logprobs or [], tokens, strict=True)
        ]
        answers.append(Answer(list(prompt), tokens, logprobs, result.num_cached_tokens or 0))
    return answers


@torch.inference_mode()
def check(answers: Sequence[Answer], folder: Path, bits: int) -> None:
    """Answers are those of transformers with the dense weights of a level, in float32.

    transformers reads the engine's own tokens. Where it would have taken another one, the two were
    a tie.
    """
    model = dropbydrop.load(folder, bits=bits, dtype="float32").dequantize()
    for answer in answers:
        ids = torch.tensor([answer.prompt + answer.tokens])
        found = model(ids).logits[0, len(answer.prompt) - 1 : -1].log_softmax(-1)
        mine = found.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        worst = (mine - torch.tensor(answer.logprobs)).abs().max()
        margin = (found.max(-1).values - mine).max()
        print(f"{bits} bits: logprobs off by at most {worst:.5f}, ties within {margin:.5f}")
        assert worst < NEAR
        assert margin < TIE
