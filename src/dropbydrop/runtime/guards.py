"""Notices when a decoder is no longer what a native step was built from.

`same` and `plain` are asked at every token, for hundreds of modules whose objects the caches have
lost since the last one. So what is compared lies in flat lists, the loops are those of `map`, and
hooks are looked at only after any module of the process was given one.

Beside modules and norms a step reads numbers (scales of attention and of rotary positions, what
norms add to a mean) and buffers (frequencies; scales of rows, which are read where they are: for
them a change in place needs no notice, another place does).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from operator import attrgetter, getitem, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as of_torch
from torch.utils.hooks import RemovableHandle

_version: Callable[[Tensor], int] = attrgetter("_version")
_NUMBERS = ("scaling", "attention_scaling", "variance_epsilon")


class Guards:
    """The modules of a decoder down to the linears of a block, and what a step reads of them."""

    def __init__(self, inner: nn.Module) -> None:
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._parts: list[Any] = []  # modules, then tensors and numbers
        self._add(inner, depth=4)
        modules: list[nn.Module] = self._parts[:]
        self._members = [m.__dict__ for m in modules]
        self._hooks: list[dict[int, Any]] = [m._forward_hooks for m in modules]
        self._hooks += [of_torch._global_forward_hooks, of_torch._global_forward_pre_hooks]
        self._hooks += [m._forward_pre_hooks for m in modules]
        self._hooks_seen = -1  # how many hooks this process had registered when all did nothing
        self._placed: list[Tensor] = []  # norms, biases, frequencies, scales
        copied: list[Tensor] = []  # all of them but scales
        for module in modules:
            for held in (module._parameters, module._buffers):
                in_place = held is module._buffers and hasattr(module, "codes")
                found = {name: x for name, x in held.items() if x is not None and x.dim() == 1}
                for name, x in found.items():
                    self._keep(held, name, x)
                self._placed += found.values()
                copied += [] if in_place else found.values()
            for name in _NUMBERS:
                if name in module.__dict__:
                    self._keep(module.__dict__, name, module.__dict__[name])
        self._counted = [x for x in copied if not x.is_inference()]
        self._versions = self._read_versions()

    def _keep(self, owner: dict[str, Any], name: str, part: Any) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._parts.append(part)

    def _add(self, module: nn.Module, depth: int) -> None:
        for name, child in module._modules.items():
            if child is not None:
                self._keep(module._modules, name, child)
                if depth > 1:
                    self._add(child, depth - 1)

    def _read_versions(self) -> list[int]:
        # In-place changes count in `_version`, new data show in the address.
        return [*map(_version, self._counted), *map(Tensor.data_ptr, self._placed)]

    def same(self) -> bool:
        """Whether all is the same objects, and what was copied unchanged."""
        try:
            found = map(getitem, self._owners, self._names)
            return all(map(is_, found, self._parts)) and self._read_versions() == self._versions
        except KeyError:
            return False

    def plain(self) -> bool:
        """Whether the modules compute what their classes say: no hooks, no patched forward."""
        if any(map(dict.__contains__, self._members, repeat("forward"))):
            return False
        registered = RemovableHandle.next_id
        if registered != self._hooks_seen:
            # transformers leaves its own hooks behind, idle unless hidden states are asked for.
            if any(
                f.__module__ != "transformers.utils.output_capturing"
                for hooks in filter(None, self._hooks)
                for f in hooks.values()
            ):
                return False
            self._hooks_seen = registered
        return True
