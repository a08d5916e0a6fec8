"""The next token from its logits: one small function a request, with a random generator of its own.

The order is that of transformers' `generate`: penalties and biases on the logits, temperature, the
top k, the smallest set of probability p ("nucleus"), the share of the likeliest (min_p).
Temperature 0 takes the likeliest token. tests/serve/test_sampling.py compares with transformers.

A vocabulary is seldom sorted as a whole: the likeliest `_HEAD` tokens hold top_p of the probability
almost always, and only where they do not everything is sorted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dropbydrop.runtime.generate import check_logits

_HEAD = 512
_RULED_OUT = -9999.0
_COLDEST = 1e-6  # of temperatures but 0; float32 has no quotients by much smaller ones
_CHOICES = 64  # more than a request has continuations, so that seeds do not meet
BOUNDS: dict[str, tuple[float, float]] = {  # what a request, or a model's makers, may ask for
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 is no limit.
        repetition_penalty: divides positive logits of tokens seen, in the prompt too.
        presence_penalty, frequency_penalty: taken off the logits of generated tokens, once, and
            for every time.
        logit_bias: token -> what is added to its logit.
        seed: None draws one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


class Sampler:
    """Chooses the tokens of one continuation. Not for several threads."""

    def __init__(self, sampling: Sampling, prompt: list[int], choice: int = 0) -> None:
        """`choice` numbers the continuations of a request: one seed gives different ones."""
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((_CHOICES * sampling.seed + choice) % (1 << 63))
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set()
        self._counts: dict[int, int] = {}
        bias = sampling.logit_bias
        self._biased = torch.tensor(list(bias), dtype=torch.long)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, logits: Tensor, allowed: Tensor | None = None) -> int:
        """A token for logits float32 [vocabulary], among those that `allowed` bool has.

        Raises:
            NumericError: they are no numbers, or rule out all of these.
        """
        scores = self._adjusted(logits)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        check_logits(scores)
        token = self._choose(scores)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.sampling.repetition_penalty != 1:
            self._seen.add(token)
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Penalties and biases; never in place."""
        asked, scores = self.sampling, logits
        if asked.repetition_penalty != 1 and self._seen:
            ids = torch.tensor(list(self._seen))
            old = scores[ids]
            penalty = asked.repetition_penalty
            scores = scores.index_put((ids,), torch.where(old > 0, old / penalty, old * penalty))
        if (asked.presence_penalty or asked.frequency_penalty) and self._counts:
            ids = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            off = asked.presence_penalty + asked.frequency_penalty * counts
            scores = scores.index_put((ids,), scores[ids] - off)
        if self._biased.numel():
            scores = scores.index_put((self._biased,), scores[self._biased] + self._bias)
        return scores

    def _choose(self, scores: Tensor) -> int:
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        ids, probabilities = candidates(scores, self.sampling)
        drawn = int(torch.multinomial(probabilities, 1, generator=self._generator))
        return drawn if ids is None else int(ids[drawn])


def candidates(scores: Tensor, asked: Sampling) -> tuple[Tensor | None, Tensor]:
    """Tokens that may be drawn and their probabilities, up to a common factor.

    The tokens are None where all may be.
    """
    # from the likeliest on: the quotients of a tiny temperature overflow downwards, to weights of 0
    scores = (scores - scores.max()) / max(asked.temperature, _COLDEST)
    size = scores.numel()
    k = min(asked.top_k or size, size)
    if k == size and asked.top_p >= 1:
        kept = torch.softmax(scores, -1)
        return None, torch.where(kept >= asked.min_p * kept.max(), kept, 0.0)
    values, ids = torch.topk(scores, min(k, _HEAD))
    # the whole of which top_p is a share: the top k, or the vocabulary
    whole = torch.logsumexp(scores if k == size else torch.topk(scores, k).values, -1)
    probabilities = torch.exp(values - whole)
    if probabilities.sum() < asked.top_p and values.numel() < k:
        values, ids = torch.topk(scores, k)
        probabilities = torch.exp(values - whole)
    before = probabilities.cumsum(-1) - probabilities
    keep = before < asked.top_p
    keep[0] = True
    kept = torch.where(keep, probabilities, 0.0)
    return ids, torch.where(kept >= asked.min_p * kept[0], kept, 0.0)


def scores_of(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token, and the `top` likeliest tokens with theirs.

    Of the model itself: before temperature, penalties and biases. logits float32 [vocabulary].
    JSON has no infinity: what a model rules out has OpenAI's -9999.
    """
    logs = torch.log_softmax(logits, -1).clamp(min=_RULED_OUT)
    best: list[tuple[int, float]] = []
    if top:
        values, ids = torch.topk(logs, min(top, logs.numel()))
        best = list(zip(ids.tolist(), values.tolist(), strict=True))
    return float(logs[token]), best
