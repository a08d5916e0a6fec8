"""Experts of a mixture: how a block runs them, and what is recorded of their inputs.

transformers sends the forward of its expert classes through a registry. Whatever the family, such a
module ("experts") holds all its matrices in two parameters and is called with the same arguments:

    gate_up_proj [E, 2I, d] (or up_proj [E, I, d])    down_proj [E, d, I]
    forward(x [n, d], top_k_index [n, k], top_k_weights [n, k]) -> [n, d]
    y_t = sum_k w_tk down_e(act(up_e(x_t))),   e = index_tk

`is_transposed` ones (gpt_oss) keep [E, d, 2I]; biases lie beside, `gate_up_proj_bias` [E, 2I]. How
gate and up are interleaved, clamped or left out is the class's own `_apply_gate`. So one function
runs all families (`walk`), and a family outside of the registry is no module of experts here: its
blocks are refused for weights in no linear layer.

A parameter is a *stack* of E matrices, and what is recorded of it is

- gate_up: one H over all tokens. The experts see parts of the same distribution, the rotation is
  shared, and one factorisation of H serves all;
- down: an H for each expert, over what it computes for the tokens that are routed to it. Neuron i
  of one expert has nothing to do with neuron i of another, so experts cannot lend each other
  their H. What stands in where routing gives few tokens is a *forced* sample: FORCED tokens of
  every batch go through all experts, whatever the router says (the result is not used). With n_e
  tokens of its own, an expert has

      H_e = (1 - a) H_routed + a H_forced,    a = I / (I + n_e)

  which is the forced sample alone for an expert that calibration never met.

The output of a block is always that of the real routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "dropbydrop"  # in transformers' registry
FORCED = 32  # tokens of a batch that go through all experts


class Watcher(Protocol):
    """Who is told of the inputs of experts while `walk` runs."""

    def inputs(self, experts: nn.Module, x: Tensor) -> None:
        """x [n, d], of all tokens."""

    def middle(self, experts: nn.Module, e: int, h: Tensor, tokens: Tensor | None) -> None:
        """h [t, I], inputs of expert e's down; `tokens` [t], or None of a forced sample."""


watching: ContextVar[Watcher | None] = ContextVar("watching", default=None)


# ------------------------------------------------------------------------------------ structure


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of experts, by transformers' registry, with its own parameters."""
    known = isinstance(getattr(module, "is_transposed", None), bool)
    return known and hasattr(module, "_apply_gate") and set(stacks(module)) <= {*module._parameters}


def stacks(experts: nn.Module) -> tuple[str, str]:
    """Names of the two stacks of a module of experts."""
    return ("gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"), "down_proj"


def stack_names(root: nn.Module, prefix: str = "") -> list[str]:
    """Full names of all stacks in a module called `prefix`."""
    named = root.named_modules(prefix=prefix)
    return [f"{n}.{leaf}" for n, m in named if is_experts(m) for leaf in stacks(m)]


def routers(root: nn.Module, prefix: str = "") -> set[str]:
    """Full names of the linears beside experts that route: one output an expert, or one for the
    gate of a shared expert, and called so. They are small, and a wrong choice of experts is no
    rounding error, so they stay as they are. (Most families have a class of their own for it.)"""
    found = set()
    for name, module in root.named_modules(prefix=prefix):
        if is_experts(module):
            parent, count = name.rpartition(".")[0], int(getattr(module, "num_experts", 0))
            beside = root.get_submodule(parent.removeprefix(prefix).removeprefix("."))
            found |= {
                n
                for n, m in beside.named_modules(prefix=parent)
                if isinstance(m, nn.Linear)
                and m.out_features in (1, count)
                and any(part.endswith(("gate", "router")) for part in n.split("."))
            }
    return found


def weight_of(root: nn.Module, name: str) -> Tensor:
    """The weight [d_out, d_in] of the linear called `name`, or a stack [E, d_out, d_in]."""
    owner, _, leaf = name.rpartition(".")
    parent: Any = root.get_submodule(owner)
    if not is_experts(parent):
        found: Tensor = root.get_submodule(name).weight  # type: ignore[assignment]
        return found.detach()
    stack: Tensor = getattr(parent, leaf).detach()
    return stack.transpose(1, 2) if parent.is_transposed else stack


def bias_of(root: nn.Module, name: str) -> Tensor | None:
    """Its bias, [d_out] or [E, d_out], if it has one."""
    owner, _, leaf = name.rpartition(".")
    parent: Any = root.get_submodule(owner)
    stacked = is_experts(parent)
    place: Any = parent if stacked else root.get_submodule(name)
    bias = getattr(place, f"{leaf}_bias" if stacked else "bias", None)
    return None if bias is None else cast(Tensor, bias).detach()


def leaves_of(root: nn.Module, name: str) -> tuple[str, str]:
    """Names of the parameters that `weight_of` and `bias_of` read."""
    stacked = is_experts(root.get_submodule(name.rpartition(".")[0]))
    return (name, f"{name}_bias") if stacked else (f"{name}.weight", f"{name}.bias")


def layout_of(root: nn.Module, name: str) -> str:
    """How a stack lies in its model, by the words of the format; "fused" for linears, too."""
    parent: Any = root.get_submodule(name.rpartition(".")[0])
    return "fused-transposed" if is_experts(parent) and parent.is_transposed else "fused"


# -------------------------------------------------------------------------------------- running


def routed(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Experts that are hit, ascending: number, its tokens [t], and their places among the k.

    top_k_index [n, k]; numbers beyond the experts (those of other devices) are left out.
    """
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat.clamp(max=experts), minlength=experts + 1).tolist()
    start = 0
    for e, count in enumerate(counts[:experts]):
        if count:
            pairs = order[start : start + count]
            yield e, pairs // top_k_index.shape[1], pairs % top_k_index.shape[1]
        start += count


def mix(
    experts: Any,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Callable[[int, Tensor], Tensor],
    down: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """The output of experts [n, d], whatever multiplies.

    Args:
        x: [n, d]. index, weights: [n, k], of the router.
        up: (e, tokens [t]) -> [t, 2I or I] of these tokens.
        down: (e, h [t, I], tokens [t]) -> [t, d].
    """
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, weights.dtype))
    for e, tokens, places in routed(index, experts.num_experts):
        y = down(e, activated(experts, up(e, tokens)), tokens)
        if getattr(experts, "has_post_expert_norm", False):  # not told by transformers up to 5.17
            y = experts.post_expert_norm(y)
        out.index_add_(0, tokens, (y * weights[tokens, places, None]).to(out.dtype))
    return out.to(x.dtype)


def activated(experts: Any, h: Tensor) -> Tensor:
    """[t, 2I] or [t, I] -> [t, I] by the class's own gate or activation."""
    result: Tensor = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    return result


def _multiply(experts: Any, leaf: str, e: int, x: Tensor) -> Tensor:
    """x [t, d_in] times matrix e of a stack: [t, d_out]."""
    weight = getattr(experts, leaf)[e]
    bias = getattr(experts, f"{leaf}_bias")[e] if experts.has_bias else None
    if experts.is_transposed:
        return x @ weight if bias is None else x @ weight + bias
    return F.linear(x, weight, bias)


def walk(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of experts while a model is walked block by block: see the module's note."""
    x, watcher, (first, second) = hidden_states, watching.get(), stacks(self)
    if x.is_meta:  # only the flow between blocks is asked for
        return torch.empty_like(x)

    def down(e: int, h: Tensor, tokens: Tensor) -> Tensor:
        if watcher is not None:
            watcher.middle(self, e, h, tokens)
        return _multiply(self, second, e, h)

    if watcher is not None:
        watcher.inputs(self, x)
        some = torch.linspace(0, len(x) - 1, min(FORCED, len(x)), device=x.device).long()
        for e in range(self.num_experts):
            watcher.middle(self, e, activated(self, _multiply(self, first, e, x[some])), None)
    return mix(
        self, x, top_k_index, top_k_weights, lambda e, t: _multiply(self, first, e, x[t]), down
    )


def walk_experts(model: PreTrainedModel) -> None:
    """Let all experts of a model run by `walk`. Models without any are left as they are."""
    if any(map(is_experts, model.modules())):
        ALL_EXPERTS_FUNCTIONS.register(NAME, walk)
        model.set_experts_implementation(NAME)


# ----------------------------------------------------------------------------------- statistics


def blend(routed: Tensor, forced: Tensor, counts: Tensor, sample: float) -> Tensor:
    """H of every expert's down [E, I, I], as the module's note says.

    Args:
        routed, forced: sums over tokens of h h^T, [E, I, I].
        counts: tokens that were routed to each expert, [E]. sample: tokens of the forced sums.
    """
    a = (routed.shape[-1] / (routed.shape[-1] + counts))[:, None, None]
    found = routed / counts.clamp_min(1)[:, None, None] * (1 - a) + forced / max(sample, 1) * a
    dead = found.diagonal(dim1=1, dim2=2).sum(1) <= 0  # an expert that always gives zeros
    found[dead] = torch.eye(found.shape[-1], device=found.device)
    return found
