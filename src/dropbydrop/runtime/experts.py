"""`NestedExperts`: the experts of a block, run from the first P planes of their codes.

The module keeps the class that transformers gave it, its gate, activation and settings, and gets

- a `NestedStack` in the place of each of its two parameters: E matrices, whose planes are one
  tensor each ([E, ...]), shared by all views as those of a `NestedLinear` are;
- a subclass of its class whose forward routes tokens to them (`models.experts.mix`).

Nothing is registered in transformers and no config changes, so an experts implementation that the
caller chooses has no effect on a quantized model.

Which products run, for n tokens:

    1 token        gate and up of all experts that are hit in one native call (of each level, where
                   a plan gives them several): x is rotated once, look-up tables are built once.
                   Their downs have an input each, hence a call each
    to 16 tokens   a call for each expert that is hit, with its tokens
    more           x is rotated once for the block; each expert that is hit is decoded to a dense
                   matrix and multiplies its own tokens (a prompt is exact to float rounding)

The native step of a whole token does not know experts: such models take the road module by module,
and `fused_decode.how` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dropbydrop import kernels
from dropbydrop.kernels import registry
from dropbydrop.models.experts import is_experts, mix, routed, stacks
from dropbydrop.planning.levels import of_expert
from dropbydrop.system.errors import FormatError

from .modules import NestedModule, books_of
from .plane_store import PlaneStore


class NestedStack(NestedModule):
    """The stack of one parameter of experts: E matrices [d_out, d_in] that share an input group."""

    @property
    def experts(self) -> int:
        """E."""
        return int(self.scales.shape[0])

    def planes_of(self, e: int) -> int:
        """P of expert e."""
        return of_expert(self._count, e)

    def matrix(self, e: int) -> kernels.Matrix:
        """Matrix e as kernels read it; on the storage of the stack."""
        bias = None if self.bias is None else self.bias.detach()[e]
        return kernels.Matrix(self.codes.held(e), self.scales[e], bias)

    def products(self, hit: tuple[int, ...], x: Tensor) -> dict[int, Tensor]:
        """One input x [1, d_in] times each of these matrices; a call for those of one level."""
        results: dict[int, Tensor] = {}
        for prefix in {self.planes_of(e) for e in hit}:
            same = tuple(e for e in hit if self.planes_of(e) == prefix)
            results |= zip(same, self.group(same)(x), strict=True)
        return results

    def group(self, hit: tuple[int, ...]) -> kernels.PreparedGroup:
        """Matrices of one level that read one input, ready for the kernel in use; one alone is
        built once."""
        prefix = self.planes_of(hit[0])

        def build() -> kernels.PreparedGroup:
            matrices = [self.matrix(e) for e in hit]
            rotation = self.input_group.rotation
            return kernels.prepare_group(matrices, books_of(self), rotation, prefix)

        if len(hit) > 1:  # there are too many choices to keep
            return build()
        _, kernel = kernels.backend_for(self.codes.device.type, kind=self.codes.kind)
        place = (prefix, kernel, self.codes.device, self.codes.packed)
        kind = None if self.bias is None else self.bias.dtype
        biases = [] if self.bias is None else [self.bias]
        return self.groups.get((self.name, *hit, kind, *place), biases, build)

    def rotated(self, x: Tensor) -> Tensor:
        """Q x in the dtype of x, for `multiply_rotated`."""
        return kernels.rotate(x, self.input_group.rotation).to(x.dtype)

    def multiply_rotated(self, e: int, x: Tensor) -> Tensor:
        """Rotated inputs x [t, d_in] times matrix e, decoded: [t, d_out]."""
        weight = self.group((e,)).weight(0, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias[e].to(x.dtype))

    def multiply(self, e: int, x: Tensor) -> Tensor:
        """x [t, d_in] times matrix e: [t, d_out], for few rows by the kernel."""
        return self.group((e,))(x)[0]

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W decoded from P planes, in the coordinates of the original model: [E, d_out, d_in]."""
        back = self.input_group.rotation.transpose
        each = [back(self.group((e,)).weight()).to(dtype) for e in range(self.experts)]
        return torch.stack(each)


class NestedExperts(nn.Module):
    """What a module of experts becomes: see the module's note. Never made by itself."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [n, d], and what the router chose, [n, k] each -> [n, d]."""
        x, shared = hidden_states, registry.takes(hidden_states)
        first, second = (cast(NestedStack, getattr(self, leaf)) for leaf in stacks(self))
        up, down = _by_kernel(first, x, top_k_index) if shared else _by_matrices(first, x)

        def out(e: int, h: Tensor, tokens: Tensor) -> Tensor:
            return down(second, e, h)

        return mix(self, x, top_k_index, top_k_weights, up, out)

    def dequantize(self, dtype: torch.dtype) -> None:
        """Turn back into the module that it was, with dense parameters."""
        transposed = bool(self.is_transposed)
        for leaf in stacks(self):
            stack = cast(NestedStack, getattr(self, leaf))
            weight = stack.dense_weight(dtype)
            delattr(self, leaf)
            weight = weight.transpose(1, 2).contiguous() if transposed else weight
            self.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
            if stack.bias is not None:
                bias = nn.Parameter(stack.bias.detach().to(dtype), requires_grad=False)
                self.register_parameter(f"{leaf}_bias", bias)
        self.__class__ = type(self).__mro__[2]


_Up = Callable[[int, Tensor], Tensor]
_Down = Callable[[NestedStack, int, Tensor], Tensor]


def _by_kernel(first: NestedStack, x: Tensor, index: Tensor) -> tuple[_Up, _Down]:
    """Products of few tokens x [n, d]."""
    if len(x) > 1:
        return lambda e, tokens: first.multiply(e, x[tokens]), NestedStack.multiply
    results = first.products(tuple(e for e, _, _ in routed(index, first.experts)), x)
    return lambda e, tokens: results[e], NestedStack.multiply


def _by_matrices(first: NestedStack, x: Tensor) -> tuple[_Up, _Down]:
    """Products of many tokens x [n, d]; differentiable in x."""
    rotated = first.rotated(x)

    def down(second: NestedStack, e: int, h: Tensor) -> Tensor:
        return second.multiply_rotated(e, second.rotated(h))

    return lambda e, tokens: first.multiply_rotated(e, rotated[tokens]), down


@cache
def _nested(kind: Any) -> type[nn.Module]:
    """The subclass of a class of experts whose forward is that of `NestedExperts`."""
    return type(kind.__name__, (NestedExperts, kind), {"__module__": kind.__module__})


def place_experts(experts: nn.Module, name: str, store: PlaneStore, prefix: int) -> None:
    """Turn a module of experts on the meta device, `name` in the checkpoint, into a NestedExperts.

    Raises:
        FormatError: the checkpoint describes other experts.
    """
    shapes = store.checkpoint.shapes
    if not is_experts(experts):
        raise FormatError(
            f"{name} holds experts in the checkpoint, but is {type(experts).__name__} here: "
            "config.json is of another model. Fetch it again."
        )
    for leaf in stacks(experts):
        stored, old = f"{name}.{leaf}", getattr(experts, leaf)
        d = tuple(old.shape)
        found = (d[0], d[2], d[1]) if experts.is_transposed else d
        if shapes.get(stored) != found:
            raise FormatError(
                f"{stored} are experts of {list(shapes.get(stored, ()))} in the checkpoint, but "
                f"{list(found)} in {type(experts).__name__}: config.json is of another model. "
                "Fetch it again."
            )
        bias = getattr(experts, f"{leaf}_bias", None)
        delattr(experts, leaf)
        if bias is not None:
            delattr(experts, f"{leaf}_bias")
        setattr(experts, leaf, NestedStack(store, stored, prefix, bias))
    kind: Any = type(experts)
    experts.__class__ = _nested(kind)
    cast(Any, experts)._is_hf_initialized = True  # transformers would fill parameters that are gone
