"""Answers that must be JSON of a schema, or a call: which tokens may come next, by llguidance.

The package is optional; without it a request for such an answer is refused. Building the tables of
a tokenizer takes about a second, once.

Some schemas take llguidance for ever ("multipleOf" of a large prime), where nothing can stop it but
the end of a process. So a grammar is made in a process of its own first, which has `_SECONDS` of a
processor, and here only if that went well. One is tried at a time, a few wait, and whoever comes
then is told to come again. The last ones are kept, refused ones too: those answer at once. What a
busy machine did not get through is not kept.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dropbydrop.system.errors import DropError

from .body import ApiError
from .calls import Form, rules
from .text import Text

MOST_WAITING = 8  # schemas that nobody has asked for before
_SECONDS = 5  # of a processor
_PATIENCE = 4  # times as long by the clock
_MOST_KEPT = 64
_MOST_CHARACTERS = 1 << 20  # of all that are kept; one of 200,000 takes 33 MB
# Without a model's tokens, which hardly matter to it and take a second to read. The limits hold
# when the server is gone, too.
_TRIAL = """
import json, sys
from contextlib import suppress
from llguidance import LLMatcher, LLTokenizer
with suppress(ImportError, ValueError, OSError):
    from resource import RLIMIT_AS, RLIMIT_CPU, setrlimit
    setrlimit(RLIMIT_CPU, (int(sys.argv[1]), 1 + int(sys.argv[1])))
    setrlimit(RLIMIT_AS, (4 << 30, 4 << 30))
matcher = LLMatcher(LLTokenizer("byte"), json.load(sys.stdin), log_level=0)
matcher.compute_bitmask()
print(matcher.get_error())
"""


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
    """Grammars for one tokenizer. For several threads."""

    def __init__(self, text: Text, vocabulary: int, ends: frozenset[int]) -> None:
        self._text, self._vocabulary, self._ends = text, vocabulary, ends
        self._lock = threading.Lock()  # of all fields
        self._tokens: Any = None
        self._kept: OrderedDict[tuple[str, str], Grammar | str] = OrderedDict()  # or why not
        self._turn = threading.Lock()  # of whoever tries a grammar
        self._waiting = 0
        self._trial: Any = None
        self._closed = False

    def close(self) -> None:
        """Refuse whatever waits, and end what is tried."""
        with self._lock:
            self._closed = True
            if self._trial is not None:
                self._trial.kill()

    def of_schema(self, schema: dict[str, Any]) -> Grammar:
        """The grammar of a JSON schema.

        Raises:
            ApiError: llguidance is not installed, or does not support the schema.
        """
        param, what = "response_format", "the schema"
        matcher = self._library(param)
        # no white space: a model that is unsure would write it until it is cut
        compact: Any = {"whitespace_flexible": False}
        try:
            made = matcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
        except ValueError as error:
            raise _refused(param, what, str(error)) from None
        return self._made(param, what, made, made)

    def of_calls(self, form: Form, tools: Sequence[dict[str, Any]]) -> Grammar:
        """The grammar of a call of one of these tools.

        Raises:
            ApiError: llguidance is not installed, or does not support the schema of the arguments.
        """
        param, what = "tool_choice", "the parameters of a function"
        self._library(param)
        made = rules(form, tools, self._text, self._tokens.is_special_token)
        plain = rules(form, tools, self._text, lambda token: False)
        return self._made(param, what, made, plain)

    def _library(self, param: str) -> Any:
        """llguidance's matcher; its view of the tokenizer is there."""
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
            if self._tokens is None:
                ends = sorted(self._ends) or None
                self._tokens = from_tokenizer(self._text.tokenizer, self._vocabulary, ends)
        return LLMatcher

    def _made(self, param: str, what: str, made: str, plain: str) -> Grammar:
        """A grammar of llguidance's language, which is tried as it is without special tokens.

        Raises:
            ApiError: it cannot be had; too many others wait.
        """
        found = self._known(param, made)
        if found is None:
            with self._lock:
                if self._waiting >= MOST_WAITING:
                    raise ApiError(
                        429, f"{param}: too many new schemas wait.", headers={"retry-after": "5"}
                    )
                self._waiting += 1
            try:
                with self._turn:
                    found = self._known(param, made) or self._new(param, made, plain)
            finally:
                with self._lock:
                    self._waiting -= 1
        if isinstance(found, str):
            raise _refused(param, what, found)
        return found.copy()

    def _known(self, param: str, made: str) -> Grammar | str | None:
        with self._lock:
            if (found := self._kept.get((param, made))) is not None:
                self._kept.move_to_end((param, made))
            return found

    def _new(self, param: str, made: str, plain: str) -> Grammar | str:
        """A grammar, or why there is none; kept."""
        matcher = self._library(param)
        found: Grammar | str = self._tried(param, plain)
        found = found or matcher.validate_grammar(made, self._tokens)
        if not found:
            found = Grammar(matcher(self._tokens, made, log_level=0), param)
        with self._lock:
            self._kept[param, made] = found
            while len(self._kept) > _MOST_KEPT or sum(self._sizes()) > _MOST_CHARACTERS:
                self._kept.popitem(last=False)
        return found

    def _sizes(self) -> Iterator[int]:
        return (len(made) for _, made in self._kept)

    def _tried(self, param: str, grammar: str) -> str:
        """What is wrong with a grammar, found out in a process of its own; nothing: ""."""
        with self._lock:
            if self._closed:
                raise ApiError(503, "the server is shutting down")
            trial = self._trial = subprocess.Popen(
                [sys.executable, "-P", "-c", _TRIAL, str(_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        with trial:
            try:
                told, _ = trial.communicate(json.dumps(grammar), timeout=_PATIENCE * _SECONDS)
            except subprocess.TimeoutExpired:
                trial.kill()
                wait = {"retry-after": str(_SECONDS)}
                raise ApiError(503, f"{param}: the server is too busy.", headers=wait) from None
            finally:
                with self._lock:
                    self._trial = None
        if self._closed:
            raise ApiError(503, "the server is shutting down")
        if trial.returncode == -getattr(signal, "SIGXCPU", 0) != 0:
            return f"llguidance has not read it after {_SECONDS} seconds"
        return _first_line(told.strip()) if trial.returncode == 0 else "llguidance fails on it"


def _refused(param: str, what: str, problem: str) -> ApiError:
    return ApiError(400, f"{param}: {what} cannot be used: {problem[:300]}", param)
