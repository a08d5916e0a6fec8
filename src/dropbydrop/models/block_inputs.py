"""A causal LM's own forward without its blocks: what surrounds them, and what they are called with.

Every block's `forward` is replaced by a stub that records its arguments and returns the hidden
state unchanged, then the model runs as usual. That yields, for any family and without a name:

- the input of the first block (embedding, with whatever scaling the family applies);
- what each block receives beside the hidden state: masks, local or global, position embeddings;
- when the last stub returns a given hidden state, what the model makes of it: final norm, head,
  soft cap; also with other values of the parameters, and with gradients (tuning).

Arguments are recorded once for a batch shape [b, T] and reused for all windows, unless two runs on
different random tokens differ in them (per-layer embeddings): then they are recorded for the tokens
of every batch, which the state carries (block_state.py). An empty mapping that all blocks receive
is taken for what they hand to each other (shared keys and values); what they leave in it is part of
the state, and its sizes are found by running the blocks on the meta device, without any memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import UnsupportedModelError

from .block_state import Axes, BlockState

Call = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments after the hidden state
_Record = tuple[int, Tensor, Call]  # index of the block, its hidden state, the rest
_KEPT_SHAPES = 2  # a full batch and the last, shorter one
_RETURNS = (0, 1, 2, 3)  # what blocks return: the hidden state, or a tuple of so many with it first
_PROBE = (2, 7)  # windows and tokens of the run that settles the layout of the state
_SHARED = "values that blocks hand to each other"


class BlockInputs:
    """See the module's note.

    Args:
        blocks: the list called `name` inside of `model`.
        load: called with `head` before a forward; must make the weights outside of the blocks
            available, with `head` also those the causal LM adds to its base model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        blocks: nn.ModuleList,
        load: Callable[[bool], None],
        device: torch.device,
    ) -> None:
        self.model, self.name, self.blocks = model, name, blocks
        self.returns = 0  # see _RETURNS
        self._load, self._device = load, device
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._settled: BlockState | None = None

    @property
    def state(self) -> BlockState:
        """Layout of what passes between the blocks.

        Raises:
            UnsupportedModelError: the blocks are not called once each and in order, or hand more
                to each other than can be followed.
        """
        if self._settled is None:
            self._settled = self._settle()
        return self._settled

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """ids [b, T] -> state before the first block, [b, T, D]."""
        state = self.state
        ids = ids.to(self._device)
        records, _ = self._run(ids)
        if not state.ids:  # blocks are called so for all tokens: no run for this shape again
            self._keep(ids.shape[0], ids.shape[1], records)
        return state.pack(records[0][1], ids)

    def logits(self, x: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """State after the last block [b, T, D] -> logits [b, T, vocab].

        With `values`, parameters of the model that runs are replaced by name. Gradients flow.
        """
        hidden, ids, _ = self.state.unpack(x)
        if ids is None:
            ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        return self._run(ids, hidden, values)[1].logits

    def through(self, i: int, block: Callable[..., Any], x: Tensor) -> Tensor:
        """State [b, T, D] through block i, called as the model calls it."""
        state = self.state
        hidden, ids, side = state.unpack(x)
        rest, named = self._arguments(i, x.shape[0], x.shape[1], ids)
        shared = None
        if state.side:
            rest, named, shared = _with_shared(rest, named, side)
        out = block(hidden, *rest, **named)
        return state.pack(out[0] if isinstance(out, tuple) else out, ids, shared)

    def _arguments(self, i: int, b: int, t: int, ids: Tensor | None) -> Call:
        """What block i receives beside a hidden state of [b, t] tokens."""
        if ids is not None:
            with torch.no_grad():
                return self._run(ids)[0][i][2]
        if (b, t) not in self._calls:
            self._keep(b, t, self._probe(b, t, seed=0))
        return self._calls[b, t][i]

    def _keep(self, b: int, t: int, records: list[_Record]) -> None:
        """Remember what blocks receive beside [b, t] tokens."""
        self._calls.pop((b, t), None)
        while len(self._calls) >= _KEPT_SHAPES:
            del self._calls[next(iter(self._calls))]
        self._calls[b, t] = [call for _, _, call in records]

    @contextmanager
    def _stubs(self, records: list[_Record], last: Tensor | None) -> Iterator[None]:
        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = _split_hidden(args, kwargs)
                records.append((index, hidden, rest))
                out = last if last is not None and index == len(self.blocks) - 1 else hidden
                return (out, *[None] * (self.returns - 1)) if self.returns else out

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = stub(index)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _run(
        self,
        ids: Tensor,
        last: Tensor | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> tuple[list[_Record], Any]:
        """Run the model without its blocks, with its head where `last` comes out of the last.

        ids [b, T] -> (recorded calls, final output).
        """
        head = last is not None
        self._load(head)
        records: list[_Record] = []
        run: Any = self.model if head else self.model.base_model
        with self._stubs(records, last), quiet_transformers():
            output = functional_call(
                run, dict(values or {}), (), {"input_ids": ids.to(self._device)}
            )
        return records, output

    @torch.no_grad()
    def _probe(self, b: int, t: int, seed: int) -> list[_Record]:
        """Recorded calls on random tokens; checks that blocks run once and in order."""
        generator = torch.Generator().manual_seed(seed)
        vocab = self.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocab, (b, t), generator=generator)
        reason = ""
        for returns in sorted(_RETURNS, key=lambda k: k != self.returns):
            self.returns = returns
            try:
                records, _ = self._run(ids)
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                reason = reason or f"its forward fails: {type(error).__name__}: {error}"
                continue
            order = [index for index, _, _ in records]
            shapes = {tuple(hidden.shape) for _, hidden, _ in records}
            if order == list(range(len(self.blocks))) and len(shapes) == 1:
                return records
            reason = reason or f"blocks are called in the order {order} on inputs {shapes}"
        raise self._refusal(
            f"{reason}. Only decoders that call their blocks once, one after the "
            "other, are supported."
        )

    def _refusal(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} cannot be walked block by block ({len(self.blocks)} x "
            f"{type(self.blocks[0]).__name__} in {self.name}): {reason}"
        )

    def _settle(self) -> BlockState:
        """Layout of the state, from runs on random tokens."""
        b, t = _PROBE
        first, second = self._probe(b, t, seed=0), self._probe(b, t, seed=1)
        larger = self._probe(b + 1, t + 2, seed=0)
        hidden = Axes.between(first[0][1].shape, larger[0][1].shape)
        if hidden is None:
            raise self._refusal(
                f"its hidden state has no axis of windows and one of tokens: "
                f"{list(first[0][1].shape)}."
            )
        pairs = zip(first, second, strict=True)
        ids = not all(_same(one[2], two[2]) for one, two in pairs)
        if not _shared_of(first):
            return BlockState(hidden, ids)
        small, large = self._left_on_meta(first), self._left_on_meta(larger)
        side: dict[Any, tuple[Axes, ...]] = {}
        for key, tensors in small.items():
            axes = [
                Axes.between(a.shape, c.shape) for a, c in zip(tensors, large[key], strict=True)
            ]
            if None in axes:
                raise self._refusal(f"{_SHARED} have no axis of windows and one of tokens.")
            side[key] = tuple(one for one in axes if one is not None)
        return BlockState(hidden, ids, side)

    @torch.no_grad()
    def _left_on_meta(self, records: list[_Record]) -> Mapping[Any, tuple[Tensor, ...]]:
        """What all blocks leave in the shared mapping, run on the meta device."""
        shared: MutableMapping[Any, Any] = type(_shared_of(records)[0])()
        for i, hidden, call in records:
            block = self.blocks[i]
            state = {**dict(block.named_parameters()), **dict(block.named_buffers())}
            state = {name: tensor.to("meta") for name, tensor in state.items()}
            rest, named = tree_map_only(Tensor, lambda x: x.to("meta"), call)
            rest, named, _ = _with_shared(rest, named, shared, keep=True)
            try:
                functional_call(block, state, (hidden.to("meta"), *rest), named)
            except (RuntimeError, NotImplementedError) as error:
                raise self._refusal(f"{_SHARED} cannot be found: {error}.") from error
        return shared


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Take the hidden state out of a block's arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    named = dict(kwargs)
    name = "hidden_states" if "hidden_states" in named else next(iter(named))
    return named.pop(name), ((), named)


def _is_shared(value: Any) -> bool:
    """Whether an argument can be what blocks leave for each other: an empty mapping."""
    return isinstance(value, MutableMapping) and not value


def _shared_of(records: list[_Record]) -> list[Any]:
    """The empty mapping that all blocks receive as one and the same object; at most one."""
    calls = [[*rest, *named.values()] for _, _, (rest, named) in records]
    first = [value for value in calls[0] if _is_shared(value)]
    return [v for v in first if all(any(v is other for other in call) for call in calls)][:1]


def _with_shared(
    rest: tuple[Any, ...], named: dict[str, Any], content: Mapping[Any, Any], keep: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any], MutableMapping[Any, Any]]:
    """A call with `content` in its shared mapping: a new one, or with `keep` `content` itself."""
    kind = next(type(value) for value in [*rest, *named.values()] if _is_shared(value))
    mapping: Any = content if keep else kind(dict(content))
    rest = tuple(mapping if _is_shared(value) else value for value in rest)
    named = {name: mapping if _is_shared(value) else value for name, value in named.items()}
    return rest, named, mapping


def _same(one: Any, two: Any) -> bool:
    """Equality of nested arguments, tensors by value."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    return type(one) is type(two)
