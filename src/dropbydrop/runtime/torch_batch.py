"""The next token of several sequences in one pass through torch, where there is no native step.

    batch = TorchBatch()
    rows = [Row(cache, length), ...]            # sequences whose prompts are read
    logits = batch.step(model, rows, tokens)    # [n, vocabulary]; again with other rows at will
    row.leave()

What. `fused_decode.decode_together` serves four families on a CPU. Here every other model whose
cache is plain keys and values takes part, on a CPU or a GPU, through its own forward.

Layout. One tensor [rows, heads, columns, head_dim] for the keys of each layer, and one for its
values. All rows write at the same column, the clock; the tokens of a row are those just before it,
and what is left of them is masked. So a row looks as a padded one in a batch of `generate`: masks
come from transformers, whatever the family, and as a distance in columns is one in tokens, those of
sliding windows are right too. Positions are given, and do not depend on columns. Layers with a
window get all columns, as their masks need.

Steps. A row joins by a copy of its cache, moves from one batch to another (another precision) by a
copy of its columns, and leaves by being forgotten. Rows are of a few sizes and columns come in
blocks, so that shapes repeat. When the clock is at the end, a row is longer than it, or another
size fits, everything is packed anew: the clock becomes the longest length, and at least half a
block of columns is free. A batch without rows holds no tensors.

What is not served is found by `refusal`: layers of other kinds (recurrent states, convolutions),
scales that depend on the longest text of a batch, masks that a family keeps for itself, and models
whose batch does not compute what each sequence gets alone, which is tried on two short ones.

Limits. Results are those of a sequence alone up to the rounding of products with other numbers of
rows. Every row costs as many columns as the longest one. One thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

BLOCK = 128  # columns
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # rows
_SAME = 0.05  # share of the norm that logits of a batch may be off, by rounding in 16 bits
# layers that only know how to be skipped: of blocks without attention, or with keys of others
_EMPTY = getattr(cache_utils, "DummyLayer", ())
_PLAIN = (DynamicLayer, cache_utils.DynamicSlidingWindowLayer)


class Row:
    """One sequence: its `length` in tokens, and its keys and values, here or in a batch."""

    def __init__(self, cache: Any, length: int) -> None:
        """Take over a cache of `length` tokens, with layers of kinds that `refusal` accepts."""
        self.length = length
        self._held: list[tuple[Any, Any]] = [
            (None, None) if x.keys is None else (x.keys[:, :, :length], x.values[:, :, :length])
            for x in cache.layers  # a window holds fewer
        ]
        self._batch: TorchBatch | None = None
        self._slot = 0

    def leave(self) -> None:
        """Free the keys and values. May be called twice."""
        self._held = []
        if self._batch is not None:
            self._batch._forget(self)

    def layer(self, i: int) -> Any:
        """Keys and values [heads, n, head_dim] of layer i, n the length or what its window needs;
        (None, None) where it has none."""
        if self._batch is None:
            keys, values = self._held[i]
            return (None, None) if keys is None else (keys[0], values[0])
        return self._batch._layer(i, self)


class _Layer(CacheLayerMixin):
    """Keys and values of a layer for all rows, written in place at the clock."""

    is_compileable, is_sliding = True, False
    keys: Any  # [rows, heads, columns, head_dim], and values too
    values: Any

    def __init__(self, clock: Tensor) -> None:
        super().__init__()
        self._clock = clock

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing: the tensors come with the rows."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys.index_copy_(2, self._clock, key_states)
        self.values.index_copy_(2, self._clock, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        return self._clock[0]

    def get_max_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else -1

    get_max_cache_shape = get_max_length  # its name in the first 5.x


class TorchBatch:
    """See the module's note."""

    def __init__(self) -> None:
        """A batch without rows."""
        self._clear()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that it holds memory for."""
        return (0, 0) if self._seen is None else (self._seen.shape[0], self._seen.shape[1])

    def step(self, model: Any, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        """The logits after one more token of each row, float32 [n, vocabulary] on the CPU.

        Rows may be new, or come from another batch. Those that were here and are not given keep
        their keys and values, outside. If the model raises, the rows are as they were; if memory
        for them ends, they are to be left.

        Args:
            rows: at most SIZES[-1], all different, on the same side of each of `turns(model)`.
            tokens: what each of them continues with.
        """
        for row in [row for row in self._rows if row not in rows]:
            self._put_out(row)
        self._take_in(model, rows)
        assert self._seen is not None
        size = self.shape[0]
        ids, places = [0] * size, [0] * size
        for row, token in zip(rows, tokens, strict=True):
            ids[row._slot], places[row._slot] = token, row.length
        given = torch.tensor([ids, places]).to(self._seen.device)[:, :, None]
        self._seen.index_fill_(1, self._clock, True)  # of unused rows too: softmax needs a column
        out = model(
            input_ids=given[0],
            position_ids=given[1],
            attention_mask=self._seen,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1].float().cpu()
        self._clock.add_(1)
        self._time += 1
        for row in rows:
            row.length += 1
        return logits[[row._slot for row in rows]]

    # ---- rows ----------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._rows: list[Row] = []
        self._cache: Any = None
        self._seen: Tensor | None = None  # bool [rows, columns]: what holds a token
        self._clock = torch.zeros(1, dtype=torch.long)
        self._time = 0  # the clock, known without asking the device

    def _layer(self, i: int, row: Row) -> Any:
        layer, part = self._cache.layers[i], slice(self._time - row.length, self._time)
        if layer.keys is None:
            return None, None
        return layer.keys[row._slot, :, part], layer.values[row._slot, :, part]

    def _forget(self, row: Row) -> None:
        row._batch = None
        self._rows.remove(row)
        if not self._rows:
            self._clear()

    def _put_out(self, row: Row) -> None:
        """Have a row hold its keys and values itself."""
        pairs = [self._layer(i, row) for i in range(len(self._cache.layers))]
        row._held = [
            (None, None) if k is None else (k[None].clone(), v[None].clone()) for k, v in pairs
        ]
        self._forget(row)

    def _take_in(self, model: Any, rows: Sequence[Row]) -> None:
        """Have all rows here, with a free column at the clock."""
        longest = max(row.length for row in rows)
        wanted = fitting([row.length for row in rows])
        size, columns = self.shape
        if size != wanted[0] or not longest <= self._time < columns or columns >= 2 * wanted[1]:
            return self._pack(model, rows, *wanted)
        free = set(range(size)) - {row._slot for row in self._rows}
        for row in rows:
            if row._batch is not self:
                slot = free.pop()
                for i, layer in enumerate(self._cache.layers):
                    keys, values = row.layer(i)
                    if keys is not None:
                        _write(layer.keys[slot], keys, self._time)
                        _write(layer.values[slot], values, self._time)
                self._enter(row, slot)

    def _enter(self, row: Row, slot: int) -> None:
        """A row whose keys and values were copied is here."""
        assert self._seen is not None
        self._seen[slot, : self._time] = False
        self._seen[slot, self._time - row.length : self._time] = True
        if row._batch is not self:
            row._held = []
            if row._batch is not None:
                row._batch._forget(row)
            self._rows.append(row)
        row._batch, row._slot = self, slot

    def _pack(self, model: Any, rows: Sequence[Row], size: int, columns: int) -> None:
        """Copy all rows into tensors of another size, layer by layer."""
        clock = torch.tensor([max(row.length for row in rows)], device=model.device)
        given = DynamicCache(config=model.config) if self._cache is None else self._cache
        made = [layer if isinstance(layer, _EMPTY) else _Layer(clock) for layer in given.layers]
        for i, layer in enumerate(made):
            pairs = [row.layer(i) for row in rows]
            if pairs[0][0] is None:
                continue
            layer.keys, layer.values = (
                _packed([pair[j] for pair in pairs], size, columns, max(r.length for r in rows))
                for j in (0, 1)
            )
            layer.is_initialized = True
            if self._cache is not None:  # one layer at a time is there twice
                self._cache.layers[i] = None
        self._cache, self._clock = Cache(layers=made), clock
        self._time = max(row.length for row in rows)
        self._seen = torch.zeros(size, columns, dtype=torch.bool, device=model.device)
        for slot, row in enumerate(rows):
            self._enter(row, slot)


def fitting(lengths: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a batch for sequences of these lengths."""
    size = next(size for size in SIZES if size >= len(lengths))
    return size, -(-(max(lengths) + BLOCK // 2) // BLOCK) * BLOCK


def _packed(parts: Sequence[Tensor], size: int, columns: int, end: int) -> Tensor:
    """[size, heads, columns, head_dim] of [heads, n, head_dim] each, which end at column `end`."""
    heads, _, width = parts[0].shape
    made = parts[0].new_zeros(size, heads, columns, width)
    for row, part in zip(made, parts, strict=False):
        _write(row, part, end)
    return made


def _write(row: Tensor, part: Tensor, end: int) -> None:
    """Copy [heads, n, head_dim] into [heads, columns, head_dim], to end at a column."""
    row[:, end - part.shape[1] : end] = part


# ---- which models ------------------------------------------------------------------------------


def refusal(model: Any) -> str | None:
    """Why sequences of a model cannot share a pass here; None if they can.

    Runs a few tokens of two sequences, alone and together.
    """
    layers = DynamicCache(config=model.config).layers
    others = {type(x).__name__ for x in layers if type(x) not in _PLAIN and not _empty(x)}
    if others:
        return f"its cache has layers of type {', '.join(sorted(others))}"
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"{type(model).__name__} takes no positions"
    if any("dynamic" in str(kind) for kind, _ in _rotary(model)):
        return "its rotary frequencies depend on the longest text of a batch"
    if any(getattr(module, "attn_temperature_tuning", False) for module in model.modules()):
        return "its attention is scaled by the number of the column"
    if any(_square(buffer) for buffer in model.buffers()):
        return "its attention has masks of its own, by the number of the column"
    try:
        off = _difference(model)
    except Exception as error:  # a family's code can fail in any way
        return f"a batch fails with {type(error).__name__}"
    return None if off <= _SAME else f"logits of a batch are {off:.3f} off"


def turns(model: Any) -> tuple[int, ...]:
    """Numbers of tokens above which a text has other rotary frequencies ("longrope"), by which a
    batch has those of its longest text: on one side of each, or in another batch."""
    found = {
        settings["original_max_position_embeddings"]
        for kind, settings in _rotary(model)
        if kind == "longrope"
    }
    return tuple(sorted(found))


def _rotary(model: Any) -> Iterator[tuple[str, Any]]:
    """Type and settings of rotary positions, one for each kind of layers."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is not None:
            settings = module.config.rope_parameters
            if isinstance(kinds, dict):
                yield from ((kind, settings[name]) for name, kind in kinds.items())
            else:
                yield kinds, settings


def _square(buffer: Tensor) -> bool:
    """Whether a buffer is a table of positions by positions, as GPT-Neo's of masks."""
    return buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2] > 1


def _empty(layer: Any) -> bool:
    return bool(_EMPTY) and type(layer) is _EMPTY


@torch.inference_mode()
def _difference(model: Any) -> float:
    """How far logits of two sequences together are from those of each alone, relative."""
    texts, more, alone, rows = ([3, 4, 5, 6, 7], [9, 8]), (10, 11, 12), [], []
    for text in texts:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache in caches:
            _forward(model, cache, text)
        alone.append(torch.stack([_forward(model, caches[0], [token]) for token in more]))
        rows.append(Row(caches[1], len(text)))
    batch = TorchBatch()
    made = torch.stack([batch.step(model, rows, [token] * 2) for token in more], 1)
    want = torch.stack(alone)
    off = (made - want).flatten(0, 1).norm(dim=-1) / want.flatten(0, 1).norm(dim=-1)
    return float(off.nan_to_num(torch.inf).max())


def _forward(model: Any, cache: Any, ids: list[int]) -> Tensor:
    given = torch.tensor([ids], device=model.device)
    out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits[0, -1].float().cpu()
    return logits
