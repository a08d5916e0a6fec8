"""Keys and values of running requests: caches that grow, and finished ones that are used again.

A cache for the native step has a fixed size and is written in place (`StaticCache`). Most answers
are far shorter than what a request allows, so a cache begins small and is moved into one twice as
large when it is full, up to what the request allows. Other models get the growing cache that
transformers gives them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from transformers import DynamicCache, StaticCache

_FIRST = 256  # tokens beyond the prompt
_MOST_BYTES = 512 << 20  # of finished caches
_MOST_KEPT = 32
_LEAST_SHARED = 16  # tokens; fewer are sooner computed than copied


def new_cache(config: Any, native: bool, tokens: int, most: int) -> Any:
    """An empty cache for a prompt of `tokens`, of a request that may reach `most`."""
    if native:
        return StaticCache(config=config, max_cache_len=first_size(tokens, most))
    return DynamicCache(config=config)


def first_size(tokens: int, most: int) -> int:
    """Tokens that a new static cache has memory for; those are `new_cache`'s."""
    return min(tokens + _FIRST, most)


def room_of(cache: Any, length: int, more: int, most: int) -> int:
    """Tokens that a cache of `length` tokens will have memory for when it takes `more`.

    most: all that it may ever hold.
    """
    if not isinstance(cache, StaticCache):
        return length + more
    return max(_size(layer, length + more, most) for layer in _layers(cache))


def _size(layer: Any, needed: int, most: int) -> int:
    size: int = layer.max_cache_len
    return size if needed <= size else max(needed, min(2 * size, most))


def make_room(cache: Any, length: int, more: int, most: int) -> None:
    """Have a static cache of `length` tokens take `more`; `most`: all that it may ever hold."""
    if not isinstance(cache, StaticCache):
        return
    for layer in _layers(cache):
        size = _size(layer, length + more, most)
        if layer.max_cache_len < size:
            if layer.is_initialized:
                layer.keys, layer.values = (
                    _moved(t, size, length) for t in (layer.keys, layer.values)
                )
            layer.max_cache_len = size


def _layers(cache: Any) -> list[Any]:
    return list(cache.layers)


def _moved(old: torch.Tensor, size: int, length: int) -> torch.Tensor:
    """[1, heads, capacity, head_dim] with another capacity and the first `length` entries."""
    new = old.new_zeros(*old.shape[:2], size, old.shape[3])
    new[:, :, :length] = old[:, :, :length]
    return new


def _bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in _layers(cache))


def free_memory(device: torch.device) -> int:
    """Bytes that are free where the caches go."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class KeptCaches:
    """Static caches of finished requests, by their tokens and precision; the oldest go first.

    Only a cache that was computed at one precision from its first token on is kept, and it serves
    only that precision: an answer does not depend on what others have asked before, but for the
    rounding of products with another number of rows.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[tuple[float, tuple[int, ...]], Any] = OrderedDict()

    def keep(self, bits: float, tokens: Sequence[int], cache: Any) -> None:
        """Take over a cache that holds these tokens."""
        if not isinstance(cache, StaticCache) or not cache.get_seq_length():
            return
        self._kept[bits, tuple(tokens)] = cache
        while len(self._kept) > _MOST_KEPT or sum(map(_bytes, self._kept.values())) > self._most:
            self._kept.popitem(last=False)

    def take(self, bits: float, prompt: Sequence[int], config: Any, most: int) -> tuple[Any, int]:
        """A copy of the longest beginning of `prompt` that is known, and its length; or (None, 0).

        At least one token of the prompt is left to compute, whose logits are needed.
        """
        best, key = 0, None
        for known_bits, tokens in self._kept:
            if known_bits == bits:
                shared = min(_shared(tokens, prompt), len(prompt) - 1)
                if shared > best:
                    best, key = shared, (known_bits, tokens)
        if key is None or best < _LEAST_SHARED:
            return None, 0
        self._kept.move_to_end(key)
        cache, size = new_cache(config, True, len(prompt), most), first_size(len(prompt), most)
        for layer, old in zip(_layers(cache), _layers(self._kept[key]), strict=True):
            layer.lazy_initialization(old.keys[:, :, :0], old.values[:, :, :0])
            layer.keys[:, :, :best] = old.keys[:, :, :best]
            layer.values[:, :, :best] = old.values[:, :, :best]
            layer.cumulative_length.fill_(best)
        make_room(cache, best, size - best, most)
        return cache, best


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    n = min(len(first), len(second))
    return next((i for i in range(n) if first[i] != second[i]), n)
