"""Lets a transformers model decode through the native step, wherever that computes the same.

    attach(model, group_of)     # once, after loading; every copy of the model has its own
    how(model)                  # "native step, avx512vbmi, 30 blocks", or why not

`attach` puts a `FusedDecode` in the place of the decoder's `forward`. It looks at each call: up
to 16 tokens of one sequence that continue a plain cache go to the native step, everything else
(prompts, batches, padding, training, traced or compiled code, attention weights, masks of a shape
of its own) to the class's forward. So nothing has to be switched, and nothing is switched for
another thread.

What the step knows about the model is worked out at the first call that could use it and holds as
long as the modules stay what they were: a replaced module (an adapter), a hook, a patched forward,
norms, rotary frequencies or scales that changed are noticed at the next call, which builds a new
step or runs through torch. The
reason is logged once. Not noticed is what torch does not count either: values of norms in 16 bits
that are changed through `.data`, or in place after loading in inference mode.

Caches. A static cache is written in place. A dynamic one is grown by a copy, as transformers does
at every token; for long texts a static cache is the faster one.

Copies. `copy.deepcopy` of a model (which is how views are made) gives the copy a `FusedDecode` of
its own. The decoder is referred to weakly, so a model is freed when its last reference goes.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dropbydrop.kernels import registry
from dropbydrop.kernels.cpu.step import (
    MODEL_TYPES,
    DecodeStep,
    GroupOf,
    MixedCodesError,
    Place,
)
from dropbydrop.kernels.registry import MAX_GEMV_ROWS, TYPES, log
from dropbydrop.system.errors import UnsupportedModelError

from .guards import Guards
from .int8_modules import NestedHead

# Arguments of a decoder's forward that the step can honour.
_KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values",
          "use_cache", "cache_position"}  # fmt: skip


def decoder_of(model: Any) -> Any:
    """The decoder inside a model with a head, or the model itself."""
    return getattr(model, model.base_model_prefix, model)


def attach(model: Any, group_of: GroupOf, kernel: str | None = None) -> None:
    """Let `model` decode natively where it can. Models of other kinds are left alone.

    Args:
        group_of: gives the `PreparedGroup` of quantized linears that read one input, or raises
            UnsupportedModelError.
        kernel: a name to force; see `registry.select`.
    """
    inner = decoder_of(model)
    if getattr(inner.config, "model_type", None) in MODEL_TYPES and hasattr(inner, "layers"):
        detach(model)
        inner.forward = FusedDecode(inner, group_of, kernel)


def detach(model: Any) -> None:
    """Undo `attach` for this copy of the model."""
    inner = decoder_of(model)
    if isinstance(inner.__dict__.get("forward"), FusedDecode):
        del inner.forward


def how(model: Any) -> str:
    """How a single token of this model is decoded, for people."""
    forward = decoder_of(model).__dict__.get("forward")
    if not isinstance(forward, FusedDecode):
        return f"through torch: blocks of type {model.config.model_type!r}"
    state = forward.state()
    return state.message if state.step else f"through torch: {state.message}"


def how_config(config: Mapping[str, Any] | None) -> str:
    """What `how` can tell from a model's config.json alone, or without one."""
    kinds = ", ".join(MODEL_TYPES)
    planes = (config or {}).get("quantization_config", {}).get("planes")
    kernel = registry.select(kind=planes[0]["kind"] if planes else None)
    if not kernel.native:
        return f"through torch: the kernel {kernel.name!r} has no native step"
    if config is None:
        return f"native step, {kernel.name}, for models of type {kinds}; others through torch"
    kind = config.get("model_type")
    if kind in MODEL_TYPES:
        return f"native step, {kernel.name}, where the blocks are plain ones of type {kind}"
    return f"through torch: blocks of type {kind!r}; the native step covers {kinds}"


def native(model: Any) -> bool:
    """Whether the native step serves this model at present."""
    forward = decoder_of(model).__dict__.get("forward")
    return isinstance(forward, FusedDecode) and forward.state().step is not None


@dataclass(frozen=True)
class _State:
    """A step, or the reason why there is none, and what that was concluded from."""

    guards: Guards
    step: DecodeStep | None
    message: str


class FusedDecode:
    """`forward` of one decoder: see the module's note. Safe to call from several threads."""

    def __init__(self, inner: Any, group_of: GroupOf, kernel: str | None) -> None:
        self._inner = weakref.ref(inner)
        self._group_of, self._kernel = group_of, kernel
        self._lock = threading.Lock()
        self._state: _State | None = None
        self._logged: set[str] = set()
        self.__signature__ = inspect.signature(type(inner).forward.__get__(inner))

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedDecode:
        return FusedDecode(copy.deepcopy(self._inner(), memo), self._group_of, self._kernel)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner: Any = self._inner()
        if not torch.compiler.is_compiling() and not args:
            result = self._decode(inner, kwargs)
            if result is not None:
                return result
        return type(inner).forward(inner, *args, **kwargs)

    def state(self) -> _State:
        """The step as the model is now."""
        state = self._state
        if state is None or not state.guards.same():
            with self._lock:
                state = self._state
                if state is None or not state.guards.same():
                    state = self._state = self._build()
        return state

    def _build(self) -> _State:
        inner: Any = self._inner()
        step, guards = None, Guards(inner)
        try:
            step = DecodeStep(inner, self._group_of, self._kernel)
            message = f"native step, {step.kernel.name}, {len(step.blocks)} blocks"
        except UnsupportedModelError as error:
            message = str(error)
        self._log(f"decoding: {message}")
        return _State(guards, step, message)

    def _log(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            log.info(message)

    def _decode(self, inner: Any, kwargs: dict[str, Any]) -> Any:
        """The result of the native step, or None where it does not apply."""
        given = kwargs.get("input_ids")
        if given is None:
            given = kwargs.get("inputs_embeds")
        cache = kwargs.get("past_key_values")
        if given is None or cache is None or given.shape[0] != 1 or given.shape[1] > MAX_GEMV_ROWS:
            return None
        if torch.is_grad_enabled() or inner.training or not given.is_cpu:
            return None
        others = (v for name, v in kwargs.items() if name not in _KNOWN)
        if any(v is not None and v is not False for v in others) or _asks_more(inner.config):
            return None
        n, start = given.shape[1], _length(cache)
        if start == 0 or not _continues(kwargs, start, n):
            return None
        state = self.state()
        step = state.step
        if step is None or len(step.blocks) != inner.config.num_hidden_layers:
            return None
        if not state.guards.plain() or torch.is_autocast_enabled("cpu"):
            self._log("decoding: through torch, as modules have hooks or types are cast")
            return None
        pairs = _grown(cache, start, n, step)
        if pairs is None:
            self._log(f"decoding: through torch, as the cache is a {type(cache).__name__}")
            return None
        embedded = kwargs.get("inputs_embeds")
        if embedded is None:
            embedded = inner.embed_tokens(given)
        if embedded.dtype not in TYPES:
            return None
        out = step(embedded[0], [Place(start + i, pairs) for i in range(n)])
        _advance(cache, pairs, n)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(
            last_hidden_state=out[None].to(embedded.dtype), past_key_values=cache
        )


def decode_together(
    models: Sequence[Any], ids: Sequence[int], caches: Sequence[Any]
) -> Tensor | None:
    """The next token of several sequences, each at its own precision, in one pass.

    A plane is read once for all rows that need it. Every row is bit for bit what the sequence gets
    by itself, or with others.

    Args:
        models: the view that each sequence continues with, all of one model.
        ids: the token that each continues with; at most MAX_GEMV_ROWS.
        caches: static or dynamic caches of transformers, each holding at least one token.

    Returns:
        Logits [n, vocabulary]; None, with no cache touched, where the native step does not serve
        these models together, or a cache, at present.
    """
    steps = {id(model): _ready_step(model) for model in models}
    if None in steps.values() or not 0 < len(ids) <= MAX_GEMV_ROWS or torch.is_grad_enabled():
        return None
    places, held = _places([steps[id(model)] for model in models], caches)
    embedded = _rows_by_model(models, lambda m: decoder_of(m).embed_tokens, torch.tensor(ids))
    if places is None or embedded is None or embedded.dtype not in TYPES:
        return None
    # the deepest first: a plane's rows are then the first ones
    order = sorted(range(len(ids)), key=lambda i: (-places[i].step.planes, id(places[i].step)))
    try:
        out = places[order[0]].step(embedded[order], [places[i] for i in order])
    except MixedCodesError:
        return None
    for cache, pairs in zip(caches, held, strict=True):
        _advance(cache, pairs, 1)
    states = torch.empty_like(out)
    states[order] = out
    return _rows_by_model(models, lambda m: m.get_output_embeddings(), states.to(embedded.dtype))


def _ready_step(model: Any) -> DecodeStep | None:
    """The native step of a model, if nothing is in its way now."""
    inner = decoder_of(model)
    forward = inner.__dict__.get("forward")
    if not isinstance(forward, FusedDecode) or inner.training:
        return None
    state = forward.state()
    plain = state.step is not None and state.guards.plain()
    return state.step if plain and not torch.is_autocast_enabled("cpu") else None


def _places(
    steps: Sequence[Any], caches: Sequence[Any]
) -> tuple[list[Any] | None, list[list[tuple[Tensor, Tensor]]]]:
    """Where each sequence goes on, and its caches with room for a token; None if one has none."""
    starts = [_length(cache) for cache in caches]
    if 0 in starts:
        return None, []
    grown = [_grown(c, s, 1, step) for c, s, step in zip(caches, starts, steps, strict=True)]
    held = [pairs for pairs in grown if pairs is not None]
    if len(held) < len(grown) or len({pairs[0][0].dtype for pairs in held}) > 1:
        return None, []
    return [Place(*place) for place in zip(starts, held, steps, strict=True)], held


def _rows_by_model(
    models: Sequence[Any], module_of: Callable[[Any], Any], x: Tensor
) -> Tensor | None:
    """Row i of x [n, ...] through the embedding or the head of model i; None if types differ.

    Views share these modules' tensors, mostly, and then all rows go through the first one's.
    """
    modules = {id(model): module_of(model) for model in models}
    tensors = {
        key: tuple(t.data_ptr() for t in (*m.parameters(), *m.buffers()))
        for key, m in modules.items()
    }
    parts: dict[Any, list[int]] = {}
    for i, model in enumerate(models):
        parts.setdefault((type(modules[id(model)]), tensors[id(model)]), []).append(i)
    found: list[Tensor | None] = [None] * len(models)
    for rows in parts.values():
        module = modules[id(models[rows[0]])]
        if x.dim() == 1 or isinstance(module, NestedHead):  # rows do not depend on each other
            made = module(x[rows][:, None])[:, 0]
        else:  # those of torch may
            made = torch.cat([module(x[i][None, None])[0] for i in rows])
        for i, row in zip(rows, made, strict=True):
            found[i] = row
    kept = [row for row in found if row is not None]
    return torch.stack(kept) if len({row.dtype for row in kept}) == 1 else None


def _asks_more(config: Any) -> bool:
    """Whether the config asks for outputs that the step does not have."""
    return bool(
        getattr(config, "output_attentions", False)
        or getattr(config, "output_hidden_states", False)
        or not getattr(config, "return_dict", True)
    )


def _length(cache: Any) -> int:
    """Tokens in a cache of layers that the step can write; 0 for others."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return 0
    if any(type(layer) not in (DynamicLayer, StaticLayer) for layer in layers):
        return 0
    return int(layers[0].get_seq_length()) if layers[0].is_initialized else 0


def _continues(kwargs: dict[str, Any], start: int, n: int) -> bool:
    """Whether n tokens take the next positions and see all before them, and none after."""
    ids = kwargs.get("position_ids")
    if ids is not None and not torch.equal(ids.view(-1), torch.arange(start, start + n)):
        return False
    return _causal(kwargs.get("attention_mask"), start, n)


def _causal(mask: Any, start: int, n: int) -> bool:
    if isinstance(mask, dict):
        return len(mask) == 1 and _causal(next(iter(mask.values())), start, n)
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] < start + n:
        return False
    if mask.dim() == 2:
        return bool(mask[:, : start + n].all())
    if mask.shape[:3] != (1, 1, n):
        return False
    seen = mask[0, 0, :, : start + n]
    seen = seen if seen.dtype == torch.bool else seen == 0
    if n == 1:
        return bool(seen.all())
    return torch.equal(seen, torch.ones(n, start + n, dtype=torch.bool).tril(start))


def _grown(cache: Any, start: int, n: int, step: DecodeStep) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of every block with room for n more tokens; None if they do not fit."""
    from transformers.cache_utils import StaticLayer

    if len(cache.layers) != len(step.blocks):
        return None
    first, pairs = cache.layers[0].keys, []
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        if not layer.is_initialized or values.shape != keys.shape or keys.dtype != first.dtype:
            return None
        if type(layer) is not StaticLayer:
            if keys.shape[2] != start:
                return None
            room = keys.new_empty(*keys.shape[:2], n, keys.shape[3])
            keys, values = torch.cat([keys, room], dim=2), torch.cat([values, room], dim=2)
        pairs.append((keys, values))
    shape = (1, step.kv_heads, pairs[0][0].shape[2], step.head_dim)
    fits = first.dtype in TYPES and first.is_cpu and start + n <= shape[2]
    if not fits or any(t.shape != shape or not t.is_contiguous() for pair in pairs for t in pair):
        return None
    return pairs


def _advance(cache: Any, pairs: list[tuple[Tensor, Tensor]], n: int) -> None:
    """Tell the cache about n tokens that were written."""
    from transformers.cache_utils import StaticLayer

    static = [x for x in cache.layers if type(x) is StaticLayer]
    # the first 5.x count the positions that are not zero instead
    counts = [x.cumulative_length for x in static if hasattr(x, "cumulative_length")]
    if counts:  # one operator for all of them
        torch._foreach_add_(counts, n)
    for layer, (keys, values) in zip(cache.layers, pairs, strict=True):
        if type(layer) is not StaticLayer:
            layer.keys, layer.values = keys, values
