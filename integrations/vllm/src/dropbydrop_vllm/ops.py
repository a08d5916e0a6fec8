"""Operators of vLLM's: the product of an input group, and rows of a table turned back.

    dropbydrop_linear(x, key, width) -> [..., width]
    dropbydrop_turn_back(x, signs, odd) -> Q^T x, for the embedding of a table in planes

torch.compile sees operators that it cannot look into; neither planes nor look-up tables become
inputs of a graph. The layer of a product is found by its name in the forward context, as vLLM finds
its attention layers; names stay the same from process to process, so that compiled graphs which
vLLM keeps on disk reach the same layer again. On a GPU nothing in here reads a value of a tensor on
the host, and what is launched depends on the shape of x alone: a CUDA graph of one shape repeats
it. On the CPU a batch may have rows of several levels (`requests`).
"""
# No postponed annotations: torch reads the signature of the operator from them.

from collections.abc import Sequence
from typing import Any

import torch
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from dropbydrop.coding.rotation import Rotation, split_odd
from dropbydrop.runtime.tables import Turns

LINEAR, TURN_BACK = "dropbydrop_linear", "dropbydrop_turn_back"
ROWS = "dropbydrop:rows"  # in the forward context: which row of the batch has which level


def key_of(modules: Sequence[str]) -> str:
    """Under which a layer stands in the forward context, beside vLLM's own."""
    return f"dropbydrop:{'+'.join(modules)}"


def _linear(x: torch.Tensor, key: str, width: int) -> torch.Tensor:
    context = get_forward_context()
    layers = context.no_compile_layers
    groups, levels = layers[key].dropbydrop_groups, layers.get(ROWS)
    parts = [] if levels is None else _parts(levels, context, x.shape[0])
    if not parts:
        return _product(groups[max(groups)], x)
    if len(parts) == 1:
        return _product(groups[parts[0][0]], x)
    y = x.new_empty((x.shape[0], width))
    for level, rows in parts:
        y[rows] = _product(groups[level], x[rows])
    return y


def _product(group: Any, x: torch.Tensor) -> torch.Tensor:
    parts = group(x)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _parts(levels: Any, context: ForwardContext, n: int) -> Any:
    """`requests.rows_by_level`, found once in a pass over the model."""
    from .requests import rows_by_level

    kept = context.additional_kwargs
    if ROWS not in kept:
        kept[ROWS] = rows_by_level(levels, context, n)
    return kept[ROWS]


def _shape(x: torch.Tensor, key: str, width: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], width))


def rotation_of(signs: torch.Tensor, odd: torch.Tensor | None) -> Rotation:
    """A rotation from its tensors, signs [d] and the odd factor of d."""
    return Rotation(len(signs), split_odd(len(signs))[0], signs, odd)


def _turn_back(x: torch.Tensor, signs: torch.Tensor, odd: torch.Tensor | None) -> torch.Tensor:
    return Turns.of(rotation_of(signs, odd)).transpose(x)


def _same_shape(x: torch.Tensor, signs: torch.Tensor, odd: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(x)


def register() -> None:
    """Make the operators, once in a process."""
    if not hasattr(torch.ops.vllm, LINEAR):
        direct_register_custom_op(LINEAR, _linear, fake_impl=_shape)
        direct_register_custom_op(TURN_BACK, _turn_back, fake_impl=_same_shape)
