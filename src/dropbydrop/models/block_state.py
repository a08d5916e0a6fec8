"""What passes from block to block, as one tensor [n, T, D] for n windows of T tokens.

For most decoders that is the hidden state [n, T, d], as it is. Some need more, and it travels in
further columns, so that whoever keeps, splits or sends the state need not know:

- a hidden state of more axes, such as the parallel streams of AltUp, [S, n, T, d]: they are moved
  behind the tokens and flattened;
- ids of the tokens, where arguments of the blocks depend on them (per-layer embeddings): three
  digits of base 256, each of which is exact in any floating-point type;
- tensors that blocks leave in a mapping for later blocks (shared keys and values): each is
  flattened like the hidden state, zeros until it is written. A block always reads them all; which
  of them means something to it is its own business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

_DIGITS = 3  # of base 256: 16,777,216 ids


@dataclass(frozen=True)
class Axes:
    """Where windows and tokens are in a tensor, and the sizes of its other axes.

    Attributes:
        batch, tokens: axis of each; rest: sizes of the others, in order.
    """

    batch: int
    tokens: int
    rest: tuple[int, ...]

    @classmethod
    def between(cls, one: torch.Size, two: torch.Size) -> Axes | None:
        """Of shapes that were seen for b x T and (b + 1) x (T + 2) tokens; None if neither fits."""
        grown = [b - a for a, b in zip(one, two, strict=True)]
        if sorted(grown) != [0] * (len(grown) - 2) + [1, 2]:
            return None
        rest = tuple(size for size, by in zip(one, grown, strict=True) if by == 0)
        return cls(grown.index(1), grown.index(2), rest)

    @property
    def width(self) -> int:
        """Values a token."""
        return prod(self.rest)

    def flat(self, x: Tensor) -> Tensor:
        """x -> [b, T, width]."""
        moved = x.movedim((self.batch, self.tokens), (0, 1))
        return moved.reshape(*moved.shape[:2], -1)

    def unflat(self, x: Tensor) -> Tensor:
        """[b, T, width] -> the tensor as the model has it."""
        return x.unflatten(-1, self.rest).movedim((0, 1), (self.batch, self.tokens))


@dataclass(frozen=True)
class BlockState:
    """Layout of the state; see the module's note.

    Attributes:
        hidden: axes of the hidden state.
        ids: whether the tokens are carried.
        side: key of the mapping -> axes of the tensors it holds there.
    """

    hidden: Axes
    ids: bool = False
    side: Mapping[Any, tuple[Axes, ...]] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether the state is the hidden state as it is."""
        alone = not self.ids and not self.side
        return alone and (self.hidden.batch, self.hidden.tokens, len(self.hidden.rest)) == (0, 1, 1)

    def pack(
        self,
        hidden: Tensor,
        ids: Tensor | None = None,
        side: Mapping[Any, tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        """The parts -> [b, T, D]. ids [b, T] int64; what `side` lacks becomes zeros."""
        if self.plain:
            return hidden
        parts = [self.hidden.flat(hidden)]
        b, t = parts[0].shape[:2]
        if self.ids:
            assert ids is not None
            digits = [(ids >> (8 * k)) & 255 for k in range(_DIGITS)]
            parts.append(torch.stack(digits, -1).to(parts[0]))
        for key, axes in self.side.items():
            tensors = None if side is None else side.get(key)
            for k, one in enumerate(axes):
                there = None if tensors is None else tensors[k]
                empty = parts[0].new_zeros(b, t, one.width)
                parts.append(empty if there is None else one.flat(there).to(parts[0].dtype))
        return torch.cat(parts, -1)

    def unpack(self, x: Tensor) -> tuple[Tensor, Tensor | None, dict[Any, tuple[Tensor, ...]]]:
        """[b, T, D] -> hidden state, ids [b, T] or None, side tensors by key."""
        if self.plain:
            return x, None, {}
        sizes = [self.hidden.width, _DIGITS * self.ids]
        sizes += [one.width for axes in self.side.values() for one in axes]
        hidden, digits, *others = x.split(sizes, -1)
        ids = None
        if self.ids:
            whole = digits.detach().to(torch.int64)
            ids = sum((whole[..., k] << (8 * k) for k in range(_DIGITS)), whole.new_zeros(()))
        rest = iter(others)
        side = {
            key: tuple(one.unflat(next(rest)) for one in axes) for key, axes in self.side.items()
        }
        return self.hidden.unflat(hidden), ids, side
