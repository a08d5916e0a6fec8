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

from .body import ApiError
from .calls import Form, rules
from .text import Text


class Grammar:
    """The state of one answer."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, size: int) -> Tensor:
        """bool [size]: the tokens that may come next."""
        bits = np.unpackbits(
            np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little"
        )
        mask = torch.zeros(size, dtype=torch.bool)
        known = torch.from_numpy(bits[:size].astype(bool))
        mask[: len(known)] = known
        return mask

    def accept(self, token: int) -> bool:
        """Note a token; whether the answer is complete, and nothing may follow.

        Raises:
            RuntimeError: the token was not allowed, or a limit of the grammar's parser was reached.
        """
        if not self._matcher.consume_token(token):
            raise RuntimeError(self._matcher.get_error())
        return bool(self._matcher.is_stopped())

    def copy(self) -> Grammar:
        return Grammar(self._matcher.deep_copy())


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
        return Grammar(LLMatcher(self._tokenizer, made))
