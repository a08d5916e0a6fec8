"""Text from a loaded model: a prompt in, the continuation out.

A thin layer over transformers' `generate`: tokenizer, optional chat template, sampling settings
that mean what they say (temperature 0 is greedy), and the time it took.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from dropbydrop.data.text_files import check_tokens, refuse_surrogates
from dropbydrop.models.chat_template import in_chat_template
from dropbydrop.models.embeddings import embedded_tokens
from dropbydrop.models.model_config import context_length
from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import DropError, NumericError
from dropbydrop.system.settings import check_seed

from . import fused_decode

if TYPE_CHECKING:
    from dropbydrop.planning.precision import Precision

_COLDEST, _HOTTEST = 1e-4, 100.0  # temperatures but 0: logits of 50 over 1e-4 are no problem


@dataclass(frozen=True)
class Generated:
    """A continuation; `text` is without the prompt, `seconds` counts prompt and new tokens."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    speculation: dict[str, Any] | None = None  # what drafting did, when it was asked for


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    chat: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = False,
    draft: Precision | None = None,
) -> Generated:
    """Continue `prompt`, or with `chat` answer it as a user's message.

    Args:
        max_new_tokens: the text ends at the model's context at the latest.
        temperature: 0 takes the likeliest token; above, samples with `seed`.
        stream: print tokens to stdout as they come.
        draft: draft with this lower precision of the same model and verify (speculate.py):
            the same tokens, or samples of the same distribution, possibly sooner.

    Raises:
        DropError: an empty prompt, a temperature that is none, no room asked for, or `chat` without
            a chat template.
        NumericError: the model's outputs are no numbers.
    """
    check_asked(max_new_tokens, temperature)
    if not prompt:
        raise DropError("the prompt is empty: give some text.")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise DropError("this model has no chat template; leave --chat away.")
        prompt = in_chat_template(tokenizer, [{"role": "user", "content": prompt}])
    inputs = _inputs(model, tokenizer, prompt, chat)
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(check_seed(seed))
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if tokenizer.pad_token_id is None:
        settings["pad_token_id"] = tokenizer.eos_token_id
    if draft is None and fused_decode.native(model):
        # A cache of fixed size is written in place by the native decode step.
        settings["cache_implementation"] = "static"
    if stream:
        from transformers import TextStreamer

        settings["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    speculator = None
    if draft is not None:
        from .speculate import Speculator

        speculator = Speculator(model, **vars(draft))
    given, longest = inputs["input_ids"].shape[1], context_length(model.config)
    most = max_new_tokens if longest is None else min(max_new_tokens, longest - given)
    settings["logits_processor"] = [_checked]
    start = time.perf_counter()
    with quiet_transformers():
        run = (speculator or model).generate
        ids = run(**inputs, max_new_tokens=most, **settings)[0]
    seconds = time.perf_counter() - start
    text = tokenizer.decode(ids[given:], skip_special_tokens=True)
    drafted = None if speculator is None else asdict(speculator.report)
    return Generated(text, given, ids.numel() - given, seconds, drafted)


def check_asked(most: int, temperature: float) -> None:
    """Whether a text of at most so many new tokens can be had at a temperature.

    Raises:
        DropError: no token, or a temperature that float32 cannot divide by.
    """
    if not 0 < most < 1 << 31 or not (temperature == 0 or _COLDEST <= temperature <= _HOTTEST):
        raise DropError(
            f"{most} new tokens at temperature {temperature:g}: give at least one token, and a "
            f"temperature of 0 or between {_COLDEST:g} and {_HOTTEST:g}."
        )


def check_logits(logits: torch.Tensor) -> None:
    """Whether there is a likeliest token in each row of logits [..., vocabulary].

    Raises:
        NumericError: one has NaN, or infinity.
    """
    if not logits.amax(-1).isfinite().all():
        raise NumericError(
            "the model's outputs are no numbers (NaN or infinity): its activations overflow. Load "
            "it with a type of wider range, float32 or bfloat16; if that does not help, its "
            "weights are broken."
        )


def _checked(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A processor of logits, for transformers."""
    check_logits(logits)
    return logits


def _inputs(model: Any, tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids [1, T] and mask.

    Raises:
        DropError: no token, one that the model does not know, or as many as its context.
    """
    refuse_surrogates(prompt, "the prompt")
    # a chat template writes its own special tokens
    made = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    inputs = {k: made[k].to(model.device) for k in ("input_ids", "attention_mask") if k in made}
    ids, longest = inputs["input_ids"], context_length(model.config)
    check_tokens(ids, embedded_tokens(model))
    if ids.numel() == 0 or (longest is not None and ids.numel() >= longest):
        raise DropError(
            f"the prompt has {ids.numel():,} tokens; this model takes 1 to {(longest or 2) - 1:,}. "
            "Give a prompt within that."
        )
    return inputs
