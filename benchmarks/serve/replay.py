"""What a server answered under load, computed again here: is it the same, what did it cost?

Every greedy answer is computed once more from the same views, one request alone on a cache of its
own, with the same switches of precision. Two things come of it:

- *Corrupted* are the answers whose text differs. A prompt that the server continued from a kept
  cache, or took in pieces, went through matrix products of another shape than here, and torch
  rounds those differently: where the two likeliest tokens are as near as that rounding, either may
  come. So the gap between them, at the first token that differs, is told for each such answer.
- The *price of shedding*: KL(original || level that answered), mean over the tokens of all answers,
  beside that of the highest level on the same tokens. The original is the model before it was
  quantized.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from load_client import Answer
from torch.nn.functional import kl_div, log_softmax

from dropbydrop.checkpoint import Checkpoint
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.runtime.load import load_views


@dataclass
class Replay:
    """One answer, computed here: its text, token by token, and what its levels cost."""

    texts: list[str]  # of the first 1, 2, ... tokens
    gaps: list[float]  # between the two largest logits
    kl: float  # nats, sum over tokens
    highest: float  # the same of the highest level

    def gap(self, text: str) -> float:
        """Gap between the likeliest tokens where `text` first differs."""
        same = (
            i for i, made in enumerate(self.texts) if not text.startswith(made.rstrip("\ufffd"))
        )
        return self.gaps[next(same, len(self.gaps) - 1)]


class Judge:
    """Replays answers of the checkpoint `out` against its views; `original`: the model before."""

    def __init__(self, out: str, original: Any) -> None:
        views = load_views(Checkpoint.open(out))
        self.views = {int(p): model for p, (_, model) in views.items()}
        self.original = original
        self.tokenizer = load_tokenizer(out)
        self.known: dict[tuple[str, int, str], Replay] = {}
        self.sure: dict[tuple[Any, ...], Any] = {}

    def judge(self, answers: list[Answer]) -> dict[str, Any]:
        """Counts, and KL in nats a token, of the answers that came whole."""
        differ, tokens, kl, highest = [], 0, 0.0, 0.0
        whole = [answer for answer in answers if answer.failure is None]
        begun = time.monotonic()
        for i, answer in enumerate(whole):
            key = (answer.prompt, answer.tokens, str(answer.switches))
            if key not in self.known:
                self.known[key] = self.replay(answer)
                print(
                    f"replayed {i + 1}/{len(whole)}, {time.monotonic() - begun:.0f} s",
                    file=sys.stderr,
                )
            here = self.known[key]
            if here.texts[-1] != answer.text:
                differ.append(here.gap(answer.text))
            tokens += answer.tokens
            kl += here.kl
            highest += here.highest
        return {
            "corrupted": len(differ), "gaps": [round(gap, 6) for gap in differ],
            "different_answers": len(self.known), "tokens": tokens,
            "kl": kl / max(1, tokens), "kl_highest": highest / max(1, tokens),
        }  # fmt: skip

    @torch.inference_mode()
    def replay(self, answer: Answer) -> Replay:
        messages = [{"role": "user", "content": answer.prompt}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        prompt = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        new, cache, made, rows = prompt, None, [], []
        bits = {int(at): int(level) for at, level in answer.switches}
        model = self.views[bits[0]]
        while len(made) < answer.tokens:
            model = self.views[bits[len(made)]] if len(made) in bits else model
            result = model(
                torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = result.past_key_values
            rows.append(result.logits[0, -1].float())
            new = [int(rows[-1].argmax())]
            made += new
        best = torch.stack(rows).topk(2).values
        right, high = self.references(prompt, made)
        decode = self.tokenizer.decode
        return Replay(
            [decode(made[: i + 1], skip_special_tokens=True) for i in range(len(made))],
            (best[:, 0] - best[:, 1]).tolist(),
            divergence(right, torch.stack(rows)),
            high,
        )

    def references(self, prompt: list[int], made: list[int]) -> tuple[torch.Tensor, float]:
        """Logits of the original on the tokens made, and the KL of the highest level there."""
        key = (*prompt, -1, *made)
        if key not in self.sure:
            ids, keep = torch.tensor([prompt + made[:-1]]), len(made)
            right = self.original(ids, logits_to_keep=keep).logits[0].float()
            high = self.views[max(self.views)](ids, logits_to_keep=keep).logits[0].float()
            self.sure[key] = right, divergence(right, high)
        return self.sure[key]


def divergence(right: torch.Tensor, other: torch.Tensor) -> float:
    """KL(right || other) in nats, summed over the rows of two tensors of logits."""
    logs = log_softmax(other.double(), -1), log_softmax(right.double(), -1)
    return float(kl_div(*logs, reduction="sum", log_target=True))


def levels(answers: list[Answer]) -> Counter[float]:
    """Tokens answered at each level."""
    found: Counter[float] = Counter()
    for answer in answers:
        ends = [*[at for at, _ in answer.switches[1:]], answer.tokens]
        for (at, bits), end in zip(answer.switches, ends, strict=True):
            found[bits] += int(end - at)
    return found
