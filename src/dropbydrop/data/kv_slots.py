"""Room for what a model keeps of the texts that it writes: made once, filled token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class KVSlots(DynamicLayer):
    """Keys and values of one layer, written into room for `room` tokens that is made once.

    Concatenating, as transformers does, would copy all of them every step.
    """

    room = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [b, heads, new, head_dim]; returns views [b, heads, so far, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            b, heads, _, d = key_states.shape
            self._keys = key_states.new_empty(b, heads, self.room, d)
            self._values = value_states.new_empty(b, heads, self.room, value_states.shape[-1])
        low = self.get_seq_length()
        high = low + key_states.shape[-2]
        self._keys[:, :, low:high] = key_states
        self._values[:, :, low:high] = value_states
        self.keys, self.values = self._keys[:, :, :high], self._values[:, :, :high]
        return self.keys, self.values

    def seek(self, tokens: int) -> None:
        """Go on as if `tokens` tokens were written, whatever their slots hold."""
        if not self.is_initialized:  # nothing was written yet
            return
        self.keys, self.values = self._keys[:, :, :tokens], self._values[:, :, :tokens]

    def clear(self) -> None:
        """Zeros in all slots: the room is as resident as it will be."""
        self._keys.zero_()
        self._values.zero_()


def cache_with_room(model: Any, tokens: int) -> Cache:
    """An empty cache for texts of `tokens` tokens: `KVSlots` for attention, whatever else the
    model's layers keep (state-space layers, convolutions) as transformers makes it."""
    room = type("_Room", (KVSlots,), {"room": tokens})
    usual = DynamicCache(config=model.config)
    if not usual.layers:
        return Cache(layer_class_to_replicate=room)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)  # and nothing beside keys and values
    usual.layers = [room() if type(one) in plain else one for one in usual.layers]
    return usual


def slots_of(cache: Cache) -> list[KVSlots]:
    """The layers of attention."""
    return [layer for layer in cache.layers if isinstance(layer, KVSlots)]


@torch.inference_mode()
def bytes_of_text(model: Any, length: int) -> int:
    """Memory for a text of `length` tokens beside the model, measured with its first one."""
    cache = cache_with_room(model, 1)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    logits = model(token, past_key_values=cache, use_cache=True).logits
    total = 3 * logits.nbytes  # and once more in float32
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and not name.startswith("_"):
                total += value.nbytes * (length if name in ("keys", "values") else 1)
    return int(total)
