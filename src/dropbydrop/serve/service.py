"""A served checkpoint: its name, its text, its limits; requests into jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dropbydrop.data.text_files import check_tokens
from dropbydrop.models.embeddings import embedded_tokens
from dropbydrop.models.model_config import context_length
from dropbydrop.models.sources import load_tokenizer
from dropbydrop.system.errors import DropError

from .body import ApiError
from .calls import form_of
from .chats import Chat
from .engine import Engine
from .grammar import Grammar, Grammars
from .job import Event, Job
from .precisions import Precisions
from .requests import Request, Served
from .sampling import BOUNDS, Sampler, Sampling
from .text import Text, TextStream

_CONTEXT = 4096  # tokens, of models that set no limit
_SLACK = 4  # times as many characters as a context of the longest tokens has: some are dropped
_MOST_SCORES = 1 << 18  # log-probabilities of a prompt in an answer, which is made at once


class Service:
    """See the module's note. Everything but the engine is constant."""

    def __init__(
        self,
        folder: Path | str,
        levels: Sequence[int] | None,
        target: float | None,
        queue: int,
        device: str = "cpu",
    ) -> None:
        """Load a checkpoint and prepare its worker, which `engine.start()` starts.

        Raises:
            DropError: as `load`; a tokenizer that cannot be used.
        """
        precisions = Precisions(folder, levels, device)
        self.engine = Engine(precisions, target, queue)
        self.text = Text(load_tokenizer(precisions.checkpoint.path))
        self.fingerprint = precisions.checkpoint.fingerprint
        self.created = int(precisions.checkpoint.path.stat().st_mtime)
        config = precisions.base.config
        self._embedded = embedded_tokens(precisions.base)
        self.served = Served(
            name=precisions.checkpoint.path.resolve().name,
            levels=precisions.levels,
            context=context_length(precisions.checkpoint.config) or _CONTEXT,
            vocabulary=int(config.get_text_config().vocab_size),
            sampling=_own_sampling(precisions.base.generation_config),
            tools=self.text.response_template is not None and "tools" in str(self.text.template),
        )
        self.ends = _ends(precisions.base.generation_config, self.text)
        self.grammars = Grammars(self.text, self.served.vocabulary, self.ends)

    def stop(self) -> None:
        """End the worker and whatever else requests wait for."""
        self.grammars.close()
        self.engine.stop()

    # ---- requests into jobs ------------------------------------------------------------------

    def prompt_tokens(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        return [self._checked(p if isinstance(p, list) else self.encoded(p)) for p in prompts]

    def encoded(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text.

        Raises:
            ApiError: it is so long that no tokenizer could make it fit; that takes no time to see.
        """
        most = _SLACK * self.text.longest * self.served.context
        if len(text) > most:
            raise ApiError(
                400,
                f"a text of {len(text)} characters; this model's maximum context length is "
                f"{self.served.context} tokens, and at most {most} characters are looked at.",
                "prompt",
                "context_length_exceeded",
            )
        return self.text.encode(text, special)

    def chat_tokens(self, chat: Chat) -> tuple[list[int], str]:
        """The prompt of a chat as tokens and as text.

        Raises:
            ApiError: no chat template, one that refuses these messages, or too long a chat.
        """
        if not self.text.template:
            raise ApiError(400, "this model has no chat template; use /v1/completions.", "messages")
        try:
            prompt = self.text.chat(chat.messages, chat.tools)
        except DropError as error:
            raise ApiError(400, f"messages: {str(error)[:300]}", "messages") from None
        return self._checked(self.encoded(prompt, special=False)), prompt

    def grammar(self, chat: Chat, prompt: str) -> Grammar | None:
        """What the answer to a chat must be; may take seconds.

        Raises:
            ApiError: a schema, or a form of calls, that cannot be had.
        """
        if chat.must:
            form = form_of(self.text.response_template, prompt, chat.must)
            return self.grammars.of_calls(form, chat.must)
        return None if chat.schema is None else self.grammars.of_schema(chat.schema)

    def _checked(self, tokens: list[int]) -> list[int]:
        """A prompt of tokens that the model knows and that leaves room for another; an empty one
        begins with the token for that."""
        if not tokens:
            begin = self.text.tokenizer.bos_token_id
            if begin is None:
                raise ApiError(400, "prompt: it is empty; give some text.", "prompt")
            tokens = [begin]
        try:
            check_tokens(torch.tensor(tokens), self._embedded)
        except DropError as error:  # of a text: numbers were compared when they were read
            raise ApiError(400, f"prompt: {error}", "prompt") from None
        if len(tokens) >= self.served.context:
            raise ApiError(
                400,
                f"the prompt has {len(tokens)} tokens; this model's maximum context length is "
                f"{self.served.context} tokens.",
                "prompt",
                "context_length_exceeded",
            )
        return tokens

    def jobs(
        self,
        request: Request,
        prompts: Sequence[list[int]],
        emit: Callable[[Event], None],
        continues: bool,
        grammar: Grammar | None = None,
    ) -> list[Job]:
        """A job for every choice of every prompt.

        Args:
            continues: whether the new text goes on where the prompt ends, rather than answer it.

        Raises:
            ApiError: more tokens or choices than there can be.
        """
        count = len(prompts) * request.n
        if count > self.engine.queue:
            raise ApiError(
                400, f"{count} answers at once; at most {self.engine.queue} may wait.", "n"
            )
        if request.echo and request.top is not None:
            scores = (1 + request.top) * request.n * sum(map(len, prompts))
            if scores > _MOST_SCORES:
                raise ApiError(
                    400,
                    f"echo with logprobs asks for {scores:,} of them; at most {_MOST_SCORES:,} are "
                    "told in one answer.",
                    "logprobs",
                )
        made = []
        for number, prompt in enumerate(prompts):
            room = self.served.context - len(prompt)
            if request.most is not None and request.most > room:
                raise ApiError(
                    400,
                    f"{len(prompt)} tokens of the prompt and {request.most} new ones are more than "
                    f"this model's maximum context length of {self.served.context} tokens.",
                    "max_tokens",
                    "context_length_exceeded",
                )
            for choice in range(request.n):
                made.append(
                    Job(
                        index=number * request.n + choice,
                        prompt=prompt,
                        most=room if request.most is None else request.most,
                        sampler=Sampler(request.sampling, prompt, choice),
                        stream=self._stream(request, prompt if continues else None),
                        grammar=None if grammar is None else grammar.copy(),
                        ends=frozenset() if request.ignore_end else self.ends,
                        load=request.load,
                        emit=emit,
                        top=request.top,
                        told=self.engine.precisions.told,
                        score_prompt=request.echo and request.top is not None,
                        fixed_at_start=request.fixed_at_start,
                    )
                )
        return made

    def _stream(self, request: Request, continued: list[int] | None) -> TextStream:
        if continued is not None:
            return TextStream(self.text, request.stop, continued)
        special = self.text.response_template is not None
        return TextStream(self.text, request.stop, special=special)

    # ---- what clients may ask about it -------------------------------------------------------

    def model_object(self, name: str) -> dict[str, Any]:
        """A model as OpenAI's list has it, with its precision."""
        precisions, suffix = self.engine.precisions, name.removeprefix(self.served.name)
        bits: Any = "auto" if suffix == ":auto" else precisions.highest
        if suffix.endswith("bit"):
            bits = int(suffix[1:-3])
        level = precisions.highest if bits == "auto" else bits
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "dropbydrop",
            "dropbydrop": {"bits": bits, "bytes_per_token": precisions.bytes_of(level)},
            "max_model_len": self.served.context,
        }

    def status(self) -> dict[str, Any]:
        """/status.json"""
        status = self.engine.status()
        for level in status["levels"]:
            level["id"] = f"{self.served.name}:{level['bits']}bit"
        return {"model": self.served.name, **status}


def _own_sampling(config: Any) -> Sampling:
    """What the model's makers recommend, where a request says nothing.

    Raises:
        DropError: numbers that a request could not ask for either.
    """
    names = ["repetition_penalty"]
    if getattr(config, "do_sample", False):
        names += ["temperature", "top_p", "top_k", "min_p"]
    found = {name: getattr(config, name, None) for name in names}
    given: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    if given.get("top_k") == -1:  # as some write "no limit"
        given["top_k"] = 0
    for name, value in given.items():
        low, high = BOUNDS.get(name, (0, 1 << 31))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or (name == "top_k" and value % 1):
            raise DropError(
                f"generation_config.json says {name} {value!r:.40}, which is no "
                f"{'whole number' if name == 'top_k' else 'number'} between {low:g} and {high:g}: "
                "every answer would be drawn with it. Mend it in the original model and quantize "
                "again."
            )
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    return Sampling(**given)


def _ends(config: Any, text: Text) -> frozenset[int]:
    """Tokens that end a text."""
    given = getattr(config, "eos_token_id", None)
    found = {given} if isinstance(given, int) else set(given or ())
    own = text.tokenizer.eos_token_id
    return frozenset(found | (set() if own is None else {own}))
