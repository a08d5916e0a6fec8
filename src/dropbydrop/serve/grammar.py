"""Answers that must be JSON of a schema, or a call: which tokens may come next, by llguidance.

The package is optional; without it a request for such an answer is refused. Building the tables of
a tokenizer takes about a second, once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropbydrop.system.errors import DropError

from .body import ApiError
from .calls import Form, rules
from .text import Text


class Grammar:
    """The state of one answer; `param` is the parameter that asks for it."""

    def __init__(self, matcher: Any, param: str) -> None:
        self._matcher, self._param = matcher, param

    def allowed(self, size: int) -> Tensor:
        """bool [size]: the tokens that may come next.

        Raises:
            DropError: as `accept`.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(packed, bitorder="little")
        mask = torch.zeros(size, dtype=torch.bool)
        known = torch.from_numpy(bits[:size].astype(bool))
        mask[: len(known)] = known
        return mask

    def accept(self, token: int) -> bool:
        """Note a token; whether the answer is complete, and nothing may follow.

        Raises:
            DropError: a limit of llguidance was reached: the client asks for too much.
            RuntimeError: the token was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy(), self._param)

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        problem = _first_line(self._matcher.get_error())
        if "doesn't satisfy the grammar" in problem:  # it was not in `allowed`
            raise RuntimeError(problem)
        raise DropError(
            f"{self._param}: llguidance cannot follow the schema, or the functions to choose from: "
            f"{problem}. Ask for less: without references of a schema to itself, or for one "
            "function by its name."
        )


def _first_line(problem: str) -> str:
    """Of a report, behind which llguidance writes the whole grammar."""
    return problem.split("\n")[0][:300]


class Grammars:
    """Grammars for one tokenizer."""

    def __init__(self, text: Text, vocabulary: int, ends: frozenset[int]) -> None:
        self._text, self._vocabulary, self._ends = text, vocabulary, ends
        self._lock = threading.Lock()
        self._tokenizer: Any = None

    def of_schema(self, schema: dict[str, Any]) -> Grammar:
        """The grammar of a JSON schema.

        Raises:
            ApiError: llguidance is not installed, or does not support the schema.
        """
        # no white space: a model that is unsure would write it until it is cut
        compact: Any = {"whitespace_flexible": False}
        return self._made(
            "response_format",
            "the schema",
            lambda matcher, _: matcher.grammar_from_json_schema(
                json.dumps(schema), overrides=compact
            ),
        )

    def of_calls(self, form: Form, tools: Sequence[dict[str, Any]]) -> Grammar:
        """The grammar of a call of one of these tools.

        Raises:
            ApiError: llguidance is not installed, or does not support the schema of the arguments.
        """
        return self._made(
            "tool_choice",
            "the parameters of a function",
            lambda matcher, tokens: matcher.grammar_from_lark(
                rules(form, tools, self._text, tokens.is_special_token)
            ),
        )

    def _made(self, param: str, what: str, grammar: Callable[[Any, Any], str]) -> Grammar:
        """A grammar that llguidance makes; errors name the parameter that asks for it."""
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ApiError(
                400,
                f"{param}: this server lacks the package llguidance.",
                param,
                "unsupported_value",
            ) from None
        with self._lock:
            if self._tokenizer is None:
                ends = sorted(self._ends) or None
                self._tokenizer = from_tokenizer(self._text.tokenizer, self._vocabulary, ends)
        try:
            made = grammar(LLMatcher, self._tokenizer)
            problem = LLMatcher.validate_grammar(made, self._tokenizer)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ApiError(400, f"{param}: {what} cannot be used: {problem[:300]}", param)
        return Grammar(LLMatcher(self._tokenizer, made, log_level=0), param)
