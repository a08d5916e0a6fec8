"""One continuation in the making: its tokens, its cache, and the events that tell of it.

A job is advanced by `turn`, which computes one chunk of the prompt or one token, so that the worker
can go from one job to the next; `advance` computes a token of several jobs in one pass. A job that
was parked has no cache, and reads its prompt and its own tokens again when it goes on. All but
`cancelled` belongs to the worker's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dropbydrop.models.cached import continue_cache
from dropbydrop.runtime import fused_decode
from dropbydrop.runtime.generate import check_logits
from dropbydrop.runtime.torch_batch import Row, TorchBatch

from .caches import KeptCaches, make_room, new_cache, room_of
from .grammar import Grammar
from .sampling import Sampler, scores_of
from .shed import Load
from .text import TextStream

_LIKELY = 1024  # new tokens; more than a new cache has room for
CHUNK = 128  # tokens of a prompt that are computed at once, while the others wait


@dataclass(frozen=True)
class Score:
    """A token with its log-probability (None for the first of a text) and the likeliest ones."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Prompted:
    """The prompt is computed; `scores` are there if they were asked for."""

    index: int
    bits: float
    scores: list[Score] | None


@dataclass(frozen=True)
class Generated:
    """One more token, and the text that became certain with it (often one token late)."""

    index: int
    bits: float
    text: str
    token: int
    score: Score | None


@dataclass(frozen=True)
class Finished:
    """The end of a continuation.

    Attributes:
        reason: "stop" or "length".
        text: what was still held back.
        cached: tokens of the prompt that a kept cache had.
        prompt_seconds, seconds: from the first turn to the first token, and from there to the end.
        switches: (number of the token, bits) where the precision changed; the first is (0, bits).
    """

    index: int
    bits: float
    reason: str
    text: str
    prompt: int
    cached: int
    tokens: int
    prompt_seconds: float
    seconds: float
    switches: list[tuple[int, float]]


@dataclass(frozen=True)
class Failed:
    """The end of a continuation that could not be made; `status` is that of HTTP."""

    index: int
    status: int
    message: str


Event = Prompted | Generated | Finished | Failed


@dataclass(eq=False)
class Job:
    """What is asked, and how far it is.

    Attributes:
        most: new tokens at most; 0 only looks at the prompt.
        top: None for no scores, else how many likeliest tokens come with each.
        score_prompt: whether the tokens of the prompt get scores too.
        ends: tokens that end the text.
        load: what may happen to its precision.
        fixed_at_start: the precision that it begins with is kept.
        grammar: what the text must be.
        emit: called from the worker's thread; must not block.
        told: whether the model is told positions (`wants_positions`).
    """

    index: int
    prompt: list[int]
    most: int
    sampler: Sampler
    stream: TextStream
    ends: frozenset[int]
    load: Load
    emit: Callable[[Event], None]
    top: int | None = None
    score_prompt: bool = False
    fixed_at_start: bool = False  # `auto` with priority: the first precision is kept
    grammar: Grammar | None = None
    told: bool = False
    cancelled: bool = False

    bits: float = 0.0
    tokens: list[int] = field(default_factory=list)
    switches: list[tuple[int, float]] = field(default_factory=list)
    finished: bool = False
    _cache: Any = None
    _row: Row | None = None  # instead of the cache, once it is in a batch through torch
    _length: int = 0  # tokens in the cache
    _again: int = 0  # of its own tokens, those that are read again, behind the prompt
    _cached: int = 0
    _mixed: bool = False  # whether the cache was computed at several precisions
    _scores: list[Score] = field(default_factory=list)
    _logits: Tensor | None = None  # of the token before the next
    _began: float = 0.0
    _first: float = 0.0

    @property
    def prompting(self) -> bool:
        return self._length < len(self.prompt) + self._again

    @property
    def foreseen(self) -> int:
        """Tokens that its cache will probably have room for; few texts use all that they may."""
        return max(self.room, self._outlook)

    @property
    def room(self) -> int:
        """Tokens that its cache has memory for after its next turn."""
        if self._row is not None:
            return self._length + 1
        if self._cache is None:
            return self._outlook
        left = len(self.prompt) + self._again - self._length
        more = min(CHUNK, left) if self.prompting else 1
        return room_of(self._cache, self._length, more, len(self.prompt) + self.most)

    @property
    def _outlook(self) -> int:
        made = len(self.tokens)
        return len(self.prompt) + made + min(self.most - made, _LIKELY)

    @property
    def seconds(self) -> float:
        """Seconds since its first turn."""
        return time.perf_counter() - self._began

    @property
    def length(self) -> int:
        """Tokens whose keys and values are there."""
        return self._length

    def set_bits(self, bits: float) -> bool:
        """Continue at a precision; whether it is a change of a text that has begun."""
        if bits == self.bits:
            return False
        moved = bool(self.tokens)
        self._mixed = self._mixed or self._length > 0
        self.bits = bits
        if self.switches and self.switches[-1][0] == len(self.tokens):
            self.switches.pop()
        self.switches.append((len(self.tokens), bits))
        return moved

    def turn(self, model: Any, kept: KeptCaches) -> None:
        """Compute a chunk of the prompt, or a token. Emits what comes of it."""
        if self._cache is None:
            self._open(model, kept)
        if self.prompting:
            self._read(model)
            if self.prompting:
                return
            if not self._again:
                self._first = time.perf_counter()
                scored = self._scores if self.score_prompt else None
                self.emit(Prompted(self.index, self.bits, scored))
            if self.most == 0:
                return self._finish("length", kept)
        else:
            self._logits = self._forward(model, [self.tokens[-1]], 1)[0]
        self._choose(kept)

    def _open(self, model: Any, kept: KeptCaches) -> None:
        self._began = self._began or time.perf_counter()
        native, most = fused_decode.native(model), len(self.prompt) + self.most
        read = self._read_first()
        if native and not self._scoring:
            self._cache, self._length = kept.take(self.bits, read, model.config, most)
            if not self._again:
                self._cached = self._length
        if self._cache is None:
            self._cache = new_cache(model.config, native, len(read), most)

    def _read_first(self) -> list[int]:
        """What is read before a token is chosen."""
        return [*self.prompt, *self.tokens[: self._again]]

    @property
    def _scoring(self) -> bool:
        return self.score_prompt and not self._again

    def _forward(self, model: Any, ids: list[int], keep: int) -> Tensor:
        """Logits float32 [keep, vocabulary] of the last tokens; 0 keeps all."""
        make_room(self._cache, self._length, len(ids), len(self.prompt) + self.most)
        given = torch.tensor([ids], device=model.device)
        logits = continue_cache(model, given, self._cache, self._length, self.told, keep)
        self._length += len(ids)
        return logits[0].float().cpu()

    def answer(self, kept: KeptCaches) -> None:
        """Take the next token, whose logits `advance` has computed. Emits it."""
        self._choose(kept)

    def _read(self, model: Any) -> None:
        """The next chunk of the prompt, or of what is read again."""
        chunk = self._read_first()[self._length : self._length + CHUNK]
        logits = self._forward(model, chunk, 0 if self._scoring else 1)
        if self._scoring:
            check_logits(logits)
            if self._logits is None:
                self._scores.append(Score(chunk[0], None, []))
                before = logits[:-1]
            else:
                before = torch.cat([self._logits[None], logits[:-1]])
            for row, token in zip(
                before, chunk[-len(before) :] if len(before) else [], strict=True
            ):
                self._scores.append(Score(token, *scores_of(row, token, self.top or 0)))
        self._logits = logits[-1]

    def _choose(self, kept: KeptCaches) -> None:
        """Take the next token from the logits, and end where that ends the text."""
        assert self._logits is not None
        allowed = None if self.grammar is None else self.grammar.allowed(self._logits.numel())
        token = self.sampler(self._logits, allowed)
        if token in self.ends:
            return self._finish("stop", kept)
        score = None
        if self.top is not None:
            score = Score(token, *scores_of(self._logits, token, self.top))
        self.tokens.append(token)
        complete = self.grammar is not None and self.grammar.accept(token)
        self.emit(Generated(self.index, self.bits, self.stream.push(token), token, score))
        if self.stream.stopped or complete:
            self._finish("stop", kept)
        elif len(self.tokens) >= self.most:
            self._finish("length", kept)

    def _finish(self, reason: str, kept: KeptCaches) -> None:
        now = time.perf_counter()
        rest = self.stream.end()
        if self.stream.stopped:
            reason = "stop"
        self.emit(
            Finished(
                index=self.index,
                bits=self.bits,
                reason=reason,
                text=rest,
                prompt=len(self.prompt),
                cached=self._cached,
                tokens=len(self.tokens),
                prompt_seconds=self._first - self._began,
                seconds=now - self._first,
                switches=list(self.switches),
            )
        )
        if not self._mixed and not self.score_prompt:
            kept.keep(self.bits, [*self.prompt, *self.tokens][: self._length], self._cache)
        self.close()

    def fail(self, status: int, message: str) -> None:
        """End with an error."""
        self.close()
        self.emit(Failed(self.index, status, message))

    def close(self) -> None:
        """Free the cache. Nothing is emitted any more."""
        if self._row is not None:
            self._row.leave()
        self.finished, self._cache, self._row, self._logits = True, None, None, None

    def park(self) -> None:
        """Free the cache of a job that is not at its end; `turn` goes on with a new one."""
        if self._row is not None:
            self._row.leave()
        self._cache, self._row, self._logits, self._scores = None, None, None, []
        self._length, self._again, self._mixed = 0, len(self.tokens), False

    def row(self) -> Row:
        """Its keys and values for a batch through torch, which they stay in from now on."""
        if self._row is None:
            self._row, self._cache = Row(self._cache, self._length), None
        return self._row


def advance(models: Sequence[Any], jobs: Sequence[Job], batch: TorchBatch | None = None) -> bool:
    """Compute the next logits of jobs that generate, each by its model, in one pass.

    By the native step each gets what `turn` would compute, bit for bit; False, with nothing
    changed, where the model or a cache does not allow it. In a batch, in which all have one model
    and stay until they end, it is the same up to rounding.
    """
    last = [job.tokens[-1] for job in jobs]
    if batch is not None:
        logits = batch.step(models[0], [job.row() for job in jobs], last)
    else:
        for job in jobs:
            make_room(job._cache, job._length, 1, len(job.prompt) + job.most)
        made = fused_decode.decode_together(models, last, [job._cache for job in jobs])
        if made is None:
            return False
        logits = made.float()
    for job, row in zip(jobs, logits, strict=True):
        job._length += 1
        job._logits = row
    return True
