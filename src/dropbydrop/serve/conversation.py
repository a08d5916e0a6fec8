"""A conversation with one model in this process: one cache, and a precision for every turn.

    talk = Conversation(Precisions("out", None), text, Sampling(temperature=0))
    for piece in talk.answer("Why is the sky blue?", bits=3, most=256):
        ...
    talk.turn                  # what it took
    talk.answer("And at night?", bits=2, most=256)

Only what is new is computed: the tokens of a turn are those of the chat template, and as many of
them as the cache holds already are taken from it, whatever precision computed them. (The server
keeps caches of different precisions apart, as its requests know nothing of each other. Here the
same person has seen the earlier answers.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicLayer

from dropbydrop.data.text_files import check_tokens
from dropbydrop.models.cached import continue_cache
from dropbydrop.models.embeddings import embedded_tokens
from dropbydrop.models.model_config import context_length
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.generate import check_logits
from dropbydrop.system.errors import DropError

from .caches import make_room, new_cache
from .precisions import Precisions
from .sampling import Sampler, Sampling
from .text import Text, TextStream

_CHUNK = 128  # tokens of a prompt that are computed at once
_CONTEXT = 4096  # tokens, of models that set no limit


@dataclass(frozen=True)
class Turn:
    """What an answer took.

    Attributes:
        bits: precision of its tokens.
        prompt: tokens before it; `cached` of them were in the cache.
        tokens: tokens of the answer.
        seconds: from the first token to the last.
        first_seconds: to the first token.
        bytes_per_token: what a token reads.
        reason: "stop", "length", or "interrupted".
    """

    bits: float
    prompt: int
    cached: int
    tokens: int
    seconds: float
    first_seconds: float
    bytes_per_token: int
    reason: str

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first one; None if there are none."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class Conversation:
    """See the module's note. Not for several threads."""

    def __init__(
        self, precisions: Precisions, text: Text, sampling: Sampling, system: str | None = None
    ) -> None:
        """Begin without messages.

        Raises:
            DropError: no chat template.
        """
        if not text.template:
            raise DropError(
                "this model has no chat template, so it knows no turns; continue a text with "
                "`dropbydrop generate`."
            )
        self.precisions, self.text, self.sampling = precisions, text, sampling
        self.context = context_length(precisions.checkpoint.config) or _CONTEXT
        self.turn: Turn | None = None
        self._system = [{"role": "system", "content": system}] if system else []
        own = precisions.base.generation_config.eos_token_id
        self._ends = {own} if isinstance(own, int) else set(own or ())
        self._ends |= {text.tokenizer.eos_token_id} - {None}
        self.reset()

    def reset(self) -> None:
        """Forget all messages, but the system prompt."""
        self.messages: list[dict[str, str]] = list(self._system)
        self._cache: Any = None
        self._seen: list[int] = []  # tokens that the cache holds

    @torch.inference_mode()
    def answer(self, message: str, bits: float, most: int) -> Iterator[str]:
        """The text of an answer as it becomes certain; `turn` is set when it ends.

        Closing the iterator, or an interrupt, keeps what there is of the answer.

        Args:
            bits: a level or an average.
            most: tokens of the answer at most.

        Raises:
            DropError: a precision that is not there, tokens that the model does not know, none at
                all, or no room in its context. The conversation is then as before.
        """
        model = self.precisions.model(bits)
        asked = [*self.messages, {"role": "user", "content": message}]
        prompt = self.text.encode(self.text.chat(asked), special=False)
        check_tokens(torch.tensor(prompt), embedded_tokens(self.precisions.base))
        if not prompt:
            raise DropError(
                "the message and what surrounds it are no tokens: the chat template writes "
                "nothing, or the tokenizer has none of these characters. Say something else."
            )
        room = self.context - len(prompt)
        if room < 1:
            raise DropError(
                f"the conversation has {len(prompt)} tokens, and this model's context "
                f"{self.context}. Begin a new one with /reset."
            )
        began = time.perf_counter()
        logits, cached = self._read(model, prompt)
        first = time.perf_counter()
        sampler, stream = Sampler(self.sampling, prompt), TextStream(self.text, ())
        said, count, reason = "", 0, "interrupted"
        try:
            while True:
                token = sampler(logits)
                if token in self._ends:
                    reason = "stop"
                    break
                count += 1
                piece = stream.push(token)
                said += piece
                yield piece
                if count >= min(most, room):
                    reason = "length"
                    break
                logits = self._forward(model, [token])
            rest = stream.end()
            said += rest
            yield rest
        finally:
            now = time.perf_counter()
            self.messages = [*asked, {"role": "assistant", "content": said}]
            size = self.precisions.bytes_of(bits)
            self.turn = Turn(
                bits, len(prompt), cached, count, now - first, first - began, size, reason
            )

    def _read(self, model: Any, prompt: list[int]) -> tuple[torch.Tensor, int]:
        """Logits of the next token after a prompt, and how many of its tokens were cached."""
        shared = next(
            (i for i, (a, b) in enumerate(zip(prompt, self._seen, strict=False)) if a != b),
            min(len(prompt), len(self._seen)),
        )
        shared = self._cut(min(shared, len(prompt) - 1))
        if self._cache is None:
            native = fused_decode.native(model)
            self._cache = new_cache(model.config, native, len(prompt), self.context)
        for start in range(shared, len(prompt), _CHUNK):
            logits = self._forward(model, prompt[start : start + _CHUNK])
        return logits, shared

    def _cut(self, length: int) -> int:
        """Have the cache forget all after so many tokens; how many it holds now."""
        if self._cache is None:
            self._seen, length = [], 0
        if length == len(self._seen):
            return length
        cache: Any = self._cache
        if isinstance(self._cache, StaticCache):
            for layer in cache.layers:
                layer.cumulative_length.fill_(length)
        elif cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers):
            cache.crop(length - len(self._seen))  # newer releases know how many go, and no length
        else:  # windows forget their beginning, so they cannot be cut
            self._cache, length = None, 0
        self._seen = self._seen[:length]
        return length

    def _forward(self, model: Any, ids: list[int]) -> torch.Tensor:
        """Logits float32 [vocabulary] after more tokens, which the cache then holds."""
        cache, self._cache = self._cache, None  # an interrupt leaves a part of it
        make_room(cache, len(self._seen), len(ids), self.context)
        given, told = torch.tensor([ids]), self.precisions.told
        logits = continue_cache(model, given, cache, len(self._seen), told, 1)[0, -1].float()
        self._seen += ids
        self._cache = cache
        check_logits(logits)
        return logits
