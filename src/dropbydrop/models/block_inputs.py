"""A causal LM's own forward without its blocks: what surrounds them, and what they are called with.

Every block's `forward` is replaced by a stub that records its arguments and returns the hidden
state unchanged, then the model runs as usual. That yields, for any family and without a name:

- the input of the first block (embedding, with whatever scaling the family applies);
- what each block receives beside the hidden state: masks, local or global, position embeddings;
- when the last stub returns a given hidden state, what the model makes of it: final norm, head,
  soft cap; also with other values of the parameters, and with gradients (tuning).

Arguments are recorded once for a batch shape [b, T] and reused for all windows. They must not
depend on the tokens; two runs on different random tokens are compared to make sure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from dropbydrop.system.console import quiet_transformers
from dropbydrop.system.errors import UnsupportedModelError

Call = tuple[tuple[Any, ...], dict[str, Any]]  # a block's arguments after the hidden state
_Record = tuple[int, Tensor, Call]  # index of the block, its hidden state, the rest
_KEPT_SHAPES = 2  # a full batch and the last, shorter one


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
        self.returns_tuple = False  # whether this family's blocks return (hidden, ...)
        self._load, self._device = load, device
        self._calls: dict[tuple[int, int], list[Call]] = {}

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """ids [b, T] -> input of the first block [b, T, d]."""
        self.arguments(0, *ids.shape)  # settles whether stubs return tuples
        return self._run(ids)[0][0][1]

    def logits(self, hidden: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output of the last block [b, T, d] -> logits [b, T, vocab].

        With `values`, parameters of the model that runs are replaced by name. Gradients flow.
        """
        b, t = hidden.shape[:2]
        self.arguments(0, b, t)  # settles whether stubs return tuples
        ids = torch.zeros(b, t, dtype=torch.int64)
        return self._run(ids, hidden, values)[1].logits

    def arguments(self, i: int, b: int, t: int) -> Call:
        """What block i receives beside a hidden state [b, t, d].

        Raises:
            UnsupportedModelError: the blocks are not called once each and in order, or their
                arguments depend on the tokens.
        """
        if (b, t) not in self._calls:
            if not self._calls:
                self._check_independence(t)
            while len(self._calls) >= _KEPT_SHAPES:
                del self._calls[next(iter(self._calls))]
            self._calls[b, t] = [call for _, _, call in self._probe(b, t, seed=0)]
        return self._calls[b, t][i]

    @contextmanager
    def _stubs(self, records: list[_Record], last: Tensor | None) -> Iterator[None]:
        def stub(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, rest = _split_hidden(args, kwargs)
                records.append((index, hidden, rest))
                out = last if last is not None and index == len(self.blocks) - 1 else hidden
                return (out,) if self.returns_tuple else out

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
        """Recorded calls on random tokens; checks that blocks run once, in order, on [b, t, d]."""
        generator = torch.Generator().manual_seed(seed)
        vocab = self.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocab, (b, t), generator=generator)
        reason = ""
        for returns_tuple in (self.returns_tuple, not self.returns_tuple):
            self.returns_tuple = returns_tuple
            try:
                records, _ = self._run(ids)
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
                reason = reason or f"its forward fails: {type(error).__name__}: {error}"
                continue
            order = [index for index, _, _ in records]
            shapes = {tuple(hidden.shape[:-1]) for _, hidden, _ in records}
            if order == list(range(len(self.blocks))) and shapes == {(b, t)}:
                return records
            reason = reason or f"blocks are called in the order {order} on inputs {shapes}"
        raise UnsupportedModelError(
            f"{type(self.model).__name__} cannot be walked block by block ({len(self.blocks)} x "
            f"{type(self.blocks[0]).__name__} in {self.name}): {reason}. Only decoders that call "
            "their blocks once, one after the other, are supported."
        )

    def _check_independence(self, t: int) -> None:
        first, second = self._probe(1, t, seed=0), self._probe(1, t, seed=1)
        for (index, _, one), (_, _, two) in zip(first, second, strict=True):
            if not _same(one, two):
                raise UnsupportedModelError(
                    f"{self.name}.{index} ({type(self.blocks[index]).__name__}) receives "
                    "arguments that depend on the tokens, not only the hidden state; such models "
                    "are not supported."
                )


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Take the hidden state out of a block's arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    named = dict(kwargs)
    name = "hidden_states" if "hidden_states" in named else next(iter(named))
    return named.pop(name), ((), named)


def _same(one: Any, two: Any) -> bool:
    """Equality of nested arguments, tensors by value."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    return type(one) is type(two)
