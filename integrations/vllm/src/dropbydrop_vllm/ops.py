"""`torch.ops.vllm.dropbydrop_linear`: the product of an input group as one operator of vLLM's.

    dropbydrop_linear(x, key, width) -> [..., width]

torch.compile sees an operator that it cannot look into, and neither planes nor tables become inputs
of a graph. The layer is found by its name in the forward context, as vLLM finds its attention
layers; names stay the same from process to process, so that compiled graphs which vLLM keeps on
disk reach the same layer again. On a GPU nothing in here reads a tensor's value on the host, and
what is launched depends on the shape of x alone: a CUDA graph of one shape repeats it. On the CPU a
batch may have rows of several levels (`requests`).
"""
# No postponed annotations: torch reads the signature of the operator from them.

from collections.abc import Sequence
from typing import Any

import torch
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

NAME = "dropbydrop_linear"
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


def register() -> None:
    """Make the operator, once in a process."""
    if not hasattr(torch.ops.vllm, NAME):
        direct_register_custom_op(NAME, _linear, fake_impl=_shape)
