"""q/k/v, or gate and up, in one go: the linears of one input group, multiplied together on a GPU.

    multiply_together(model)      # once, after loading; views made from the model keep it

A model calls q_proj, k_proj and v_proj one after the other with the same tensor. `CudaGroup` can
do all of them with one rotation and one product; what is needed is that the first call knows of
the others, without keeping anything between calls, where two threads would meet.

So the class of their parent (attention, feed-forward part) is replaced by a subclass of itself. Its
forward runs the original forward on a stand-in for the module that lasts for this one call: every
attribute is the module's, only the linears of an input group are `_Part`s of one `_Call`. The first
that is called multiplies for all; the others, called with the identical tensor, hand out their
result. One called with another tensor multiplies for itself, so nothing is assumed about the
parent's code.

An input group falls back to its modules one by one where they are not plain: adapters, hooks, a
patched forward, different precisions, another device. torch.compile traces all of this away.

Limits: a forward that calls `super()` needs the module itself and is left alone. Attributes that a
forward sets end with the call.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn

from dropbydrop import kernels

from .modules import NestedLinear, prepared, trains_bias

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Call:
    """The linears of one input group during one forward of their parent."""

    def __init__(self, input_group: Any, linears: Sequence[Any]) -> None:
        self.input_group, self.linears = input_group, linears
        self.x: Tensor | None = None
        self.ys: Sequence[Tensor] = ()

    def part(self, i: int, x: Tensor) -> Tensor:
        """Result i for the input x."""
        if self.x is None:
            self.x, self.ys = x, self.input_group(x)
        return self.ys[i] if x is self.x else self.linears[i](x)


class _StandIn:
    """A module's attributes, some of them replaced."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Part(_StandIn):
    """Stands in for linear i of a call."""

    def __init__(self, call: _Call, i: int) -> None:
        super().__init__(call.linears[i])
        self.call, self.i = call, i

    def __call__(self, x: Tensor) -> Tensor:
        return self.call.part(self.i, x)


def _plain(linears: Sequence[Any]) -> bool:
    """Whether these are quantized linears of one precision, as they were loaded."""
    for linear in linears:
        if type(linear) is not NestedLinear or "forward" in linear.__dict__:
            return False
        if linear.prefix != linears[0].prefix or any(getattr(linear, h) for h in _HOOKS):
            return False
        if trains_bias(linear):
            return False
    return True


def _on_gpu_kernel(linear: NestedLinear) -> bool:
    return kernels.backend_for(linear.codes.device.type, kind=linear.codes.kind)[0] == "gpu"


def _stand_in(module: nn.Module, input_groups: Sequence[Sequence[str]]) -> Any:
    """What the original forward runs on: `module` itself where no input group can be shared."""
    found: Any = module
    for names in input_groups:
        linears = [getattr(module, name) for name in names]
        if _plain(linears) and _on_gpu_kernel(linears[0]):
            if found is module:
                found = _StandIn(module)
            call = _Call(prepared(linears), linears)
            for i, name in enumerate(names):
                setattr(found, name, _Part(call, i))
    return found


@cache
def _sharing(kind: Any, input_groups: tuple[tuple[str, ...], ...]) -> type[nn.Module]:
    """The subclass of a module's class that computes these children's products together."""
    plain = kind.forward

    @wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain(_stand_in(self, input_groups), *args, **kwargs)

    names = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names)


def multiply_together(model: nn.Module) -> None:
    """Let the linears of every input group of a loaded model be multiplied in one go.

    No effect on models whose planes are where no GPU kernel runs; input groups whose linears have
    different parents stay as they are.
    """
    linears = {m.name: path for path, m in model.named_modules() if isinstance(m, NestedLinear)}
    if not linears:
        return
    first: Any = model.get_submodule(next(iter(linears.values())))
    if not _on_gpu_kernel(first):
        return
    input_groups: dict[str, list[tuple[str, ...]]] = {}
    for input_group in first.store.checkpoint.quantization.input_groups:
        paths = [linears[name] for name in input_group.modules if name in linears]
        parents = {path.rpartition(".")[0] for path in paths}
        if len(paths) > 1 and len(parents) == 1:
            leaves = tuple(path.rpartition(".")[2] for path in paths)
            input_groups.setdefault(parents.pop(), []).append(leaves)
    for path, groups in input_groups.items():
        parent: Any = model.get_submodule(path)
        kind: Any = type(parent)
        if "__class__" in inspect.unwrap(kind.forward).__code__.co_freevars:
            continue  # it calls super()
        parent.__class__ = _sharing(kind, tuple(groups))
