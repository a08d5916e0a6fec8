"""Input groups: linear layers that are called with one and the same input.

q, k and v of a block are one, gate and up another. What belongs to the input is shared by the
group: Gram matrix H, rotation, input scales, and at run time the rotated input. `statistics.py`
finds the groups by watching a forward; a checkpoint lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from torch import nn

from .experts import routers

GROUP_SIZE = 8  # inputs that one code covers, as in coding/code.py, a room that is beside this one


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that share one input.

    Attributes:
        name: unique in a model, see `group_name`: "model.layers.0.self_attn.q_proj+k_proj".
        modules: full names of the linears, in the order of their calls.
        d_in: size of their input.
        experts: 0 for linears; else the modules are stacks of that many matrices, one an expert,
            and a token's input meets those of the experts that it is routed to (experts.py).
    """

    name: str
    modules: tuple[str, ...]
    d_in: int
    experts: int = field(default=0, kw_only=True)


def group_name(modules: Sequence[str]) -> str:
    """Name of an input group: the modules' common parent, then their tails joined by "+"."""
    parts = [module.split(".") for module in modules]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ".".join([*parts[0][:common], "+".join(".".join(p[common:]) for p in parts)])


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes y = x W^T + b, so that another one that does can take its place.

    Routers and grouped projections derive from nn.Linear, too, and compute something else.
    """
    known = type(module).__name__ == "FalconLinear"  # the same product, written out
    return isinstance(module, nn.Linear) and (known or type(module).forward is nn.Linear.forward)


def why_not_coded(name: str, module: nn.Module) -> str:
    """Why a module can have no codes, as a sentence without its point; "" if it can."""
    if not is_plain_linear(module):
        return f"{name} is a {type(module).__name__}"
    inputs = module.in_features
    if inputs % GROUP_SIZE:
        return f"{name} has {inputs} inputs, which is not a multiple of {GROUP_SIZE}"
    return ""


def codable(block: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """The linear layers of a block called `prefix` that can have codes, by their full names.

    Routers could, but stay as they are.
    """
    named, kept = block.named_modules(prefix=prefix), routers(block, prefix)
    linears = {n: m for n, m in named if isinstance(m, nn.Linear) and n not in kept}
    return {n: m for n, m in linears.items() if not why_not_coded(n, m)}
