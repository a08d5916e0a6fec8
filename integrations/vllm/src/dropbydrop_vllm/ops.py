"""`torch.ops.vllm.dropbydrop_linear`: the product of an input group as one operator of vLLM's.

    dropbydrop_linear(x, key, width) -> [..., width]

torch.compile sees an operator that it cannot look into, and neither planes nor tables become inputs
of a graph. The layer is found by its name in the forward context, as vLLM finds its attention
layers; names stay the same from process to process, so that compiled graphs which vLLM keeps on disk
reach the same layer again. Nothing in here reads a tensor's value on the host, and what is launched
depends on the shape of x alone: a CUDA graph of one shape repeats it.
"""
# No postponed annotations: torch reads the signature of the operator from them.

from collections.abc import Sequence

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

NAME = "dropbydrop_linear"


def key_of(modules: Sequence[str]) -> str:
    """Under which a layer stands in the forward context, beside vLLM's own."""
    return f"dropbydrop:{'+'.join(modules)}"


def _linear(x: torch.Tensor, key: str, width: int) -> torch.Tensor:
    group = get_forward_context().no_compile_layers[key].dropbydrop_group
    parts = group(x)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _shape(x: torch.Tensor, key: str, width: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], width))


def register() -> None:
    """Make the operator, once in a process."""
    if not hasattr(torch.ops.vllm, NAME):
        direct_register_custom_op(NAME, _linear, fake_impl=_shape)
