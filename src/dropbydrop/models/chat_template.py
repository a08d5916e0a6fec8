"""The one door to chat templates.

A template is a program of the model's author. transformers runs it in jinja2's sandbox, which keeps
it from files and attributes, but not from failing or from looping for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..system.deadline import time_limit
from ..system.errors import DropError, first_line

TEMPLATE_SECONDS = 10.0


def in_chat_template(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    seconds: float = TEMPLATE_SECONDS,
) -> str:
    """The text of a conversation up to where the model answers, special tokens written out.

    Args:
        messages: `role` and `content` of each turn; tools: JSON schemas of what may be called.
        seconds: after which the template is stopped.

    Raises:
        DropError: there is no template, or it refuses, fails or does not end.
    """
    try:
        with time_limit(seconds):
            text = tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=True
            )
        str(text).encode()  # halves of characters, which no tokenizer takes
    except Exception as error:  # whatever a template does
        raise DropError(
            f"the model's chat template fails ({first_line(error)}); write the prompt as the model "
            "expects it, without the template."
        ) from error
    return str(text)
