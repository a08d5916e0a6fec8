"""Passes that continue a cache, as a family's code wants them.

    told = wants_positions(model, make_cache)             # once
    logits = continue_cache(model, ids, cache, length, told)

Most families count the positions of new tokens from the length of the cache. Some begin at 0 at
every call unless they are told (Bamba), some swallow the argument and keep a cache of another name
(Mamba), some want a class of their own (MiniMax): their texts would be others, without a word. So
whoever continues a cache tries it first: a few tokens at once, and in pieces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dropbydrop.system.errors import UnsupportedModelError, first_line

from .embeddings import embedded_tokens

_PIECES = (16, 4, 1, 1, 1, 1)  # tokens
_SAME = 0.05  # share of the norm that logits may be off, by rounding in 16 bits


def continue_cache(
    model: Any, ids: Tensor, cache: Any, length: int, told: bool, keep: int | None = None
) -> Tensor:
    """Logits [b, keep, vocabulary] of more tokens ids int64 [b, n], which the cache then holds.

    Args:
        length: tokens that it holds before.
        told: whether positions are given.
        keep: of how many last tokens logits are wanted; None and 0 are all.
    """
    more: dict[str, Any] = {} if keep is None else {"logits_to_keep": keep}
    if told:
        positions = torch.arange(length, length + ids.shape[1], device=ids.device)
        more["position_ids"] = positions.expand(len(ids), -1)
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits
    return logits


@torch.inference_mode()
def wants_positions(model: Any, make_cache: Callable[[int], Any]) -> bool:
    """Whether a model has to be told the positions of tokens that continue a cache.

    Args:
        make_cache: an empty cache for so many tokens.

    Raises:
        UnsupportedModelError: it does not continue such a cache, told or not.
    """
    count = sum(_PIECES)
    ids = (torch.arange(count, device=model.device) * 7 % embedded_tokens(model))[None]
    known = "position_ids" in inspect.signature(type(model).forward).parameters
    try:
        whole = model(input_ids=ids, use_cache=False).logits[0].float()
        for told in (False, True)[: 1 + known]:
            cache, pieces, at = make_cache(count), [], 0
            for n in _PIECES:
                pieces.append(continue_cache(model, ids[:, at : at + n], cache, at, told)[0])
                at += n
            off = (torch.cat(pieces).float() - whole).norm(dim=-1) / whole.norm(dim=-1)
            # of those that continue something; a near tie of experts may turn one of them
            if float(off[_PIECES[0] :].nan_to_num(torch.inf).median()) <= _SAME:
                return told
        why = "its logits are others than those of the text at once"
    except Exception as error:  # a family's code can fail in any way
        why = first_line(error)
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot continue a text from a cache of ours ({why}), so it would "
        "write another text. `dropbydrop generate` leaves the cache to transformers; to calibrate, "
        "give a file."
    )
