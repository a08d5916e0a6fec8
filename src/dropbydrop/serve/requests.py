"""Requests of OpenAI's API as objects: what is asked, checked, with the defaults filled in.

Precision is part of a request, in any of these ways:

    model "name:2bit", "name:2.5bit", "name:auto"      works in every client
    bits 2, 2.5 or "auto"                              in the body
    service_tier "priority", "default", "flex"         what may happen to it under load

A request that names a precision keeps it, unless its tier is `flex`. One that names none, or
`auto`, begins as high as the load allows and may be moved while it runs, unless its tier is
`priority`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from .body import ApiError, Body
from .sampling import BOUNDS, Sampling
from .shed import DEFAULT, FLEX, PINNED, Load

MOST_CHOICES = 8
MOST_PROMPTS = 64
MOST_TOP = 20
_TAGS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True)
class Served:
    """What the server has to offer, as far as requests can be checked against it.

    Attributes:
        name: of the model.
        levels: ascending.
        context: most tokens of a prompt and its answer.
        vocabulary: number of tokens.
        sampling: defaults of the model.
        tools: whether its calls of tools can be told from text.
    """

    name: str
    levels: tuple[int, ...]
    context: int
    vocabulary: int
    sampling: Sampling
    tools: bool = False


@dataclass(frozen=True)
class Request:
    """A request for text.

    Attributes:
        model: as it was named.
        asked: the precision that was asked for: bits, "auto", or None.
        tier: service_tier as it is told back.
        load: what the precision may do.
        fixed_at_start: the precision at the beginning is kept.
        most: new tokens at most; None is as many as there is room for.
        top: None for no log-probabilities, else how many likeliest tokens are listed.
    """

    model: str
    asked: float | str | None
    tier: str
    load: Load
    fixed_at_start: bool
    sampling: Sampling
    most: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    top: int | None
    ignore_end: bool
    echo: bool = False


def read_request(body: Body, served: Served) -> Request:
    """The fields that chats, completions and responses share."""
    named = body.text("model", served.name)
    asked = _precision(named, body, served)
    tier = body.choice("service_tier", "auto", ("auto", "default", "flex", "priority"))
    may = FLEX if tier == "flex" else DEFAULT
    bits = float(served.levels[-1]) if asked in (None, "auto") else float(asked or 0)
    fixed = asked == "auto" and tier == "priority"
    if not fixed and tier != "flex" and (asked not in (None, "auto") or tier == "priority"):
        may = PINNED
    stream = body.flag("stream")
    options = Body(body.object("stream_options") or {}, "stream_options.")
    usage = options.flag("include_usage")
    options.only("include_obfuscation", False)
    options.done()
    if usage and not stream:
        raise body.error("stream_options", "only a request with stream can have them")
    body.tags(*_TAGS)
    body.only("store", False)
    bits = int(bits) if bits == int(bits) else bits
    return Request(
        model=named,
        asked=asked,
        tier="default" if tier == "auto" else tier,
        load=Load(bits, may),
        fixed_at_start=fixed,
        sampling=_sampling(body, served),
        most=None,
        n=body.integer("n", 1, 1, MOST_CHOICES),
        stop=_stop(body),
        stream=stream,
        usage=usage,
        top=None,
        ignore_end=body.flag("ignore_eos"),
    )


def _precision(named: str, body: Body, served: Served) -> float | str | None:
    """What the name of the model and the field `bits` say together."""
    found = re.fullmatch(r"(.+?)(?::(auto|\d+(?:\.\d+)?)(?:bit)?)?", named, re.DOTALL)
    if found is None or found[1] != served.name:
        known = ", ".join(names(served))
        raise ApiError(
            404,
            f"no model {named[:80]!r}; there are {known}, and averages such as "
            f"{served.name}:2.5bit.",
            "model",
            "model_not_found",
        )
    suffix, given = found[2], body.take("bits")
    from_name = None if suffix is None else "auto" if suffix == "auto" else float(suffix)
    if given is None:
        asked: Any = from_name
    elif given == "auto":
        asked = given
    elif isinstance(given, bool) or not isinstance(given, int | float):
        raise body.error("bits", f"{given!r:.60} is no level, average or 'auto'")
    else:
        asked = float(min(max(given, -1), 1 << 20))  # a larger int is no float
    if from_name is not None and given is not None and asked != from_name:
        raise body.error("bits", f"{given!r} contradicts the model {named!r}")
    if isinstance(asked, float):
        low, high = served.levels[0], served.levels[-1]
        if not low <= asked <= high:
            raise body.error("bits", f"{asked:g} is not between {low} and {high}")
        asked = round(asked, 2)
        return int(asked) if asked in served.levels else asked
    return asked


def names(served: Served) -> list[str]:
    """Names that the list of models has."""
    return [served.name, *(f"{served.name}:{p}bit" for p in served.levels), f"{served.name}:auto"]


def _sampling(body: Body, served: Served) -> Sampling:
    own = served.sampling
    bias = {}
    for key, value in (body.object("logit_bias") or {}).items():
        if not key.isdecimal() or len(key) > 20 or not int(key) < served.vocabulary:
            raise body.error("logit_bias", f"{key[:40]!r} is no token of this model")
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 100:
            raise body.error("logit_bias", f"{value!r:.40} is not between -100 and 100")
        bias[int(key)] = float(value)
    return Sampling(
        **{name: body.number(name, getattr(own, name), *BOUNDS[name]) for name in BOUNDS},
        top_k=body.integer("top_k", own.top_k, 0, served.vocabulary),
        logit_bias=bias,
        seed=body.integer("seed", None, -(1 << 63), (1 << 64) - 1),
    )


def _stop(body: Body) -> tuple[str, ...]:
    given = body.take("stop", [])
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(s, str) for s in texts):
        raise body.error("stop", "give a text, or a list of texts")
    if len(texts) > 16 or any(not 0 < len(s) <= 256 for s in texts):
        raise body.error("stop", "at most 16 texts of 1 to 256 characters")
    return tuple(texts)


def read_completion(body: Body, served: Served) -> tuple[Request, list[str | list[int]]]:
    """A body of /v1/completions, and its prompts."""
    request = read_request(body, served)
    top = body.integer("logprobs", None, 0, MOST_TOP)
    echo, most = body.flag("echo"), body.integer("max_tokens", 16, 0, served.context)
    if most == 0 and not echo:
        raise body.error("max_tokens", "0 needs echo")
    best = body.integer("best_of", request.n, 1, MOST_CHOICES)
    if best != request.n:
        raise body.error("best_of", "only the value of n is supported", "unsupported_value")
    body.only("suffix", "")
    prompts = _prompts(body, served)
    body.done()
    return replace(request, top=top, echo=echo, most=most), prompts


def _prompts(body: Body, served: Served) -> list[str | list[int]]:
    given = body.take("prompt")
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise body.error(
            "prompt", "give a text, a list of texts, tokens, or a list of lists of them"
        )
    if _is_tokens(given, served):
        return [given]
    if len(given) > MOST_PROMPTS:
        raise body.error("prompt", f"{len(given)} prompts; at most {MOST_PROMPTS} at once")
    if all(isinstance(p, str) for p in given) or all(_is_tokens(p, served) for p in given):
        return given
    raise body.error(
        "prompt",
        f"a list must hold only texts, only tokens (0 to {served.vocabulary - 1}), or only lists "
        "of tokens",
    )


def _is_tokens(value: Any, served: Served) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(x) is int and 0 <= x < served.vocabulary for x in value)
    )
