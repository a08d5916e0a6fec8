"""Answers in the form of OpenAI's API: whole objects, and the chunks of a stream.

    form = ChatForm(head, text)          # or CompletionForm
    form.chunk(event)                    # one event of a job as a chunk, or None
    form.whole(choices)                  # everything at once

What the API does not have stands in two fields of its own: `dropbydrop` (the precision that
answered, and where it changed) and `timings`, spelled as llama.cpp does.
"""

from __future__ import annotations

import codecs
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .body import ApiError
from .job import Event, Finished, Generated, Prompted, Score
from .replies import Part, Reply
from .requests import Request
from .text import Text


@dataclass(frozen=True)
class Head:
    """What all parts of one answer have in common."""

    request: Request
    fingerprint: str  # of the checkpoint
    bytes_of: Callable[[float], int]
    prompts: Sequence[Sequence[int]]
    reply: Callable[[], Reply] = lambda: Reply(None, "", None)
    told: Mapping[str, Any] = field(default_factory=dict)  # fields of the request that come back
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: secrets.token_hex(12))

    def fields(self, kind: str, prefix: str, bits: float) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{self.key}",
            "object": kind,
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": f"fp_{self.fingerprint[:12]}_{bits:g}",
        }

    def precision(self, end: Finished) -> dict[str, Any]:
        """The field `dropbydrop` of a continuation that has ended."""
        return {
            "bits": end.bits,
            "asked": self.request.asked,
            "switches": [list(switch) for switch in end.switches],
            "bytes_per_token": self.bytes_of(end.bits),
        }

    def usage(self, ends: Sequence[Finished]) -> dict[str, Any]:
        """Tokens; a prompt with several answers counts once."""
        prompt = sum(map(len, self.prompts))
        made = sum(end.tokens for end in ends)
        cached = sum(end.cached for end in ends if end.index % self.request.n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def timings(ends: Sequence[Finished]) -> dict[str, Any]:
    """Times of continuations together, as llama.cpp names them; others run in between."""
    read = sum(end.prompt - end.cached for end in ends)
    made = sum(end.tokens for end in ends)
    reading, making = sum(e.prompt_seconds for e in ends), sum(e.seconds for e in ends)
    later = made - sum(e.tokens > 0 for e in ends)  # the first token comes with the prompt
    return {
        "cache_n": sum(end.cached for end in ends),
        "prompt_n": read,
        "prompt_ms": 1e3 * reading,
        "prompt_per_token_ms": 1e3 * reading / max(read, 1),
        "prompt_per_second": read / reading if reading else 0.0,
        "predicted_n": made,
        "predicted_ms": 1e3 * making,
        "predicted_per_token_ms": 1e3 * making / max(later, 1),
        "predicted_per_second": later / making if making else 0.0,
    }


@dataclass
class Choice:
    """A continuation as its events add up."""

    texts: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    end: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Prompted):
            self.scores += event.scores or []
        elif isinstance(event, Generated):
            self.texts.append(event.text)
            self.scores += [event.score] if event.score else []
        elif isinstance(event, Finished):
            self.texts.append(event.text)
            self.end = event

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Form:
    """What chats and completions share."""

    kind, chunk_kind, prefix = "", "", ""
    done = True  # whether [DONE] ends a stream

    def __init__(self, head: Head, text: Text) -> None:
        self.head, self.text = head, text
        self._first_bits: float | None = None  # every chunk of a stream has the same fingerprint

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunks of a stream that an event makes."""
        made = []
        if isinstance(event, Prompted):
            made = self._begin(event)
        elif isinstance(event, Generated):
            score = [event.score] if event.score else []
            made = self._pieces(event.index, event.text, score)
        elif isinstance(event, Finished):
            made = [*self._pieces(event.index, event.text, [], True), self._last(event)]
        return [self._framed(choice, event) for choice in made]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """The chunks that end a stream with an error."""
        return [error.body()]

    def usage_chunk(self, ends: Sequence[Finished]) -> dict[str, Any]:
        return {
            **self.head.fields(self.chunk_kind, self.prefix, ends[0].bits),
            "choices": [],
            "usage": self.head.usage(ends),
            "dropbydrop": self.head.precision(ends[0]),
            "timings": timings(ends),
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        ends = [choice.end for choice in choices if choice.end is not None]
        extension = self.head.precision(ends[0])
        if len(ends) > 1:
            extension["choices"] = [self.head.precision(end) for end in ends]
        return {
            **self.head.fields(self.kind, self.prefix, ends[0].bits),
            "choices": [
                self._choice(choice, end) for choice, end in zip(choices, ends, strict=True)
            ],
            "usage": self.head.usage(ends),
            "service_tier": self.head.request.tier,
            "dropbydrop": extension,
            "timings": timings(ends),
        }

    def _framed(self, choice: dict[str, Any], event: Event) -> dict[str, Any]:
        assert isinstance(event, Prompted | Generated | Finished)
        if self._first_bits is None:
            self._first_bits = event.bits
        frame = {
            **self.head.fields(self.chunk_kind, self.prefix, self._first_bits),
            "choices": [choice],
            "dropbydrop": {"bits": event.bits},
        }
        if self.head.request.usage:
            frame["usage"] = None
        if isinstance(event, Finished) and choice["finish_reason"] is not None:
            frame["dropbydrop"] = self.head.precision(event)
            frame["timings"] = timings([event])
        return frame

    def _begin(self, event: Prompted) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _pieces(
        self, index: int, text: str, scores: list[Score], ended: bool = False
    ) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _last(self, end: Finished) -> dict[str, Any]:
        raise NotImplementedError

    def _choice(self, choice: Choice, end: Finished) -> dict[str, Any]:
        raise NotImplementedError


_FIELDS = {"content": "content", "reasoning": "reasoning_content"}


def _call(part: Part) -> dict[str, Any]:
    function = {"name": part.name, "arguments": part.text}
    return {"id": part.key, "type": "function", "function": function}


def check_call(end: Finished, reply: Reply) -> None:
    """See that a call that had to be made is there.

    Raises:
        ApiError: it is not, though it was not cut.
    """
    if reply.must and end.reason == "stop" and reply.calls != 1:
        raise ApiError(
            500,
            "tool_choice: the model wrote the mark that ends a call within its arguments, so that "
            "the call cannot be read; ask again, or with auto.",
            "tool_choice",
        )


def _reason(end: Finished, reply: Reply) -> str:
    """finish_reason; raises what `check_call` raises."""
    check_call(end, reply)
    return "tool_calls" if reply.calls and end.reason == "stop" else end.reason


class ChatForm(Form):
    """chat.completion and chat.completion.chunk."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, head: Head, text: Text) -> None:
        super().__init__(head, text)
        self._replies: dict[int, Reply] = {}

    def _begin(self, event: Prompted) -> list[dict[str, Any]]:
        return [self._delta(event.index, {"role": "assistant", "content": ""})]

    def _pieces(
        self, index: int, text: str, scores: list[Score], ended: bool = False
    ) -> list[dict[str, Any]]:
        reply = self._replies.setdefault(index, self.head.reply())
        parts = reply.feed(text)
        calls = reply.calls - sum(part.kind == "call" for part in parts)
        parts += reply.end() if ended else []
        deltas: list[dict[str, Any]] = []
        for part in parts:
            if part.kind == "call":
                deltas.append({"tool_calls": [{"index": calls, **_call(part)}]})
                calls += 1
            else:
                deltas.append({_FIELDS[part.kind]: part.text})
        if scores and not deltas:
            deltas = [{"content": ""}]
        return [self._delta(index, x, () if i else scores) for i, x in enumerate(deltas)]

    def _last(self, end: Finished) -> dict[str, Any]:
        reason = _reason(end, self._replies[end.index])
        return {**self._delta(end.index, {}), "finish_reason": reason}

    def _choice(self, choice: Choice, end: Finished) -> dict[str, Any]:
        reply = self.head.reply()
        parts = [*reply.feed(choice.text), *reply.end()]
        texts = {
            name: "".join(part.text for part in parts if part.kind == kind)
            for kind, name in _FIELDS.items()
        }
        calls = [_call(part) for part in parts if part.kind == "call"]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": texts["content"],
            "refusal": None,
        }
        if texts["reasoning_content"]:
            message["reasoning_content"] = texts["reasoning_content"]
        if calls:
            message |= {"tool_calls": calls, "content": texts["content"] or None}
        return {
            "index": end.index,
            "message": message,
            "logprobs": self._scored(choice.scores),
            "finish_reason": _reason(end, reply),
        }

    def _delta(
        self, index: int, delta: dict[str, Any], scores: Sequence[Score] = ()
    ) -> dict[str, Any]:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._scored(scores) if scores else None,
            "finish_reason": None,
        }

    def _scored(self, scores: Sequence[Score]) -> dict[str, Any] | None:
        if self.head.request.top is None:
            return None
        content = [
            {
                **self._token(score.token, score.logprob or 0.0),
                "top_logprobs": [self._token(token, value) for token, value in score.top],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.text.bytes_of(token)
        return {"token": self.text.piece(token), "logprob": logprob, "bytes": list(raw)}


class _Offsets:
    """Where the tokens of a text begin, in characters; within one, where that begins."""

    def __init__(self, text: Text) -> None:
        self._text, self._count = text, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> int:
        start = self._count
        if token not in self._text.special:
            piece, (begun, _) = self._text.bytes_of(token), self._decoder.getstate()
            self._count += len(self._decoder.decode(piece))
            if begun and piece and piece[0] & 0xC0 != 0x80:  # a character that nothing ends
                start += 1
        return start


class CompletionForm(Form):
    """text_completion, whole and in chunks."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, head: Head, text: Text) -> None:
        super().__init__(head, text)
        self._offsets: dict[int, _Offsets] = {}  # of each choice

    def _echo(self, index: int) -> str:
        if not self.head.request.echo:
            return ""
        return self.text.decode(self.head.prompts[index // self.head.request.n])

    def _begin(self, event: Prompted) -> list[dict[str, Any]]:
        echo, scores = self._echo(event.index), event.scores or []
        return self._pieces(event.index, echo, scores)

    def _pieces(
        self, index: int, text: str, scores: list[Score], ended: bool = False
    ) -> list[dict[str, Any]]:
        if not text and not scores:
            return []
        offsets = self._offsets.setdefault(index, _Offsets(self.text))
        logprobs = self._scored(scores, offsets) if scores else None
        return [{"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}]

    def _last(self, end: Finished) -> dict[str, Any]:
        return {"index": end.index, "text": "", "logprobs": None, "finish_reason": end.reason}

    def _choice(self, choice: Choice, end: Finished) -> dict[str, Any]:
        scored = self.head.request.top is not None
        return {
            "index": end.index,
            "text": self._echo(end.index) + choice.text,
            "logprobs": self._scored(choice.scores, _Offsets(self.text)) if scored else None,
            "finish_reason": end.reason,
        }

    def _scored(self, scores: Sequence[Score], offsets: _Offsets) -> dict[str, Any]:
        return {
            "tokens": [self.text.name(score.token) for score in scores],
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": [offsets.next(score.token) for score in scores],
        }

    def _top(self, score: Score) -> dict[str, float] | None:
        """The likeliest tokens, and the chosen one if it is none of them."""
        if score.logprob is None:
            return None
        likeliest = {self.text.name(token): value for token, value in score.top}
        return likeliest | {self.text.name(score.token): score.logprob}
