"""Input groups: linear layers that are called with one and the same input.

q, k and v of a block are one, gate and up another. What belongs to the input is shared by the
group: Gram matrix H, rotation, input scales, and at run time the rotated input. `statistics.py`
finds the groups by watching a forward; a checkpoint lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that share one input.

    Attributes:
        name: unique in a model, see `group_name`: "model.layers.0.self_attn.q_proj+k_proj".
        modules: full names of the linears, in the order of their calls.
        d_in: size of their input.
    """

    name: str
    modules: tuple[str, ...]
    d_in: int


def group_name(modules: Sequence[str]) -> str:
    """Name of an input group: the modules' common parent, then their tails joined by "+"."""
    parts = [module.split(".") for module in modules]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ".".join([*parts[0][:common], "+".join(".".join(p[common:]) for p in parts)])
